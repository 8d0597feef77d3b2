"""Whose an object is: by the run's uid, for a name may be anybody's."""

from stagetune_api import names
from stagetune_operator.views import Object


def is_own(item: Object, run: Object) -> bool:
    """Whether `item` was made for this very run."""
    uid, metadata = run["metadata"]["uid"], item["metadata"]
    owners = [owner.get("uid") for owner in metadata.get("ownerReferences") or []]
    return uid in owners or (metadata.get("annotations") or {}).get(names.ANNOTATION_RUN_UID) == uid
