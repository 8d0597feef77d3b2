"""/metrics of a trainer: the numbers of its progress lines, by Prometheus' rules for names."""

import re
import socket
import threading
import urllib.request
from collections.abc import Callable
from http.server import HTTPServer
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from stagetune_api.names import TrainerExitCode
from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.report import CheckpointRef, Outcome, StageReport
from stagetune_api.stage import StageConfig, Task
from stagetune_trainer.prometheus import PrometheusMetrics
from stagetune_trainer.run import run_task

MakeConfig = Callable[..., StageConfig]
REPORT = StageReport(name="x", attempt=1, outcome=Outcome.SUCCEEDED)
# What promtool's linter knows of: other units than the base ones, and endings with a meaning.
NOT_BASE_UNITS = re.compile(r"(milli|micro|nano|kilo|mega|giga|minutes|hours|ms|mb|gb|percent)")


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free: int = probe.getsockname()[1]
        return free


def scrape(port: int) -> dict[str, Metric]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    family = name.removesuffix("_total").removesuffix("_count").removesuffix("_sum")
    (found,) = [
        sample.value
        for sample in families[family].samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return float(found)


def line(kind: ProgressKind = ProgressKind.STEP, **values: Any) -> Progress:
    time = "2026-07-01T12:00:00.500Z"
    return Progress(kind=kind, task=Task.TRAIN, name="x", attempt=1, time=time, **values)


def test_metrics_are_those_of_the_progress_lines(
    make_later_config: MakeConfig, make_stage: Callable[..., dict[str, Any]], port: int
) -> None:
    config = make_later_config("Train", stage=make_stage(0, 0, 1, steps=100), attempt=3)
    sink = PrometheusMetrics(config, "layers-0-1", port=port, namespace="team-a")
    try:
        before = scrape(port)
        assert before["stagetune_trainer_loss"].samples == []
        assert value(before, "stagetune_trainer_planned_steps") == 100
        (task,) = before["stagetune_trainer_task_info"].samples
        assert task.labels == {
            "namespace": "team-a",
            "run": "tiny",
            "stage": "layers-0-1",
            "task": "Train",
            "method": "Full",
            "layers": "0-1",
            "attempt": "3",
        }
        checkpoint = CheckpointRef(path="x", digest="y", step=10)
        sink.write(line(ProgressKind.MESSAGE, step=10, tokens=1000, checkpoint=checkpoint))
        for step, seconds in ((11, 0.3), (12, 45.0)):
            sink.write(
                line(step=step, loss=1.5, tokens=100 * step, step_seconds=seconds, grad_norm=2.0)
            )
        sink.write(line(ProgressKind.VALIDATION, step=12, validation_loss=1.25))
        families = scrape(port)
        labels = {"namespace": "team-a", "run": "tiny", "stage": "layers-0-1"}
        assert value(families, "stagetune_trainer_step", **labels) == 12
        assert value(families, "stagetune_trainer_loss", **labels) == 1.5
        assert value(families, "stagetune_trainer_validation_loss", **labels) == 1.25
        assert value(families, "stagetune_trainer_tokens_total", **labels) == 200
        assert value(families, "stagetune_trainer_step_seconds_count", **labels) == 2
        assert value(families, "stagetune_trainer_step_seconds_sum", **labels) == 45.3
        assert value(families, "stagetune_trainer_checkpoint_step", **labels) == 10
        assert families["stagetune_trainer_checkpoint_timestamp_seconds"].samples == []
        checkpoint = CheckpointRef(path="x", digest="y", step=12)
        sink.write(line(ProgressKind.CHECKPOINT, step=12, checkpoint=checkpoint))
        families = scrape(port)
        assert value(families, "stagetune_trainer_checkpoint_step", **labels) == 12
        name = "stagetune_trainer_checkpoint_timestamp_seconds"
        assert value(families, name, **labels) == 1782907200.5
    finally:
        sink.close(REPORT)


def test_names_follow_prometheus_rules(make_stage_config: MakeConfig, port: int) -> None:
    sink = PrometheusMetrics(make_stage_config(), "prepare", port=port)
    try:
        families = scrape(port)
    finally:
        sink.close(REPORT)
    assert len(families) == 17
    for name, family in families.items():
        assert family.documentation.endswith("."), name
        assert not NOT_BASE_UNITS.search(name.removeprefix("stagetune_trainer_")), name
        assert (family.type == "counter") == name.endswith("_tokens"), name
        assert not name.endswith(("_count", "_sum", "_bucket", "_created")), name
        assert all(sample.labels["stage"] == "prepare" for sample in family.samples)


def test_running_stage_can_be_scraped(
    make_later_config: MakeConfig, make_stage: Callable[..., dict[str, Any]], port: int
) -> None:
    class Scraper:
        def __init__(self) -> None:
            self.families: dict[str, Metric] = {}
            self.checks = 0

        @property
        def requested(self) -> bool:
            self.checks += 1
            if self.checks == 12:
                self.families = scrape(port)
            return False

    scraper = Scraper()
    config = make_later_config("Train", stage=make_stage(0, 0, 1))
    assert run_task(config, scraper, metrics_port=port)[1] is TrainerExitCode.SUCCEEDED
    step = value(scraper.families, "stagetune_trainer_step")
    assert step >= 1
    assert value(scraper.families, "stagetune_trainer_step_seconds_count") == step
    with pytest.raises(OSError, match="refused"):
        scrape(port)


def test_port_that_is_taken_disturbs_nothing(
    make_stage_config: MakeConfig,
    never: Any,
    port: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        _, code = run_task(make_stage_config(attempt=0), never, metrics_port=port)
    assert code is TrainerExitCode.SUCCEEDED
    assert f"port {port}: Address already in use" in caplog.text


def test_end_of_a_task_does_not_wait_for_the_next_look_of_the_server(
    make_stage_config: MakeConfig, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = HTTPServer.serve_forever
    monkeypatch.setattr(HTTPServer, "serve_forever", lambda server: look(server, 3600))
    sink = PrometheusMetrics(make_stage_config(), "prepare", port=port)
    scrape(port)
    ending = threading.Thread(target=sink.close, args=(REPORT,), daemon=True)
    ending.start()
    ending.join(60)
    assert not ending.is_alive()
    with pytest.raises(OSError, match="refused"):
        scrape(port)
