"""What the watches last said, by run.

The watches feed it and everything that only wants to know reads it, so that a run with nothing to
do costs no call. It may be behind: a watch is late, or a list is answered from a server's cache.
Nothing may be done on its word alone. Whoever acts reads the live objects first and decides again.
But whoever finds nothing to do does not look, so an event that is older than what is known already
is passed over, and `sweep` holds it all against the server now and then.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stagetune_api import names
from stagetune_operator.keys import RunKey, run_of, version_of
from stagetune_operator.views import Object

DELETED = "DELETED"
"""The type of a watch's event for an object that is gone; every other type brings the object."""

_UNREAD_ANNOTATIONS = frozenset(
    {"kubectl.kubernetes.io/last-applied-configuration", names.ANNOTATION_STAGE_CONFIG}
)
"""Copies of whole manifests, several kilobytes in each object."""
_UNREAD_METADATA = frozenset({"managedFields", "generateName", "finalizers"})
_POD_STATUS = ("phase", "reason", "message")
_POD_CONDITIONS = frozenset({"PodScheduled", "DisruptionTarget"})
_CONTAINER_STATUS = ("name", "state")
"""What `views` reads of a pod's status. With a thousand runs the rest is most of the memory."""


@dataclass(frozen=True)
class Snapshot:
    """A run and what belongs to it, as last heard of."""

    run: Object | None
    jobs: list[Object]
    pods: list[Object]


class Store:
    """The objects of all runs. Each is kept by its uid: a name may be used again."""

    def __init__(self) -> None:
        self._runs: dict[RunKey, dict[str, Object]] = {}
        self._jobs: dict[RunKey, dict[str, Object]] = {}
        self._pods: dict[RunKey, dict[str, Object]] = {}
        self._pods_by_uid: dict[str, Object] = {}

    def apply_run(self, event_type: str | None, body: Object) -> RunKey:
        """Take in an event of a run and return the run's key."""
        metadata = body["metadata"]
        key = RunKey(metadata["namespace"], metadata["name"])
        _apply(self._runs, key, event_type, {**body, "metadata": _trimmed_metadata(body)})
        return key

    def apply_job(self, event_type: str | None, body: Object) -> RunKey | None:
        """Take in an event of a Job and return the key of its run; None if it names none.

        Kept are its metadata, whether it is suspended, and its conditions: what it was made from is
        known by its digest.
        """
        key = run_of(body)
        if key is not None:
            trimmed = {
                "metadata": _trimmed_metadata(body),
                "spec": _only(body["spec"], ("suspend",)),
                "status": _only(body.get("status") or {}, ("conditions",)),
            }
            _apply(self._jobs, key, event_type, trimmed)
        return key

    def apply_pod(self, event_type: str | None, body: Object) -> RunKey | None:
        """Take in an event of a pod and return the key of its run; None if it names none.

        Of the spec only the node and the containers' resources are kept, of the status what says
        how the containers are.
        """
        key = run_of(body)
        if key is not None:
            trimmed = {
                "metadata": _trimmed_metadata(body),
                "spec": _trimmed_pod_spec(body),
                "status": _trimmed_pod_status(body),
            }
            uid = body["metadata"]["uid"]
            newest = _apply(self._pods, key, event_type, trimmed)
            if newest is None:
                self._pods_by_uid.pop(uid, None)
            else:
                self._pods_by_uid[uid] = newest
        return key

    def snapshot(self, key: RunKey) -> Snapshot:
        """Return everything known of a run; its objects are shared and must not be changed."""
        return Snapshot(
            run=_newest(self._runs.get(key, {})),
            jobs=list(self._jobs.get(key, {}).values()),
            pods=list(self._pods.get(key, {}).values()),
        )

    def knows(self, key: RunKey) -> bool:
        """Whether there is such a run."""
        return key in self._runs

    def keys(self) -> list[RunKey]:
        """Return the keys of all runs that there are."""
        return list(self._runs)

    def runs(self) -> list[tuple[RunKey, Object]]:
        """Return all runs that there are."""
        found = ((key, _newest(by_uid)) for key, by_uid in self._runs.items())
        return [(key, run) for key, run in found if run is not None]

    def pod_by_uid(self, uid: str) -> Object | None:
        """Return the pod, if it was heard of and not heard to be gone."""
        return self._pods_by_uid.get(uid)

    def run_versions(self, namespace: str | None = None) -> dict[str, int]:
        """Return the resourceVersions of all runs, or of those in `namespace`, by uid."""
        return _versions(self._runs, namespace)

    def job_versions(self, namespace: str | None = None) -> dict[str, int]:
        """Return those of all Jobs, or of those in `namespace`."""
        return _versions(self._jobs, namespace)

    def pod_versions(self, namespace: str | None = None) -> dict[str, int]:
        """Return those of all pods, or of those in `namespace`."""
        return _versions(self._pods, namespace)

    def forget(self, uids: Iterable[str]) -> set[RunKey]:
        """Drop the objects with these uids and return the runs that they belonged to."""
        gone = set(uids)
        for uid in gone:
            self._pods_by_uid.pop(uid, None)
        touched: set[RunKey] = set()
        for objects in (self._runs, self._jobs, self._pods):
            for key in [key for key, by_uid in objects.items() if gone & by_uid.keys()]:
                touched.add(key)
                for uid in gone & objects[key].keys():
                    _drop(objects, key, uid)
        return touched


def _apply(
    objects: dict[RunKey, dict[str, Object]], key: RunKey, event_type: str | None, item: Object
) -> Object | None:
    """Take in an event and return the object as it is known now; None if it is gone."""
    uid = item["metadata"]["uid"]
    if event_type == DELETED:
        _drop(objects, key, uid)
        return None
    by_uid = objects.setdefault(key, {})
    # A list is what a watch begins anew with: all that came later comes again.
    if event_type is None or version_of(item) >= version_of(by_uid.get(uid)):
        by_uid[uid] = item
    return by_uid[uid]


def _drop(objects: dict[RunKey, dict[str, Object]], key: RunKey, uid: str) -> None:
    by_uid = objects.get(key, {})
    by_uid.pop(uid, None)
    if not by_uid:
        objects.pop(key, None)


def _newest(by_uid: Mapping[str, Object]) -> Object | None:
    """Return the run that has the name now: events of the one before may come after its own.

    Creation times have whole seconds; of two in one second the one first heard of later counts.
    """
    runs = reversed(list(by_uid.values()))
    return max(runs, key=lambda run: str(run["metadata"]["creationTimestamp"]), default=None)


def _trimmed_metadata(body: Object) -> Object:
    metadata = {
        name: item for name, item in body["metadata"].items() if name not in _UNREAD_METADATA
    }
    annotations = metadata.get("annotations") or {}
    if not _UNREAD_ANNOTATIONS.isdisjoint(annotations):
        metadata["annotations"] = {
            name: text for name, text in annotations.items() if name not in _UNREAD_ANNOTATIONS
        }
    return metadata


def _trimmed_pod_spec(body: Object) -> Object:
    spec = body["spec"]
    containers = [_only(container, ("name", "resources")) for container in spec["containers"]]
    node = {"nodeName": spec["nodeName"]} if "nodeName" in spec else {}
    return {**node, "containers": containers}


def _trimmed_pod_status(body: Object) -> Object:
    status = body.get("status") or {}
    conditions = [
        item for item in status.get("conditions") or () if item["type"] in _POD_CONDITIONS
    ]
    containers = [_only(item, _CONTAINER_STATUS) for item in status.get("containerStatuses") or ()]
    return {
        **_only(status, _POD_STATUS),
        "conditions": conditions,
        "containerStatuses": containers,
    }


def _only(item: Object, fields: Sequence[str]) -> Object:
    return {name: item[name] for name in fields if name in item}


def _versions(
    objects: Mapping[RunKey, Mapping[str, Object]], namespace: str | None
) -> dict[str, int]:
    return {
        uid: version_of(item)
        for key, by_uid in objects.items()
        if namespace in (None, key.namespace)
        for uid, item in by_uid.items()
    }
