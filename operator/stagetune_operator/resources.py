"""The kinds of object that the operator reads, writes and watches, and their places in the API."""

from enum import Enum
from urllib.parse import quote

from stagetune_api import names


class Collection(Enum):
    """Kinds of object that are read or written, and where they are in the API."""

    RUNS = (f"/apis/{names.API_VERSION}", names.PLURAL, names.API_VERSION, names.KIND)
    JOBS = ("/apis/batch/v1", "jobs", "batch/v1", "Job")
    PODS = ("/api/v1", "pods", "v1", "Pod")
    CONFIG_MAPS = ("/api/v1", "configmaps", "v1", "ConfigMap")
    CLAIMS = ("/api/v1", "persistentvolumeclaims", "v1", "PersistentVolumeClaim")
    SERVICES = ("/api/v1", "services", "v1", "Service")
    EVENTS = ("/api/v1", "events", "v1", "Event")

    def __init__(self, root: str, plural: str, api_version: str, kind: str) -> None:
        self.root = root
        self.plural = plural
        self.api_version = api_version
        self.kind = kind

    def path(self, namespace: str | None, name: str | None = None) -> str:
        """Return the path of the collection, or of one object in it."""
        path = self.root
        if namespace is not None:
            path += f"/namespaces/{quote(namespace, safe='')}"
        path += f"/{self.plural}"
        return path if name is None else f"{path}/{quote(name, safe='')}"
