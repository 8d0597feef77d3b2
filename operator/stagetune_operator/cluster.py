"""The only calls to the API server: objects as plain JSON in and out, errors in our own words.

Everything is raw JSON and no model of the client is ever built: with a thousand runs that is most
of the time and memory. Comes below `reconcile`, which says what to read and what to write.
"""

import json
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import aiohttp
from kubernetes.aio.client import ApiClient

from stagetune_api import names
from stagetune_operator.errors import (
    ClusterError,
    ConflictError,
    GoneError,
    UnavailableError,
    error_of,
)
from stagetune_operator.keys import RunKey, TokenIdentity, run_of, version_of
from stagetune_operator.resources import Collection
from stagetune_operator.views import Object

REQUEST_TIMEOUT = aiohttp.ClientTimeout(total=10)
LIST_PAGE_SIZE = 500
EVENT_MESSAGE_MAX_BYTES = 1024
COMPONENT = "stagetune-operator"

logger = logging.getLogger(__name__)


_CREATED = {
    (item.api_version, item.kind): item
    for item in (Collection.JOBS, Collection.CONFIG_MAPS, Collection.CLAIMS, Collection.SERVICES)
}


class Cluster:
    """The API server as the operator uses it. Every method may raise UnavailableError."""

    def __init__(
        self, client: ApiClient, on_write: Callable[[str, str], None] = lambda kind, verb: None
    ) -> None:
        """`on_write(kind, verb)` is told of every write that the server has accepted."""
        self._client = client
        self._on_write = on_write

    async def read_run(self, key: RunKey) -> Object | None:
        """Return the run as it is now; None if there is none."""
        return await self._read(Collection.RUNS, key.namespace, key.name)

    async def list_jobs(self, key: RunKey) -> list[Object]:
        """Return the Jobs with the run's label, whoever owns them."""
        return await self._list(Collection.JOBS, key)

    async def list_pods(self, key: RunKey) -> list[Object]:
        """Return the pods with the run's label."""
        return await self._list(Collection.PODS, key)

    async def read_config_map(self, namespace: str, name: str) -> Object | None:
        """Return the ConfigMap; None if there is none."""
        return await self._read(Collection.CONFIG_MAPS, namespace, name)

    async def read_claim(self, namespace: str, name: str) -> Object | None:
        """Return the PersistentVolumeClaim; None if there is none."""
        return await self._read(Collection.CLAIMS, namespace, name)

    async def read_service(self, namespace: str, name: str) -> Object | None:
        """Return the Service; None if there is none."""
        return await self._read(Collection.SERVICES, namespace, name)

    async def create(self, manifest: Object) -> Object:
        """Create a Job, a ConfigMap, a PersistentVolumeClaim or a Service and return it.

        Raises AlreadyExistsError, DeniedError, or GoneError if the namespace is not there.
        """
        where = _CREATED[manifest["apiVersion"], manifest["kind"]]
        path = where.path(manifest["metadata"]["namespace"])
        try:
            made = await self._request("POST", path, body=manifest)
        except ConflictError as error:
            # A quota that two creations counted against at once; nothing was made.
            raise UnavailableError(str(error)) from error
        self._on_write(where.kind, "create")
        return made

    async def delete_job(self, namespace: str, name: str, uid: str) -> None:
        """Delete this very Job, after its pods; one that is gone or is another is success."""
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid},
            "propagationPolicy": "Foreground",
        }
        try:
            await self._request("DELETE", Collection.JOBS.path(namespace, name), body=body)
        except (GoneError, ConflictError):
            return
        self._on_write(Collection.JOBS.kind, "delete")

    async def write_status(self, run: Object, status: Object) -> Object:
        """Replace the whole status of `run` and return the run.

        A PUT, so that keys which are no longer in `status` vanish, and with the uid and the
        resourceVersion of `run`, so that the server refuses it unless `run` is what there is.
        The spec is not sent: the server takes it from what it has. Raises ConflictError if the run
        has changed or is another one of that name, GoneError if it is not there.
        """
        metadata = run["metadata"]
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {
                name: metadata[name] for name in ("name", "namespace", "uid", "resourceVersion")
            },
            "status": status,
        }
        path = Collection.RUNS.path(metadata["namespace"], metadata["name"])
        written = await self._request("PUT", f"{path}/status", body=body)
        self._on_write(f"{names.KIND}/status", "update")
        return written

    async def post_event(self, run: Object, type: str, reason: str, message: str) -> None:
        """Post an event about `run`; one that cannot be posted is logged and forgotten."""
        metadata = run["metadata"]
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        reference = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            **{key: metadata[key] for key in ("name", "namespace", "uid", "resourceVersion")},
        }
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "generateName": f"{metadata['name']}-",
                "namespace": metadata["namespace"],
            },
            "involvedObject": reference,
            "type": type,
            "reason": reason,
            "message": _cut(message, EVENT_MESSAGE_MAX_BYTES),
            "source": {"component": COMPONENT},
            "reportingComponent": COMPONENT,
            "count": 1,
            "firstTimestamp": now,
            "lastTimestamp": now,
        }
        path = Collection.EVENTS.path(metadata["namespace"])
        try:
            await self._request("POST", path, body=event)
        except ClusterError as error:
            logger.warning("event %s of %s was not posted: %s", reason, metadata["name"], error)
        else:
            self._on_write("Event", "create")

    async def review_token(self, token: str, audience: str) -> TokenIdentity | None:
        """Return whose service-account token for `audience` this is; None if it is none."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        path = "/apis/authentication.k8s.io/v1/tokenreviews"
        status = (await self._request("POST", path, body=body)).get("status") or {}
        user = status.get("user") or {}
        account = str(user.get("username", "")).split(":")
        is_account = len(account) == 4 and account[:2] == ["system", "serviceaccount"]
        if not status.get("authenticated") or audience not in status.get("audiences", ()):
            return None
        if not is_account:
            return None
        extra = user.get("extra") or {}
        return TokenIdentity(
            username=user["username"],
            namespace=account[2],
            service_account=account[3],
            pod_name=_only(extra, "authentication.kubernetes.io/pod-name"),
            pod_uid=_only(extra, "authentication.kubernetes.io/pod-uid"),
        )

    async def list_versions(
        self, where: Collection, namespace: str | None
    ) -> dict[str, tuple[RunKey | None, int]]:
        """Return the run and the resourceVersion of all runs, Jobs or pods of runs, by uid.

        Only metadata is sent. Without a resourceVersion the server answers with what is stored and
        not with what it remembers, so what is not in the list is gone.
        """
        query = {"limit": str(LIST_PAGE_SIZE)}
        if where is not Collection.RUNS:
            query["labelSelector"] = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"
        accept = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
        items = await self._pages(where.path(namespace), query, accept)
        return {
            item["metadata"]["uid"]: (
                run_of(item, is_run=where is Collection.RUNS),
                version_of(item),
            )
            for item in items
        }

    async def is_reachable(self) -> bool:
        """Return whether the API server answers at all."""
        try:
            await self._request("GET", "/version")
        except UnavailableError:
            return False
        except ClusterError:
            return True
        return True

    async def _read(self, where: Collection, namespace: str, name: str) -> Object | None:
        try:
            return await self._request("GET", where.path(namespace, name))
        except GoneError:
            return None

    async def _list(self, where: Collection, key: RunKey) -> list[Object]:
        query = {
            "labelSelector": f"{names.LABEL_RUN}={key.name}",
            "limit": str(LIST_PAGE_SIZE),
        }
        items = await self._pages(where.path(key.namespace), query)
        # The server leaves both out of a list's items.
        return [{"apiVersion": where.api_version, "kind": where.kind, **item} for item in items]

    async def _pages(
        self, path: str, query: Mapping[str, str], accept: str = "application/json"
    ) -> list[Object]:
        items: list[Object] = []
        more = ""
        while True:
            page_query = {**query, "continue": more} if more else query
            page = await self._request("GET", path, query=page_query, accept=accept)
            items += page["items"]
            more = page["metadata"].get("continue", "")
            if not more:
                return items

    async def _request(
        self,
        method: str,
        path: str,
        *,
        body: Object | None = None,
        query: Mapping[str, str] | None = None,
        accept: str = "application/json",
    ) -> Object:
        """Send one request and return the object in the answer; raises a ClusterError otherwise."""
        prepared = await self._client.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params={"Accept": accept, "Content-Type": "application/json"},
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            response = await self._client.call_api(*prepared, _request_timeout=REQUEST_TIMEOUT)
            answer = _parse(await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnavailableError(f"{method} {path}: {error or type(error).__name__}") from error
        if 200 <= response.status < 300 and answer is not None:
            return answer
        retry_after = response.headers.get("Retry-After")
        raise error_of(f"{method} {path}", response.status, answer or {}, retry_after)


def _cut(text: str, size: int) -> str:
    """Return as much of `text` as fits into `size` bytes."""
    return text if len(text.encode()) <= size else text.encode()[:size].decode(errors="ignore")


def _only(extra: Mapping[str, list[str]], name: str) -> str:
    values = extra.get(name) or [""]
    return values[0]


def _parse(text: bytes) -> Object | None:
    """Return the object in an answer; None for anything else, a proxy's page for one."""
    try:
        parsed: Any = json.loads(text)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None
