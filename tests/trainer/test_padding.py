"""What a stage says of the padding that it computed, and batches by length in a whole stage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagetune_api import names
from stagetune_api.report import Outcome, StageReport
from stagetune_api.stage import StageConfig
from stagetune_trainer.data.batches import open_training_rows
from stagetune_trainer.run import run_task
from stop_requests import AfterChecks

MakeConfig = Callable[..., StageConfig]
MakeStage = Callable[..., dict[str, Any]]
GROUPED = {"groupByLength": True}


@pytest.fixture
def make_stage_task(
    make_later_config: MakeConfig, make_stage: MakeStage, save_jsonl: Any, tmp_path: Path
) -> Callable[..., StageConfig]:
    """`make_stage_task(run, **training)`: two passes over 40 rows of very different lengths."""
    rows = [
        {"query": f"Question {number}?", "response": "word " * (1 + number)} for number in range(40)
    ]
    save_jsonl(tmp_path / "rows.jsonl", rows)

    def make(run: str, **training: Any) -> StageConfig:
        return make_later_config(
            "Train",
            stage=make_stage(0, 2, 3, epochs=2.0, steps=16),
            run_directory=str(tmp_path / run),
            training=training,
        )

    return make


def finished(report: StageReport) -> tuple[str, float]:
    """Return the output's digest and the part of padding."""
    assert report.outcome is Outcome.SUCCEEDED, report.failure
    assert report.output is not None
    assert report.train is not None
    assert report.train.padding_fraction is not None
    return report.output.digest, report.train.padding_fraction


def test_padding_in_the_report_is_that_of_all_steps(
    make_stage_task: Callable[..., StageConfig], never: Any
) -> None:
    config = make_stage_task("run")
    assert config.stage is not None
    rows = open_training_rows(config, config.stage)
    batches = [batch for step in range(16) for batch in rows.micro_batches(step)]
    widths = sum(batch.input_ids.numel() for batch in batches)
    tokens = sum(sum(batch.lengths) for batch in batches)
    assert widths > tokens

    _, padding = finished(run_task(config, never)[0])

    assert padding == pytest.approx(1 - tokens / widths)
    path = Path(config.run_directory) / "stages" / "01-layers-2-3" / names.METRICS_FILE
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line["paddingFraction"] for line in lines if line["kind"] == "Step"]
    assert len(steps) == 16
    assert min(steps) < padding < max(steps)


def test_batches_by_length_have_less_padding(
    make_stage_task: Callable[..., StageConfig], never: Any
) -> None:
    plain, padding = finished(run_task(make_stage_task("plain"), never)[0])
    grouped, less = finished(run_task(make_stage_task("grouped", **GROUPED), never)[0])
    assert less < padding
    assert grouped != plain


def test_stopped_stage_of_batches_by_length_goes_on_to_the_same_bits(
    make_stage_task: Callable[..., StageConfig], never: Any
) -> None:
    unbroken = finished(run_task(make_stage_task("unbroken", **GROUPED), never)[0])
    config = make_stage_task("stopped", **GROUPED)
    assert run_task(config, AfterChecks(21))[0].outcome is Outcome.INTERRUPTED
    assert finished(run_task(config, never)[0]) == unbroken


def test_stage_is_not_gone_on_from_with_batches_in_another_order(
    make_stage_task: Callable[..., StageConfig], never: Any
) -> None:
    grouped = finished(run_task(make_stage_task("grouped", **GROUPED), never)[0])
    run_task(make_stage_task("changed"), AfterChecks(21))
    assert finished(run_task(make_stage_task("changed", **GROUPED), never)[0]) == grouped
