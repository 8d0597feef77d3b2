"""Between an operator and its API server: answers that go wrong, at the write or watch one names.

The operator gets a kubeconfig that leads here and holds no credentials. Every write is numbered
within its run, so that a fault hits the same step of a run however the runs interleave. What the
server really did is noted beside what the operator was told.
"""

import asyncio
import contextlib
import json
import random
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from kubernetes.aio.config import new_client_from_config
from yarl import URL

from stagetune_api import names
from stagetune_operator.connection import open_watch_session

Object = dict[str, Any]

START_SECONDS = 30
LONGEST_HOLD_SECONDS = 60
"""How long a request may be held whose operator is to be killed, before the test has failed."""
REORDER_SECONDS = 0.3
_WRITES = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_PASSED_ON = ("Accept", "Content-Type", "User-Agent")
_PASSED_BACK = ("Content-Type", "Retry-After")


@dataclass(frozen=True, kw_only=True)
class Refuse:
    """The server is not asked, and this is the answer."""

    status: HTTPStatus
    reason: str = ""
    retry_after: int | None = None


@dataclass(frozen=True, kw_only=True)
class Lose:
    """The connection breaks off: before the server was asked, or after it has done the write."""

    is_done: bool


@dataclass(frozen=True, kw_only=True)
class Hold:
    """The write is done, and the answer comes after so many seconds: later than is waited for."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class Kill:
    """The operator is to be killed before the write, or once the server has done it."""

    is_done: bool


WriteFault = Refuse | Lose | Hold | Kill


@dataclass(kw_only=True)
class Write:
    """A write that the operator sent."""

    run: str
    number: int
    """Which of the run's writes it is, from 1."""
    verb: str
    resource: str
    """`jobs`, `stagedfinetunes/status`, `events`, `configmaps`."""
    name: str
    body: Object = field(repr=False)
    fault: WriteFault | None = None
    answer: int | None = None
    """What the server answered; None if it was not asked."""

    @property
    def is_accepted(self) -> bool:
        """Whether the server did it."""
        return self.answer is not None and 200 <= self.answer < 300


Events = AsyncIterator[bytes]
"""Lines of a watch, each an event."""
StreamFault = Callable[[Events, random.Random], Events]
"""What becomes of the events of one watch; the watch is broken off where it ends."""


async def cut(events: Events, dice: random.Random) -> Events:
    """Break off after a few events."""
    left = dice.randint(1, 6)
    async for event in events:
        yield event
        left -= 1
        if not left:
            return


async def duplicate(events: Events, dice: random.Random) -> Events:
    """Bring every other event twice."""
    async for event in events:
        yield event
        if dice.random() < 0.5:
            yield event


async def delay(events: Events, dice: random.Random) -> Events:
    """Bring everything late; what comes later waits for what came before."""
    async for event in events:
        await asyncio.sleep(dice.uniform(0, 0.2))
        yield event


async def gone(events: Events, dice: random.Random) -> Events:
    """Say after a few events that the watch is too old to go on."""
    async for event in cut(events, dice):
        yield event
    answer = _failure(HTTPStatus.GONE, "Expired", "too old resource version")
    yield json.dumps({"type": "ERROR", "object": answer}).encode() + b"\n"


async def reorder(events: Events, dice: random.Random) -> Events:
    """Bring every other event after some that came later, those of the same object too."""
    waiting: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def pump() -> None:
        async for event in events:
            waiting.put_nowait(event)
        waiting.put_nowait(None)

    pumping = asyncio.create_task(pump())
    held: list[bytes] = []
    try:
        while True:
            try:
                event = await asyncio.wait_for(waiting.get(), REORDER_SECONDS if held else None)
            except TimeoutError:
                event = held.pop()
            if event is None:
                break
            if len(held) < 3 and dice.random() < 0.5:
                held.append(event)
                continue
            yield event
            dice.shuffle(held)
            while held:
                yield held.pop()
    finally:
        pumping.cancel()
        with contextlib.suppress(asyncio.CancelledError, aiohttp.ClientError):
            await pumping


@dataclass(kw_only=True)
class WatchFaults:
    """What goes wrong with watches, and how often; counted down as it happens."""

    stream: StreamFault | None = None
    refusals: int = 0
    """So many watches are not let in: the server is busy."""
    stale_lists: int = 0
    """So many lists that a watch begins anew with are answered with what was there at first."""
    count: int = 0
    """How many watches have met a fault."""


class FaultProxy:
    """The proxy, as a context; it may be told of faults as long as it stands."""

    def __init__(self, kubeconfig: Path, directory: Path, *, seed: int = 0) -> None:
        """`kubeconfig` leads to the server; the operator's own is written to `directory`."""
        self.kubeconfig = directory / "faulty.json"
        self.writes: list[Write] = []
        self.write_faults: dict[tuple[str, int], WriteFault] = {}
        """By the run and the number of its write; a fault is taken out as it happens."""
        self.watch_faults = WatchFaults()
        self.kill_wanted = threading.Event()
        """Set while a write is held for the operator to be killed."""
        self._upstream = kubeconfig
        self._dice = random.Random(seed)
        self._first_lists: dict[str, web.Response] = {}
        self._job_runs: dict[str, str] = {}
        self._is_ready = threading.Event()
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="fault proxy", daemon=True)
        self._server = ""
        self._session: aiohttp.ClientSession

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        if not self._is_ready.wait(START_SECONDS):
            raise TimeoutError("the proxy does not listen")
        self._raise_error()
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._ending is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(START_SECONDS)
        self._raise_error()

    def of(self, run: str) -> list[Write]:
        """Return the writes of a run, in order."""
        return [write for write in list(self.writes) if write.run == run]

    def _raise_error(self) -> None:
        if self._error is not None:
            raise RuntimeError("the proxy failed") from self._error

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001  it is raised in the test's thread
            self._error = error
        finally:
            self._is_ready.set()

    async def _main(self) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        client = await new_client_from_config(config_file=str(self._upstream))
        self._server, self._session = open_watch_session(
            client, on_list=_ignore, on_watch=_ignore, on_refusal=_ignore
        )
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        async with client, self._session:
            await runner.setup()
            try:
                site = web.TCPSite(runner, "127.0.0.1", 0)
                await site.start()
                port = runner.addresses[0][1]
                self.kubeconfig.write_text(json.dumps(_kubeconfig(f"http://127.0.0.1:{port}")))
                self._is_ready.set()
                await self._ending.wait()
            finally:
                await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        try:
            if request.query.get("watch") == "true":
                return await self._watch(request)
            if request.method in _WRITES and not request.path.endswith("/tokenreviews"):
                return await self._write(request, body)
            return await self._read(request, body)
        except (aiohttp.ClientError, ConnectionError):
            # The server is away, or whoever asked.
            return _break_off(request)

    async def _forward(self, request: web.Request, body: bytes) -> web.Response:
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        url = URL(self._server + request.raw_path, encoded=True)
        async with self._session.request(
            request.method, url, data=body or None, headers=headers
        ) as answer:
            back = {name: answer.headers[name] for name in _PASSED_BACK if name in answer.headers}
            return web.Response(status=answer.status, body=await answer.read(), headers=back)

    async def _read(self, request: web.Request, body: bytes) -> web.Response:
        if not _is_list_of_a_watch(request):
            return await self._forward(request, body)
        first = self._first_lists.get(request.path)
        if first is not None and self.watch_faults.stale_lists:
            self.watch_faults.stale_lists -= 1
            self.watch_faults.count += 1
            return web.Response(body=first.body, headers={"Content-Type": "application/json"})
        answer = await self._forward(request, body)
        if answer.status == HTTPStatus.OK:
            self._first_lists.setdefault(request.path, answer)
        return answer

    async def _write(self, request: web.Request, body: bytes) -> web.StreamResponse:
        write = self._note(request, json.loads(body) if body else {})
        match write.fault:
            case Refuse(status=status, reason=reason, retry_after=seconds):
                headers = {} if seconds is None else {"Retry-After": str(seconds)}
                failure = _failure(status, reason, "refused by the fault proxy")
                return web.json_response(failure, status=status, headers=headers)
            case Lose(is_done=False):
                return _break_off(request)
            case Kill(is_done=False):
                return await self._await_kill(request)
        answer = await self._forward(request, body)
        write.answer = answer.status
        match write.fault:
            case Lose():
                return _break_off(request)
            case Hold(seconds=held):
                await asyncio.sleep(held)
            case Kill():
                return await self._await_kill(request)
        return answer

    def _note(self, request: web.Request, body: Object) -> Write:
        """Number a write within its run, and see what is to become of it."""
        parts = request.path.partition("/namespaces/")[2].split("/")[1:]
        resource = "/".join([parts[0], *parts[2:]])
        metadata = body.get("metadata") or {}
        name = parts[1] if len(parts) > 1 else str(metadata.get("name", ""))
        labelled = (metadata.get("labels") or {}).get(names.LABEL_RUN)
        involved = (body.get("involvedObject") or {}).get("name")
        if resource == "jobs" and labelled:
            self._job_runs[name] = labelled
        run = str(labelled or involved or self._job_runs.get(name, name))
        number = 1 + len(self.of(run))
        write = Write(
            run=run,
            number=number,
            verb=_WRITES[request.method],
            resource=resource,
            name=name,
            body=body,
            fault=self.write_faults.pop((run, number), None),
        )
        self.writes.append(write)
        return write

    async def _await_kill(self, request: web.Request) -> web.StreamResponse:
        """Have the operator killed, and hold the request until its connection is gone."""
        self.kill_wanted.set()
        async with asyncio.timeout(LONGEST_HOLD_SECONDS):
            while request.transport is not None and not request.transport.is_closing():
                await asyncio.sleep(0.02)
        return web.Response()

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        faults = self.watch_faults
        if faults.refusals:
            faults.refusals -= 1
            faults.count += 1
            busy = HTTPStatus.SERVICE_UNAVAILABLE
            failure = _failure(busy, "ServiceUnavailable", "refused by the fault proxy")
            return web.json_response(failure, status=busy)
        url = URL(self._server + request.raw_path, encoded=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_read=120)
        async with self._session.get(url, timeout=timeout) as answer:
            back = web.StreamResponse(status=answer.status)
            back.content_type = answer.content_type
            await back.prepare(request)
            events: Events = aiter(answer.content)
            if faults.stream is not None and answer.status == HTTPStatus.OK:
                faults.count += 1
                events = faults.stream(events, random.Random(self._dice.random()))
            async for line in events:
                await back.write(line)
        if faults.stream is not None:
            return _break_off(request)
        return back


def _is_list_of_a_watch(request: web.Request) -> bool:
    """Whether it is the list before a watch; what is read of one run alone names the run."""
    is_of_a_run = f"{names.LABEL_RUN}=" in request.query.get("labelSelector", "")
    is_of_metadata = "PartialObjectMetadata" in request.headers.get("Accept", "")
    is_collection = request.path.rpartition("/")[2] in (names.PLURAL, "jobs", "pods")
    return request.method == "GET" and is_collection and not (is_of_a_run or is_of_metadata)


def _break_off(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _failure(status: HTTPStatus, reason: str, message: str) -> Object:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": int(status),
    }


def _kubeconfig(server: str) -> Object:
    name = "faulty"
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": {"server": server}}],
        "users": [{"name": name, "user": {}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "current-context": name,
    }


def _ignore(path: str) -> None:
    """Take no notice: the operator looks at its own watches."""
