"""kopf's part: watch events in, keys into the queue out, and the settings under which it watches.

kopf opens the watches, goes on after a break and begins anew when it has to. Its handlers of raw
events are not called again when they fail, so they only note what happened: nothing is done for a
run here, nothing is written to it, and no finalizer or annotation of kopf's is ever on it. What
kopf lists before it watches is taken page by page, not object by object: see `list_taker`.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import aiohttp
import kopf

from stagetune_api import names
from stagetune_operator.keys import RunKey
from stagetune_operator.resources import Collection
from stagetune_operator.store import Store
from stagetune_operator.views import Object
from stagetune_operator.watches import SILENCE_SECONDS, WATCH_SECONDS

_LOGIN_SECONDS = 5.0

logger = logging.getLogger(__name__)

OpenSession = Callable[[], tuple[str, aiohttp.ClientSession]]
"""Returns the API server's address and a session for watching it."""


class _Backoffs:
    """Waits between tries, without end: a server may be away for an hour and is watched again."""

    def __iter__(self) -> Iterator[float]:
        return chain((0.5, 1, 2, 3, 5, 8, 13, 21), repeat(30))


class _NothingToCompare(kopf.DiffBaseStorage):
    """Says that no object has anything that a handler of changes would compare.

    For those kopf copies each object deeply, twice an event, though there are none here: that was
    half of the operator's time.
    """

    def build(self, *, body: kopf.Body, extra_fields: object = None) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, *, body: kopf.Body) -> None:
        return None

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        raise NotImplementedError("nothing is written to what is watched")


def build_registry(
    *,
    store: Store,
    look_at: Callable[[RunKey], None],
    open_session: OpenSession,
    close: Callable[[], Awaitable[None]],
) -> kopf.OperatorRegistry:
    """Return the handlers: `look_at(key)` is told of each run that something happened to.

    `close()` is awaited once the watches have ended.
    """
    registry = kopf.OperatorRegistry()
    last_login = -_LOGIN_SECONDS

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.AiohttpSession:
        nonlocal last_login
        # kopf comes back at once when the server refuses the token.
        await asyncio.sleep(max(0.0, last_login + _LOGIN_SECONDS - time.monotonic()))
        last_login = time.monotonic()
        server, session = open_session()
        return kopf.AiohttpSession(server=server, aiohttp_session=session)

    @kopf.on.cleanup(registry=registry)
    async def cleanup(**_: Any) -> None:
        await close()

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=registry)
    async def on_run(event: kopf.RawEvent, **_: Any) -> None:
        look_at(store.apply_run(event["type"], _object(event)))

    @kopf.on.event("batch", "v1", "jobs", registry=registry)
    async def on_job(event: kopf.RawEvent, **_: Any) -> None:
        _look_at_owner(store.apply_job(event["type"], _object(event)))

    @kopf.on.event("", "v1", "pods", registry=registry)
    async def on_pod(event: kopf.RawEvent, **_: Any) -> None:
        _look_at_owner(store.apply_pod(event["type"], _object(event)))

    def _look_at_owner(key: RunKey | None) -> None:
        if key is not None:
            look_at(key)

    return registry


def list_taker(store: Store, look_at: Callable[[RunKey], None]) -> Callable[[Object], Object]:
    """Return what takes the objects out of a page of a list before kopf sees it.

    kopf has a task, a queue and a dozen helpers for each object that it is given, half a
    millisecond of work, and with a thousand finished runs a start lists eleven thousand objects.
    So the pages go straight into the store, and kopf finds them empty and watches on from the
    version of the list. If it read them in a way that cannot be taken, its handlers would get the
    objects, and the same would come of it, later.
    """
    apply_by_kind: dict[str, Callable[[str | None, Object], RunKey | None]] = {
        f"{Collection.RUNS.kind}List": store.apply_run,
        f"{Collection.JOBS.kind}List": store.apply_job,
        f"{Collection.PODS.kind}List": store.apply_pod,
    }

    def take(page: Object) -> Object:
        apply = apply_by_kind.get(page.get("kind", ""))
        if apply is None:
            return page
        keys: dict[RunKey, None] = {}
        for item in page["items"]:
            try:
                key = apply(None, item)
            except Exception:
                # As kopf does for a handler: one that cannot be read is no reason to miss the rest.
                logger.exception("an object of a %s was not understood", page["kind"])
                continue
            if key is not None:
                keys[key] = None
        for key in keys:
            look_at(key)
        return {**page, "items": []}

    return take


def build_settings() -> kopf.OperatorSettings:
    """Return the settings under which kopf watches and does nothing else."""
    settings = kopf.OperatorSettings()
    settings.process.ultimate_exiting_timeout = 60
    settings.posting.enabled = False
    settings.peering.standalone = True
    # It would list namespaces and CustomResourceDefinitions, which takes rights on the cluster.
    settings.scanning.disabled = True
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.networking.error_backoffs = _Backoffs()
    # So long each object that was listed stays in memory whole. With 0 kopf's workers never end.
    settings.queueing.idle_timeout = 0.1
    settings.queueing.error_delays = (1, 1, 2, 3, 5, 8, 13, 21, 30)
    settings.execution.default_backoff = 5
    settings.persistence.diffbase_storage = _NothingToCompare()
    settings.watching.server_timeout = WATCH_SECONDS
    settings.watching.client_timeout = WATCH_SECONDS + 30
    settings.watching.connect_timeout = 10
    settings.watching.inactivity_timeout = SILENCE_SECONDS
    # A page is in memory whole, three times over: as bytes, as text and as objects.
    settings.watching.chunk_size = 100
    managed = f"{names.LABEL_MANAGED_BY}={names.MANAGED_BY}"
    settings.watching.label_selectors["batch", "v1", "jobs"] = managed
    settings.watching.label_selectors["", "v1", "pods"] = managed
    return settings


async def watch(registry: kopf.OperatorRegistry, namespaces: Sequence[str]) -> None:
    """Watch until SIGTERM or SIGINT; raises if kopf cannot go on."""
    await kopf.operator(
        registry=registry,
        settings=build_settings(),
        clusterwide=not namespaces,
        namespaces=namespaces,
        standalone=True,
    )


def _object(event: kopf.RawEvent) -> Object:
    return dict(event["object"])
