"""Whose an object is: by the run's uid, for a name may be anybody's."""

from stagetune_api import names
from stagetune_operator.views import Object


def is_own(item: Object, run: Object) -> bool:
    """Whether `item` was made for this very run."""
    uid, metadata = run["metadata"]["uid"], item["metadata"]
    owners = [owner.get("uid") for owner in metadata.get("ownerReferences") or []]
    return uid in owners or (metadata.get("annotations") or {}).get(names.ANNOTATION_RUN_UID) == uid


def is_of_earlier_run(item: Object, run: Object) -> bool:
    """Whether `item` goes away by itself: it was made for a run that had the name before."""
    metadata, this = item["metadata"], run["metadata"]
    earlier = [
        owner
        for owner in metadata.get("ownerReferences") or []
        if owner.get("kind") == names.KIND
        and owner.get("name") == this["name"]
        and owner.get("uid") != this["uid"]
    ]
    return bool(earlier) or "deletionTimestamp" in metadata
