"""A node for a control plane without one: pods are scheduled to it, and end as a test says.

It keeps a Node Ready, takes the pods that the real scheduler binds to it and writes their status as
a kubelet does, so that the real Job controller acts on it. No container is run: a `Program` says
when and how a pod's container ends. A program may do real work, start the trainer for one.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio.config import new_client_from_config

from pod_programs import KILLED, Ended, NeverStarts, Program, Runs, Script
from stagetune_operator.connection import open_watch_session

Object = dict[str, Any]

CAPACITY = {"cpu": "64", "memory": "512Gi", "pods": "500", "nvidia.com/gpu": "16"}
LEASE_SECONDS = 40
START_SECONDS = 60


class StandInKubelet:
    """The node, as a context: it is Ready on entry and gone after the exit."""

    def __init__(
        self,
        kubeconfig: Path,
        script: Script = lambda pod: Runs(),
        *,
        node: str = "stand-in",
        capacity: dict[str, str] = CAPACITY,
    ) -> None:
        self.node = node
        self.script = script
        self._kubeconfig = kubeconfig
        self._capacity = capacity
        self._thread = threading.Thread(target=self._run, name=f"kubelet {node}", daemon=True)
        self._is_ready = threading.Event()
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Event | None = None

    def __enter__(self) -> "StandInKubelet":
        self._thread.start()
        if not self._is_ready.wait(START_SECONDS):
            raise TimeoutError(f"node {self.node} was not registered")
        self._raise_error()
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._ending is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(START_SECONDS)
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise RuntimeError(f"node {self.node} failed") from self._error

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001  it is raised in the test's thread
            self._error = error
        finally:
            self._is_ready.set()

    async def _main(self) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        client = await new_client_from_config(config_file=str(self._kubeconfig))
        server, session = open_watch_session(
            client, on_list=_ignore, on_watch=_ignore, on_refusal=_ignore
        )
        async with client, session:
            node = _Node(_Api(server, session), self.node, lambda pod: self.script(pod))
            await node.register(self._capacity)
            try:
                self._is_ready.set()
                work = [asyncio.create_task(node.renew_lease()), asyncio.create_task(node.watch())]
                ending = asyncio.create_task(self._ending.wait())
                done, _ = await asyncio.wait([*work, ending], return_when="FIRST_COMPLETED")
                for task in (*work, ending, *node.tasks.values()):
                    task.cancel()
                await asyncio.gather(*work, *node.tasks.values(), return_exceptions=True)
                for task in done - {ending}:
                    task.result()
            finally:
                await node.deregister()


class _Api:
    """The API server as a node sees it."""

    def __init__(self, server: str, session: aiohttp.ClientSession) -> None:
        self._server = server
        self._session = session

    async def send(
        self, method: str, path: str, body: Object | None = None, patch: str = "merge"
    ) -> tuple[int, Object]:
        kind = f"application/{patch}-patch+json" if method == "PATCH" else "application/json"
        data = None if body is None else json.dumps(body)
        async with self._session.request(
            method, self._server + path, data=data, headers={"Content-Type": kind}
        ) as response:
            return response.status, await response.json()

    async def demand(
        self, method: str, path: str, body: Object | None = None, patch: str = "merge"
    ) -> Object:
        status, answer = await self.send(method, path, body, patch)
        if not 200 <= status < 300:
            raise RuntimeError(f"{method} {path}: {status} {answer.get('message')}")
        return answer

    async def events(self, path: str) -> AsyncIterator[tuple[str, Object]]:
        """Yield what a watch brings until the server ends it."""
        timeout = aiohttp.ClientTimeout(total=None, sock_read=120)
        async with self._session.get(self._server + path, timeout=timeout) as response:
            response.raise_for_status()
            async for line in response.content:
                event = json.loads(line)
                yield event["type"], event["object"]


class _Node:
    """The Node object and the pods on it."""

    def __init__(self, api: _Api, name: str, script: Script) -> None:
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._api = api
        self._name = name
        self._script = script
        self._stops: dict[str, asyncio.Event] = {}
        self._lease = f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{name}"

    async def register(self, capacity: dict[str, str]) -> None:
        labels = {"kubernetes.io/hostname": self._name, "kubernetes.io/os": "linux"}
        node = {"kind": "Node", "apiVersion": "v1"}
        metadata = {"name": self._name, "labels": labels}
        await self._api.demand("POST", "/api/v1/nodes", {**node, "metadata": metadata})
        conditions = [
            _condition("Ready", True, reason="KubeletReady"),
            *(_condition(f"{what}Pressure", False) for what in ("Memory", "Disk", "PID")),
        ]
        status = {"capacity": capacity, "allocatable": capacity, "conditions": conditions}
        path = f"/api/v1/nodes/{self._name}"
        await self._api.demand("PATCH", f"{path}/status", {"status": status}, "strategic-merge")
        lease = {
            "metadata": {"name": self._name},
            "spec": {
                "holderIdentity": self._name,
                "leaseDurationSeconds": LEASE_SECONDS,
                "renewTime": _now(timespec="microseconds"),
            },
        }
        await self._api.demand("POST", self._lease.rpartition("/")[0], lease)
        # The controllers keep a new node tainted until they have seen that it is ready.
        while (await self._api.demand("GET", path))["spec"].get("taints"):
            await asyncio.sleep(0.05)

    async def deregister(self) -> None:
        await self._api.send("DELETE", f"/api/v1/nodes/{self._name}")
        await self._api.send("DELETE", self._lease)

    async def renew_lease(self) -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / 4)
            renewed = {"spec": {"renewTime": _now(timespec="microseconds")}}
            await self._api.demand("PATCH", self._lease, renewed)

    async def watch(self) -> None:
        path = f"/api/v1/pods?fieldSelector=spec.nodeName%3D{self._name}"
        while True:
            listed = await self._api.demand("GET", path)
            for pod in listed["items"]:
                self._take(pod)
            version = listed["metadata"]["resourceVersion"]
            query = f"&watch=true&timeoutSeconds=60&resourceVersion={version}"
            async for kind, pod in self._api.events(path + query):
                if kind == "ERROR":
                    break
                if kind != "DELETED":
                    self._take(pod)

    def _take(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        stop = self._stops.setdefault(uid, asyncio.Event())
        if "deletionTimestamp" in pod["metadata"]:
            stop.set()
        if uid not in self.tasks:
            self.tasks[uid] = asyncio.create_task(self._serve(pod, stop))

    async def _serve(self, pod: Object, stop: asyncio.Event) -> None:
        """Bring the pod from its scheduling to its end, and away once it is to be deleted."""
        if pod["status"].get("phase", "Pending") == "Pending":
            program = self._script(pod)
            started = _now()
            if isinstance(program, NeverStarts):
                waiting = {"waiting": {"reason": program.reason, "message": program.message}}
                await self._report(pod, "Pending", waiting)
                await stop.wait()
                ended = Ended(exit_code=KILLED, reason="ContainerStatusUnknown")
            else:
                await self._report(pod, "Running", {"running": {"startedAt": started}})
                ended = await _ended(program, pod, stop)
            await self._report_end(pod, started, ended)
        await stop.wait()
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
        await self._api.send("DELETE", _pod_path(pod), options)

    async def _report_end(self, pod: Object, started: str, ended: Ended) -> None:
        well = ended.exit_code == 0
        terminated = {
            "exitCode": ended.exit_code,
            "reason": ended.reason or ("Completed" if well else "Error"),
            "startedAt": started,
            "finishedAt": _now(),
            **({"message": ended.message} if ended.message else {}),
        }
        conditions = []
        if ended.disruption is not None:
            conditions = [_condition("DisruptionTarget", True, reason=ended.disruption)]
        phase = "Succeeded" if well else "Failed"
        await self._report(pod, phase, {"terminated": terminated}, conditions)

    async def _report(
        self, pod: Object, phase: str, state: Object, conditions: list[Object] | None = None
    ) -> None:
        is_running = "running" in state
        status = {
            "phase": phase,
            "startTime": pod["metadata"]["creationTimestamp"],
            "conditions": [
                *(conditions or []),
                *(_condition(what, is_running) for what in ("Ready", "ContainersReady")),
            ],
            "containerStatuses": [
                {
                    "name": container["name"],
                    "image": container["image"],
                    "imageID": "",
                    "ready": is_running,
                    "restartCount": 0,
                    "state": state,
                }
                for container in pod["spec"]["containers"]
            ],
        }
        body = {"metadata": {"uid": pod["metadata"]["uid"]}, "status": status}
        status_code, answer = await self._api.send(
            "PATCH", f"{_pod_path(pod)}/status", body, "strategic-merge"
        )
        # Somebody may have taken it away by force.
        if status_code not in (200, 404, 409):
            raise RuntimeError(f"pod {pod['metadata']['name']}: {answer.get('message')}")


async def _ended(program: Program, pod: Object, stop: asyncio.Event) -> Ended:
    """Return how the program ends by itself, when it is asked to, or by force after the grace."""
    running = asyncio.ensure_future(program(pod, stop))
    asked = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([running, asked], return_when="FIRST_COMPLETED")
        if not running.done():
            grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
            await asyncio.wait([running], timeout=grace)
        return running.result() if running.done() else Ended(exit_code=KILLED)
    finally:
        asked.cancel()
        running.cancel()


def _ignore(path: str) -> None:
    """Take no notice: a node has no probe."""


def _pod_path(pod: Object) -> str:
    metadata = pod["metadata"]
    return f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"


def _condition(type: str, holds: bool, reason: str = "") -> Object:
    condition = {"type": type, "status": str(holds), "lastTransitionTime": _now()}
    return {**condition, "reason": reason} if reason else condition


def _now(timespec: str = "seconds") -> str:
    return datetime.now(UTC).isoformat(timespec=timespec).replace("+00:00", "Z")
