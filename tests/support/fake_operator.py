"""An operator over a cluster in memory, pass by pass, with a clock of its own."""

import asyncio
from collections.abc import Mapping
from typing import Any

from fake_cluster import CrashError, FakeCluster, Script, succeeds
from manifest_cases import edited
from stagetune_api.report import FailureClass
from stagetune_api.status import StagedFineTuneStatus
from stagetune_operator.keys import RunKey
from stagetune_operator.reconcile import Reconciler
from stagetune_operator.records import read_status
from stagetune_operator.settings import Settings

KEY = RunKey("team-a", "finance-qa")
CLUSTER = {
    "spec.dataset.source": "pvc://rows/finance.jsonl",
    "spec.schedule": {"layersPerStage": 2},
    "spec.runtime": {"resources": {"limits": {"nvidia.com/gpu": 1, "memory": "8Gi"}}},
    "spec.storage": {"size": "10Gi"},
}
STAGES = ("01-layers-0-1", "02-layers-2-3")
TASKS = ("prepare", *STAGES, "evaluate", "export")


class Counts:
    """An observer that counts."""

    def __init__(self) -> None:
        self.stages: list[float] = []
        self.handoffs: list[float] = []
        self.failures: list[FailureClass] = []

    def observe_stage(self, seconds: float) -> None:
        self.stages.append(seconds)

    def observe_handoff(self, seconds: float) -> None:
        self.handoffs.append(seconds)

    def count_failure(self, failure_class: FailureClass) -> None:
        self.failures.append(failure_class)


class Operator:
    """An operator over a fake cluster, with a clock of its own."""

    def __init__(self, cluster: FakeCluster, **settings: Any) -> None:
        self.cluster = cluster
        self.clock = 0.0
        self.observer = Counts()
        self.progress: Mapping[str, Any] = {}
        self._settings = Settings(trainer_image="trainer:test", **settings)
        self.restart()

    def restart(self) -> None:
        """Forget everything that is not on the cluster."""
        self._reconciler = Reconciler(
            cluster=self.cluster,
            store=self.cluster,
            settings=self._settings,
            observer=self.observer,
            progress_of=lambda key: self.progress,
            now=lambda: "2026-01-01T00:00:00Z",
            monotonic=lambda: self.clock,
        )
        self.cluster.stage_file_for = lambda uid: self._reconciler.stage_file_for(KEY, uid)

    def reconcile(self) -> float | None:
        """Do one pass."""
        return asyncio.run(self._reconciler.reconcile(KEY))

    def settle(self) -> None:
        """Do passes until one has nothing to do."""
        for _ in range(20):
            before = len(self.cluster.writes)
            self.reconcile()
            if len(self.cluster.writes) == before:
                return
        raise AssertionError("the operator never comes to rest")

    def finish(
        self, script: Script | Mapping[str, Script] = succeeds, *, restarts: bool = False
    ) -> StagedFineTuneStatus:
        """Go on until nothing moves any more, and return the status."""
        for _ in range(60):
            try:
                self.settle()
            except CrashError:
                self._start_again()
                continue
            if restarts:
                self.restart()
            self.clock += 1000
            writes = len(self.cluster.writes)
            moved = self.cluster.advance(script)
            try:
                rest = self.reconcile()
            except CrashError:
                self._start_again()
                continue
            if rest is None and not moved and len(self.cluster.writes) == writes:
                return self.status
        raise AssertionError("the run never comes to an end")

    def _start_again(self) -> None:
        self.cluster.crash_at = None
        self.restart()

    @property
    def status(self) -> StagedFineTuneStatus:
        """The run's status as it is stored."""
        return read_status(self.cluster.run())

    @property
    def jobs(self) -> list[str]:
        """Names of all Jobs, in the order in which they were made."""
        return [job["metadata"]["name"] for job in self.cluster.of_kind("Job")]


def begun(edits: Mapping[str, Any] | None = None, **settings: Any) -> Operator:
    """Return an operator over a cluster with one run."""
    cluster = FakeCluster()
    manifest = edited({**CLUSTER, **(edits or {})})
    cluster.add_run(manifest)
    return Operator(cluster, **settings)


def first_stage_runs(edits: Mapping[str, Any] | None = None, **settings: Any) -> Operator:
    """Return an operator over a run whose first stage's pod is at work."""
    operator = begun(edits, **settings)
    operator.settle()
    operator.cluster.advance()
    operator.settle()
    operator.cluster.start_pods()
    operator.settle()
    assert operator.status.state == "Training"
    return operator


class Posted:
    """What a trainer posted."""

    def __init__(self, pod_uid: str, step: int, eta_seconds: float = 61.4) -> None:
        self.pod_uid = pod_uid
        self.step = step
        self.loss: float | None = 2.5
        self.validation_loss = None
        self.tokens_per_second = 12.0
        self.eta_seconds = eta_seconds
