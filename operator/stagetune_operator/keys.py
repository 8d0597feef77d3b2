"""What the operator's edges know things by: a run's key, a version, the pod of a token."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from stagetune_api import names


class RunKey(NamedTuple):
    """Which run: what the queue, the store and the progress endpoint know it by."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class TokenIdentity(NamedTuple):
    """Whom the API server knows the bearer of a service-account token as."""

    username: str
    namespace: str
    service_account: str
    pod_name: str
    """The pod that the token is bound to; empty for a token without one."""
    pod_uid: str


def run_of(item: Mapping[str, Any], *, is_run: bool = False) -> RunKey | None:
    """Return the key of a run, or of the run that a Job or pod names in its label; None if none."""
    metadata = item["metadata"]
    name = metadata["name"] if is_run else (metadata.get("labels") or {}).get(names.LABEL_RUN)
    return None if name is None else RunKey(metadata["namespace"], name)


def version_of(item: Mapping[str, Any] | None) -> int:
    """Return the resourceVersion; of one kind they can be compared as numbers (KEP-5504)."""
    text = item["metadata"].get("resourceVersion", "") if item is not None else ""
    return int(text) if text.isdecimal() else 0
