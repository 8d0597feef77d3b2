"""The operator's metrics: read off the store, dropped with the run, in names that stay."""

import asyncio
import json
from typing import Any

from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from stagetune_api.report import FailureClass
from stagetune_api.status import RunState, StageState
from stagetune_operator.keys import RunKey
from stagetune_operator.metrics import FRESH_SECONDS, Metrics
from stagetune_operator.progress import ProgressStore
from stagetune_operator.store import Store

KEY = RunKey("team", "finance")
FIRST = "01-layers-0-7"
SECOND = "02-layers-8-15"


class Room:
    """Metrics over a store of runs and one of progress."""

    def __init__(self) -> None:
        self.now = 0.0
        self.store = Store()
        self.progress = ProgressStore(clock=lambda: self.now)
        self.metrics = Metrics("1.2.3")
        self.metrics.watch_runs(self.store, self.progress)

    def put_run(self, status: dict[str, Any], name: str = "finance", event: str = "ADDED") -> None:
        metadata = {
            "namespace": "team",
            "name": name,
            "uid": name,
            "creationTimestamp": "2026-01-01T00:00:00Z",
        }
        self.store.apply_run(event, {"metadata": metadata, "spec": {}, "status": status})

    def post(self, task: str, **values: Any) -> None:
        pairs = [{"name": name, "value": str(value)} for name, value in values.items()]
        body = json.dumps({"trainerStatus": {"metrics": pairs}}).encode()
        self.progress.put(KEY, task, "pod-1", body)

    def samples(self) -> dict[tuple[str, ...], float]:
        """Return all samples by name and the values of their labels."""
        text = generate_latest(self.metrics.registry).decode()
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


def stage(name: str, state: StageState, **values: Any) -> dict[str, Any]:
    return {"name": name, "state": state.value, "step": 0, "totalSteps": 120, **values}


def test_runs_are_counted_by_state_and_every_state_is_there() -> None:
    room = Room()
    for state in RunState:
        assert room.samples()["stagetune_runs", state] == 0
    room.put_run({"state": "Training"}, "a")
    room.put_run({"state": "Training"}, "b")
    room.put_run({}, "c")
    room.put_run({"state": "Levitating"}, "d")
    samples = room.samples()
    assert samples["stagetune_runs", "Training"] == 2
    assert samples["stagetune_runs", "Pending"] == 2
    assert sum(value for key, value in samples.items() if key[0] == "stagetune_runs") == 4


def test_a_stages_numbers_are_what_its_pod_said_last() -> None:
    room = Room()
    room.put_run(
        {"stages": [stage("layers-0-7", StageState.RUNNING, step=10, loss=3.0, validationLoss=2.9)]}
    )
    room.post(FIRST, step=12, loss=2.5, learning_rate=5e-5, grad_norm=0.5, peak_memory_bytes=800)
    samples = room.samples()

    def of(name: str) -> float:
        return samples[f"stagetune_run_{name}", "team", "finance", "layers-0-7"]

    assert of("step") == 12
    assert of("loss") == 2.5
    assert of("validation_loss") == 2.9
    assert of("learning_rate") == 5e-5
    assert of("grad_norm") == 0.5
    assert of("peak_memory_bytes") == 800
    assert of("planned_steps") == 120


def test_the_status_counts_once_the_pod_is_silent_or_the_stage_is_done() -> None:
    room = Room()
    measured = {"peakMemoryBytes": 900}
    room.put_run(
        {
            "stages": [
                stage("layers-0-7", StageState.SUCCEEDED, step=120, loss=2.0, measured=measured),
                stage("layers-8-15", StageState.RUNNING, step=30),
            ]
        }
    )
    room.post(FIRST, step=118, loss=2.1, peak_memory_bytes=800, learning_rate=1e-5)
    room.post(SECOND, step=20, tokens_per_second=1000)
    room.now += FRESH_SECONDS + 1
    samples = room.samples()
    assert samples["stagetune_run_step", "team", "finance", "layers-0-7"] == 120
    assert samples["stagetune_run_loss", "team", "finance", "layers-0-7"] == 2.0
    assert samples["stagetune_run_peak_memory_bytes", "team", "finance", "layers-0-7"] == 900
    # What no status keeps stays as it was said last.
    assert samples["stagetune_run_learning_rate", "team", "finance", "layers-0-7"] == 1e-5
    assert samples["stagetune_run_step", "team", "finance", "layers-8-15"] == 30
    assert samples["stagetune_run_tokens_per_second", "team", "finance", "layers-8-15"] == 1000


def test_a_stage_that_has_not_begun_has_no_numbers_and_a_run_that_is_gone_none_at_all() -> None:
    room = Room()
    stages = [
        stage("layers-0-7", StageState.SUCCEEDED, loss=2.0),
        stage("layers-8-15", StageState.PENDING),
    ]
    room.put_run({"stages": stages})
    assert {key[3] for key in room.samples() if key[0].startswith("stagetune_run_")} == {
        "layers-0-7"
    }
    room.put_run({"stages": stages}, event="DELETED")
    assert not [key for key in room.samples() if key[0].startswith("stagetune_run_")]


def test_what_happens_is_counted() -> None:
    room = Room()
    metrics = room.metrics
    samples = room.samples()
    for failure_class in FailureClass:
        assert samples["stagetune_failures_total", failure_class] == 0
    metrics.observe_stage(1800)
    metrics.observe_handoff(12)
    metrics.count_failure(FailureClass.OUT_OF_MEMORY)
    metrics.observe_reconcile(0.01, False)
    metrics.observe_reconcile(0.02, True)
    metrics.count_write("Job", "create")
    metrics.count_post("403")
    metrics.watch_queue(lambda: 7)
    samples = room.samples()
    assert samples["stagetune_stage_seconds_sum",] == 1800
    assert samples["stagetune_handoff_seconds_count",] == 1
    assert samples["stagetune_failures_total", "OutOfMemory"] == 1
    assert samples["stagetune_reconcile_seconds_count",] == 2
    assert samples["stagetune_reconcile_errors_total",] == 1
    assert samples["stagetune_api_writes_total", "Job", "create"] == 1
    assert samples["stagetune_progress_posts_total", "403"] == 1
    assert samples["stagetune_queue_depth",] == 7
    assert samples["stagetune_operator_info", "1.2.3"] == 1


def test_every_metric_explains_itself_and_is_served_in_both_formats() -> None:
    room = Room()
    room.put_run({"stages": [stage("layers-0-7", StageState.RUNNING, loss=2.0)]})

    async def main() -> tuple[str, str]:
        async with TestClient(TestServer(room.metrics.application())) as client:
            plain = await client.get("/metrics")
            accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
            modern = await client.get("/metrics", headers=accept)
            assert plain.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert modern.headers["Content-Type"].startswith("application/openmetrics-text")
            return await plain.text(), await modern.text()

    plain, modern = asyncio.run(main())
    families = list(text_string_to_metric_families(plain))
    assert {family.name for family in families} >= {
        "stagetune_runs",
        "stagetune_run_loss",
        "stagetune_api_writes",
        "process_resident_memory_bytes",
    }
    assert all(family.documentation for family in families)
    assert list(parse_openmetrics(modern))
