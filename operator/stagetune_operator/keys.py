"""What the operator's edges name things by: a run's key, and the pod that a token speaks for."""

from typing import NamedTuple


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
