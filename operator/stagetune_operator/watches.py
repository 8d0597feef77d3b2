"""How the watches are doing: whether the process is of use still, and where they had a gap.

kopf hides bookmarks and lists from its handlers, so the session below it tells. Each watch ends
after `WATCH_SECONDS` and is opened again from where it was, and one that brings nothing for
`SILENCE_SECONDS`, not even a bookmark, is given up before. So a watch that was not opened for
`STALE_SECONDS` is stuck.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from aiohttp import web

WATCH_SECONDS = 100
SILENCE_SECONDS = 70.0
STALE_SECONDS = 180.0
_REACH_SECONDS = 2.0
"""Less than the kubelet waits for a probe."""


class Watches:
    """When each watch was last opened, or refused."""

    def __init__(
        self,
        paths: Iterable[str],
        *,
        on_gap: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`paths` are those that have to be watched.

        `on_gap()` is told when a watch goes on after a list that was not its first: what was
        deleted before the list is not known of.
        """
        self._clock = clock
        self._on_gap = on_gap
        self._opened = dict.fromkeys(paths, clock())
        """When the server last had a word about each."""
        self._unopened = set(self._opened)
        self._listed: set[str] = set()
        self._all_opened = asyncio.Event()

    def note_list(self, path: str) -> None:
        """Take in that the server has begun to answer a list."""
        if path in self._opened and path not in self._unopened:
            self._listed.add(path)

    def note_watch(self, path: str) -> None:
        """Take in that the server has begun to answer a watch."""
        if path in self._opened:
            self._opened[path] = self._clock()
            self._unopened.discard(path)
            if not self._unopened:
                self._all_opened.set()
        if path in self._listed:
            self._listed.discard(path)
            self._on_gap()

    def note_refusal(self, path: str) -> None:
        """Take in that the server does not allow a list or watch: a namespace that is gone, say.

        It is no help to the watch, but a new process would not be let in either.
        """
        if path in self._opened:
            self._opened[path] = self._clock()

    @property
    def are_open(self) -> bool:
        """Whether each was open once, so that everything there is has been listed."""
        return not self._unopened

    async def opened(self, patience_seconds: float) -> None:
        """Return once all are open, or after the patience: a namespace may let nobody in."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_opened.wait(), patience_seconds)

    @property
    def stale(self) -> list[str]:
        """The watches that are stuck."""
        now = self._clock()
        return sorted(path for path, when in self._opened.items() if now - when > STALE_SECONDS)


class HealthEndpoint:
    """`/healthz` for the liveness probe and `/readyz` for the readiness probe.

    Both are answered by the loop that does all the work: one that hangs does not answer in time.
    """

    def __init__(
        self, watches: Watches, is_server_reachable: Callable[[], Awaitable[bool]]
    ) -> None:
        self._watches = watches
        self._is_server_reachable = is_server_reachable

    def application(self) -> web.Application:
        """Return the endpoint as an application."""
        app = web.Application()
        app.router.add_get("/healthz", self._live)
        app.router.add_get("/readyz", self._ready)
        return app

    async def _live(self, _: web.Request) -> web.Response:
        stale = self._watches.stale
        # While the server is away a new process would watch no better, and come back later.
        is_stuck = bool(stale) and await self._answers_soon()
        return _answer(not is_stuck, {"stale": stale})

    async def _answers_soon(self) -> bool:
        try:
            async with asyncio.timeout(_REACH_SECONDS):
                return await self._is_server_reachable()
        except TimeoutError:
            return False

    async def _ready(self, _: web.Request) -> web.Response:
        return _answer(self._watches.are_open, {})


def _answer(is_well: bool, details: dict[str, Any]) -> web.Response:
    body = {"status": "ok" if is_well else "failing", **details}
    return web.json_response(body, status=200 if is_well else 503)
