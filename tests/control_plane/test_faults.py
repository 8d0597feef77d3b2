"""Runs beside a server that fails, drops and repeats, and an operator that is killed.

Each run is compared with one that nothing happened to: the same status but for its times, and the
same Jobs, each made once. All faults are at work at the same time, each on runs of its own; faults
of watches and kills hit all runs of an operator, so each of these has an operator of its own.
"""

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from http import HTTPStatus
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fake_cluster import report_for
from fault_proxy import (
    FaultProxy,
    Hold,
    Kill,
    Lose,
    Refuse,
    StreamFault,
    WatchFaults,
    WriteFault,
    cut,
    delay,
    duplicate,
    gone,
    reorder,
)
from local_cluster.api import Cluster
from manifest_cases import edited
from operator_process import OperatorProcess
from pod_programs import Ended, Runs
from stagetune_api import names
from stagetune_api.stage import StageConfig
from stand_in_kubelet import StandInKubelet

pytestmark = pytest.mark.control_plane

Object = dict[str, Any]

SECONDS = 300
"""From the first run to the end of the last; two cores that are free take a quarter of it."""
TASKS = ("prepare", "01-layers-0-1", "02-layers-2-3", "evaluate", "export")
CAPACITY = {"cpu": "640", "memory": "5Ti", "pods": "5000", "nvidia.com/gpu": "500"}
TIMES = {
    "startTime",
    "completionTime",
    "lastTransitionTime",
    "queuedSeconds",
    "handoffSeconds",
    "gpuSeconds",
}
MOST_WRITES = 40
"""More than a run has, with what is tried again."""
FEWEST_WRITES = 11
"""So many a run has at least: its plan, five Jobs, and the status after each."""
STEP = 4
"""A run meets a fault at every fourth write; four runs meet it at each of them. A Job that is
refused is tried again three writes later, and being refused twice it is left for 30 seconds."""
KILL_STEP = 5
GATHER_SECONDS = 0.5

REFUSALS = {
    "conflict": Refuse(status=HTTPStatus.CONFLICT, reason="Conflict"),
    "invalid": Refuse(status=HTTPStatus.UNPROCESSABLE_ENTITY, reason="Invalid"),
    "throttled": Refuse(
        status=HTTPStatus.TOO_MANY_REQUESTS, reason="TooManyRequests", retry_after=1
    ),
    "broken": Refuse(status=HTTPStatus.INTERNAL_SERVER_ERROR, reason="InternalError"),
}
WRITE_FAULTS: Mapping[str, WriteFault] = {
    **REFUSALS,
    "lost-before": Lose(is_done=False),
    "lost-after": Lose(is_done=True),
}
HOLD = Hold(seconds=11)
"""More than the operator waits for an answer."""
HELD_WRITES = ((1, 9), (3, 12), (5, 15))
KILLS = {"killed-before": Kill(is_done=False), "killed-after": Kill(is_done=True)}
STREAM_FAULTS: Mapping[str, StreamFault] = {
    "cut": cut,
    "duplicate": duplicate,
    "reorder": reorder,
    "delay": delay,
    "gone": gone,
}
WATCH_FAULTS = (*STREAM_FAULTS, "refused", "stale")


def succeed(pod: Object) -> Runs:
    text = pod["metadata"]["annotations"][names.ANNOTATION_STAGE_CONFIG]
    report = report_for(StageConfig.model_validate_json(text))
    return Runs(seconds=0.2, then=Ended(message=report.termination_message()))


@dataclass(frozen=True, kw_only=True)
class Site:
    """A namespace with an operator that reaches the server through a proxy."""

    cluster: Cluster
    namespace: str
    proxy: FaultProxy
    operator: OperatorProcess

    def apply(self, runs: Sequence[str]) -> None:
        documents = [
            edited(
                {
                    "metadata.name": name,
                    "metadata.namespace": self.namespace,
                    "metadata.uid": None,
                    "spec.dataset.source": "pvc://shared/finance.jsonl",
                    "spec.schedule": {"layersPerStage": 2},
                    "spec.runtime": {"resources": {"limits": {"nvidia.com/gpu": 1}}},
                    "spec.storage": {"claimName": "shared"},
                }
            )
            for name in runs
        ]
        listed = {"apiVersion": "v1", "kind": "List", "items": documents}
        self.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(listed))

    def await_end(self, name: str, deadline: float) -> Object:
        """Return the status of a run that has succeeded, without times and its own names."""
        path = f"/apis/{names.API_VERSION}/namespaces/{self.namespace}/{names.PLURAL}/{name}"
        while True:
            run = self.cluster.request("GET", path).body
            status = run.get("status", {})
            if status.get("state") == "Succeeded":
                text = json.dumps(_timeless(status)).replace(status["directory"], "DIRECTORY")
                found: Object = json.loads(text)
                return found
            assert time.monotonic() < deadline, (
                f"{name} is not done: {json.dumps(status)[-2500:]}\n"
                f"{self.proxy.of(name)[-12:]}\n{self.log[-3000:]}"
            )
            time.sleep(0.2)

    def jobs(self, name: str) -> set[str]:
        path = f"/apis/batch/v1/namespaces/{self.namespace}/jobs"
        answer = self.cluster.request("GET", f"{path}?labelSelector={names.LABEL_RUN}%3D{name}")
        return {job["metadata"]["name"] for job in answer.body["items"]}

    @property
    def log(self) -> str:
        return Path(self.operator.log).read_text()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(item) for name, item in value.items() if name not in TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


class Sites:
    """All of them, with their runs on the way."""

    def __init__(self, cluster: Cluster, scratch: Path, stack: ExitStack) -> None:
        self._cluster = cluster
        self._scratch = scratch
        self._stack = stack
        self.started = time.monotonic()

    @property
    def deadline(self) -> float:
        return self.started + SECONDS

    def open(self, name: str, **settings: str) -> Site:
        """Start an operator of its own; it serves a little later."""
        made = self._cluster.request(
            "POST", "/api/v1/namespaces", {"metadata": {"generateName": f"stagetune-{name}-"}}
        )
        assert made.status == HTTPStatus.CREATED, made.message
        namespace = made.body["metadata"]["name"]
        self._stack.callback(self._cluster.request, "DELETE", f"/api/v1/namespaces/{namespace}")
        self._bind_claim(namespace)
        folder = self._scratch / name
        folder.mkdir()
        proxy = self._stack.enter_context(FaultProxy(self._cluster.kubeconfig, folder))
        operator = OperatorProcess(
            proxy.kubeconfig,
            folder / "operator.log",
            {"NAMESPACES": namespace, "RETRY_DELAY_SECONDS": "0.1", **settings},
        )
        self._stack.callback(operator.end)
        operator.start(wait=False)
        return Site(cluster=self._cluster, namespace=namespace, proxy=proxy, operator=operator)

    def _bind_claim(self, namespace: str) -> None:
        size = {"storage": "1Gi"}
        common = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
        volume = {
            "hostPath": {"path": "/nowhere"},
            "capacity": size,
            "claimRef": {"namespace": namespace, "name": "shared"},
        }
        claim = {"resources": {"requests": size}, "volumeName": namespace}
        for kind, metadata, spec in (
            ("PersistentVolume", {"name": namespace}, volume),
            ("PersistentVolumeClaim", {"name": "shared", "namespace": namespace}, claim),
        ):
            head = {"apiVersion": "v1", "kind": kind, "metadata": metadata}
            document = {**head, "spec": {**common, **spec}}
            self._cluster.kubectl("apply", "-f", "-", stdin=json.dumps(document))
        self._stack.callback(
            self._cluster.request, "DELETE", f"/api/v1/persistentvolumes/{namespace}"
        )


class Killer:
    """Kills an operator whenever its proxy wants that, and starts it again."""

    def __init__(self, site: Site) -> None:
        self.kills = 0
        self.error: Exception | None = None
        self._site = site
        self._is_over = threading.Event()
        # An operator ends with the thread that started it: this one lives as long as the test.
        self._thread = threading.Thread(target=self._run, name="killer", daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._is_over.set()
        self._thread.join(60)
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._is_over.is_set():
                if not self._site.proxy.kill_wanted.wait(0.1):
                    continue
                # Others come to their own kill meanwhile: one serves them all.
                time.sleep(GATHER_SECONDS)
                self._site.operator.kill()
                self._site.proxy.kill_wanted.clear()
                self.kills += 1
                self._site.operator.start(wait=False)
            self._site.operator.end()
        except Exception as error:  # noqa: BLE001  it is raised in the test's thread
            self.error = error


@dataclass(frozen=True, kw_only=True)
class World:
    """What the tests look at."""

    sites: Mapping[str, Site]
    killer: Killer
    deadline: float
    reference: Object
    """The status that a run ends with that nothing happened to."""


@pytest.fixture(scope="module")
def world(cluster: Cluster, crd: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    scratch = tmp_path_factory.mktemp("faults")
    with ExitStack() as stack:
        stack.enter_context(
            StandInKubelet(cluster.kubeconfig, succeed, node="faults-node", capacity=CAPACITY)
        )
        opened = Sites(cluster, scratch, stack)
        sites = {"writes": opened.open("writes", WORKERS="32")}
        sites["kills"] = opened.open("kills", WORKERS="32")
        killer = Killer(sites["kills"])
        stack.callback(killer.end)
        for fault in WATCH_FAULTS:
            sites[fault] = opened.open(fault)
            sites[fault].proxy.watch_faults = watch_faults(fault)
            sites[fault].apply([f"{fault}-{number}" for number in range(2)])
        plan_write_faults(sites["writes"])
        plan_kills(sites["kills"])
        reference = sites["writes"].await_end("calm", opened.deadline)
        yield World(sites=sites, killer=killer, deadline=opened.deadline, reference=reference)


def watch_faults(fault: str) -> WatchFaults:
    if fault == "refused":
        return WatchFaults(refusals=3, stream=cut)
    if fault == "stale":
        return WatchFaults(stale_lists=6, stream=gone)
    return WatchFaults(stream=STREAM_FAULTS[fault])


def plan_write_faults(site: Site) -> None:
    for name, fault in WRITE_FAULTS.items():
        for first in range(STEP):
            for number in range(1 + first, MOST_WRITES, STEP):
                site.proxy.write_faults[f"{name}-{first}", number] = fault
    for index, numbers in enumerate(HELD_WRITES):
        for number in numbers:
            site.proxy.write_faults[f"held-{index}", number] = HOLD
    site.apply(["calm", *sorted({run for run, _ in site.proxy.write_faults})])


def plan_kills(site: Site) -> None:
    for name, fault in KILLS.items():
        for first in range(KILL_STEP):
            for number in range(1 + first, MOST_WRITES, KILL_STEP):
                site.proxy.write_faults[f"{name}-{first}", number] = fault
    site.apply(sorted({run for run, _ in site.proxy.write_faults}))


def assert_as_if_nothing_happened(world: World, site: Site, run: str) -> None:
    assert site.await_end(run, world.deadline) == world.reference
    expected = {f"{run}-{task}" for task in TASKS}
    assert site.jobs(run) == expected
    accepted = [write for write in site.proxy.of(run) if write.is_accepted]
    made = [write.name for write in accepted if write.resource == "jobs"]
    assert sorted(made) == sorted(expected), "each Job is made once"
    assert [write.verb for write in accepted if write.resource == "configmaps"] == ["create"]
    written = [write.body["status"] for write in accepted if write.resource.endswith("/status")]
    assert all(one != other for one, other in pairwise(written)), "each write changes something"
    events = [write.body for write in accepted if write.resource == "events"]
    told = {(event["reason"], event["message"]) for event in events}
    assert len(told) == len(events), "nothing is told twice"


@pytest.mark.parametrize("fault", WRITE_FAULTS)
def test_write_that_goes_wrong_changes_nothing_of_what_a_run_becomes(
    world: World, fault: str
) -> None:
    site = world.sites["writes"]
    met = set()
    for first in range(STEP):
        run = f"{fault}-{first}"
        assert_as_if_nothing_happened(world, site, run)
        met |= {write.number for write in site.proxy.of(run) if write.fault is not None}
    assert met >= set(range(1, FEWEST_WRITES + 1))


def test_answer_that_comes_too_late_is_no_second_job(world: World) -> None:
    site = world.sites["writes"]
    for index, numbers in enumerate(HELD_WRITES):
        run = f"held-{index}"
        assert_as_if_nothing_happened(world, site, run)
        held = [write.number for write in site.proxy.of(run) if write.fault is not None]
        assert held == list(numbers)


@pytest.mark.parametrize("moment", KILLS)
def test_operator_that_is_killed_at_any_write_goes_on_where_it_was(
    world: World, moment: str
) -> None:
    site = world.sites["kills"]
    met = set()
    for first in range(KILL_STEP):
        run = f"{moment}-{first}"
        assert_as_if_nothing_happened(world, site, run)
        met |= {write.number for write in site.proxy.of(run) if write.fault is not None}
    assert met >= set(range(1, FEWEST_WRITES + 1))
    assert world.killer.kills >= KILL_STEP


@pytest.mark.parametrize("fault", WATCH_FAULTS)
def test_watch_that_goes_wrong_holds_no_run_up(world: World, fault: str) -> None:
    site = world.sites[fault]
    for number in range(2):
        assert_as_if_nothing_happened(world, site, f"{fault}-{number}")
    assert site.proxy.watch_faults.count >= 3


def test_no_fault_is_an_error_of_the_program(world: World) -> None:
    for name, site in world.sites.items():
        assert "Traceback" not in site.log, f"{name}: {site.log[-4000:]}"
