"""The operator's own metrics, and the last numbers of every run, also when its pods are gone.

Whatever can be read off the store is read when a scrape comes, so that it cannot drift from it;
what happens is counted when it happens.
"""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stagetune_api.report import FailureClass
from stagetune_api.status import RunState, StageState
from stagetune_operator.keys import RunKey
from stagetune_operator.progress import ProgressStore, TaskProgress
from stagetune_operator.store import Store
from stagetune_operator.views import Object

FRESH_SECONDS = 120.0
"""For so long a pod's last word counts for more than the status that was written from it."""

_STAGE_BUCKETS = (60, 300, 900, 1800, 3600, 2 * 3600, 4 * 3600, 8 * 3600, 24 * 3600, 72 * 3600)
_HANDOFF_BUCKETS = (1, 2, 5, 10, 15, 20, 30, 45, 60, 120, 300, 900)
_RECONCILE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)

_RUN_GAUGES: dict[str, tuple[str, str | None, str]] = {
    "loss": ("loss", "loss", "Loss of the last training step, in nats a token."),
    "validation_loss": (
        "validation_loss",
        "validationLoss",
        "Validation loss, last computed, in nats a token.",
    ),
    "general_loss": (
        "general_loss",
        "measured.generalLoss",
        "Loss on text that is not trained on, in nats a token.",
    ),
    "kl_to_base": (
        "kl_to_base",
        "measured.klToBase",
        "KL(base || model) on validation answers, in nats a token.",
    ),
    "learning_rate": ("learning_rate", None, "Learning rate of the last training step."),
    "grad_norm": ("grad_norm", None, "Norm of the stage's gradients before clipping."),
    "tokens_per_second": (
        "tokens_per_second",
        "tokensPerSecond",
        "Tokens a second in training steps, padding left out.",
    ),
    "step": ("step", "step", "Optimizer steps that are done."),
    "planned_steps": ("total_steps", "totalSteps", "Optimizer steps of the plan."),
    "peak_memory_bytes": (
        "peak_memory_bytes",
        "measured.peakMemoryBytes",
        "Most memory that was held: of the GPU where there is one, else of the process.",
    ),
}
"""By the end of the metric's name: the field of TaskProgress, that of a stage's status, the help.
"""


class Metrics:
    """Everything that is counted and measured, in a registry of its own."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        Info("stagetune_operator", "The operator that runs.", registry=self.registry).info(
            {"version": version}
        )
        self._stage_seconds = Histogram(
            "stagetune_stage_seconds",
            "Seconds that a stage's processes took in all, once it has succeeded.",
            buckets=_STAGE_BUCKETS,
            registry=self.registry,
        )
        self._handoff_seconds = Histogram(
            "stagetune_handoff_seconds",
            "Seconds from the end of one stage's container to the next stage's first step.",
            buckets=_HANDOFF_BUCKETS,
            registry=self.registry,
        )
        self._failures = Counter(
            "stagetune_failures",
            "Failures of tasks by their class.",
            ["class"],
            registry=self.registry,
        )
        for failure_class in FailureClass:
            self._failures.labels(failure_class)
        self._reconcile_seconds = Histogram(
            "stagetune_reconcile_seconds",
            "Seconds of one pass over one run.",
            buckets=_RECONCILE_BUCKETS,
            registry=self.registry,
        )
        self._reconcile_errors = Counter(
            "stagetune_reconcile_errors",
            "Passes over a run that ended with an error and are tried again.",
            registry=self.registry,
        )
        self._queue_depth = Gauge(
            "stagetune_queue_depth", "Runs that wait for a worker.", registry=self.registry
        )
        self._api_writes = Counter(
            "stagetune_api_writes",
            "Writes that the API server has accepted.",
            ["kind", "verb"],
            registry=self.registry,
        )
        self._progress_posts = Counter(
            "stagetune_progress_posts",
            "Posts of progress by the HTTP status of the answer.",
            ["result"],
            registry=self.registry,
        )

    def observe_stage(self, seconds: float) -> None:
        """Count a stage that has succeeded."""
        self._stage_seconds.observe(seconds)

    def observe_handoff(self, seconds: float) -> None:
        """Count the hand-over from one stage to the next."""
        self._handoff_seconds.observe(seconds)

    def count_failure(self, failure_class: FailureClass) -> None:
        """Count a failure of a task."""
        self._failures.labels(failure_class).inc()

    def observe_reconcile(self, seconds: float, failed: bool) -> None:
        """Count one pass over one run."""
        self._reconcile_seconds.observe(seconds)
        if failed:
            self._reconcile_errors.inc()

    def count_write(self, kind: str, verb: str) -> None:
        """Count a write that the API server has accepted."""
        self._api_writes.labels(kind, verb).inc()

    def count_post(self, result: str) -> None:
        """Count an answer to a post of progress."""
        self._progress_posts.labels(result).inc()

    def watch_queue(self, depth: Callable[[], int]) -> None:
        """Show how many runs `depth()` says are waiting."""
        self._queue_depth.set_function(depth)

    def watch_runs(self, store: Store, progress: ProgressStore) -> None:
        """Show the states and the last numbers of the runs in `store`."""
        self.registry.register(_RunCollector(store, progress))

    def application(self) -> web.Application:
        """Return `/metrics` as an application."""
        app = web.Application()
        app.router.add_get("/metrics", self._serve)
        return app

    async def _serve(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        # By name, as Prometheus' clients have it: without the runs' own a scrape costs next to
        # nothing.
        wanted = request.query.getall("name[]", [])
        registry = self.registry.restricted_registry(wanted) if wanted else self.registry
        # Read in the loop, where nothing changes meanwhile; with thousands of stages the writing
        # takes longer than the loop may stand still.
        collected = _Collected(list(registry.collect()))
        body = await asyncio.to_thread(encode, collected)
        return web.Response(body=body, headers={"Content-Type": content_type})


class _Collected(Collector):
    """What was collected at one moment."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


class _RunCollector(Collector):
    """Reads the runs off the store."""

    def __init__(self, store: Store, progress: ProgressStore) -> None:
        self._store = store
        self._progress = progress

    def collect(self) -> Iterator[GaugeMetricFamily]:
        counts = dict.fromkeys(RunState, 0)
        families = {
            name: GaugeMetricFamily(
                f"stagetune_run_{name}", help_text, labels=["namespace", "run", "stage"]
            )
            for name, (_, _, help_text) in _RUN_GAUGES.items()
        }
        for key, run in self._store.runs():
            status = run.get("status") or {}
            counts[_state(status)] += 1
            for index, stage in enumerate(status.get("stages") or (), start=1):
                labels = [key.namespace, key.name, stage["name"]]
                for name, value in self._values(key, index, stage).items():
                    families[name].add_metric(labels, value)
        states = GaugeMetricFamily("stagetune_runs", "Runs by their state.", labels=["state"])
        for state, count in counts.items():
            states.add_metric([state], count)
        yield states
        yield from families.values()

    def _values(self, key: RunKey, index: int, stage: Object) -> dict[str, float]:
        """Return the last known numbers of a stage, by the end of the metric's name."""
        posted = self._progress.latest(key, f"{index:02d}-{stage['name']}")
        is_newest = (
            posted is not None
            and stage.get("state") != StageState.SUCCEEDED
            and self._progress.age(posted) < FRESH_SECONDS
        )
        found: dict[str, float] = {}
        for name, (field, status_field, _) in _RUN_GAUGES.items():
            said = _posted(posted, field)
            written = _written(stage, status_field)
            first, second = (said, written) if is_newest else (written, said)
            value = second if first is None else first
            if value is not None:
                found[name] = value
        return found


def _state(status: Object) -> RunState:
    try:
        return RunState(status.get("state", RunState.PENDING))
    except ValueError:
        # Of a newer version.
        return RunState.PENDING


def _posted(progress: TaskProgress | None, field: str) -> float | None:
    value: float | None = getattr(progress, field, None)
    return value


def _written(stage: Object, field: str | None) -> float | None:
    """Return a number of a stage's status; None where it has none yet."""
    if field is None:
        return None
    value: Any = stage
    for part in field.split("."):
        value = (value or {}).get(part)
    started = stage.get("state") not in (None, StageState.PENDING)
    return value if started and isinstance(value, (int, float)) else None
