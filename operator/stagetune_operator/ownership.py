"""Whose an object is: by the run's uid, for a name may be anybody's."""

from dataclasses import dataclass

from stagetune_api import names
from stagetune_operator.views import Object


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The run that owns what is built."""

    name: str
    namespace: str
    uid: str

    @property
    def directory(self) -> str:
        """Path of the run's files from the volume's root; of this very run, not of its name."""
        return f"runs/{self.name}-{self.uid[:8]}"

    @property
    def reference(self) -> Object:
        """The owner reference by which Kubernetes cleans up."""
        return {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }


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
