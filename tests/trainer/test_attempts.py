"""Pods of one Job are given one file: each takes a number, and only the newest publishes."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stagetune_api import names
from stagetune_api.artifact import verify_artifact
from stagetune_api.names import TrainerExitCode
from stagetune_api.report import StageReport
from stagetune_api.stage import StageConfig
from stagetune_trainer.checkpoint import Fence
from stagetune_trainer.errors import FencedError
from stagetune_trainer.run import run_task

MakeConfig = Callable[..., StageConfig]


class SecondPod:
    """Starts the same file again, to its end, in the middle of the first pod's work."""

    def __init__(self, config: StageConfig, never: Any, *, after_checks: int) -> None:
        self._config = config
        self._never = never
        self._left = after_checks
        self.result: tuple[StageReport, TrainerExitCode] | None = None

    @property
    def requested(self) -> bool:
        self._left -= 1
        if self._left == 0:
            # The first one may be at its validation, which needs no gradients.
            with torch.enable_grad():
                self.result = run_task(self._config, self._never)
        return False


def test_numbers_are_taken_once_whoever_asks_at_the_same_moment(tmp_path: Path) -> None:
    taken: list[int] = []
    start = threading.Barrier(8)

    def claim() -> None:
        start.wait()
        for _ in range(20):
            taken.append(Fence(tmp_path / "fence").attempt)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 161))


def test_later_claim_ends_an_earlier_one(tmp_path: Path) -> None:
    first = Fence(tmp_path / "fence")
    first.check()
    second = Fence(tmp_path / "fence")
    second.check()
    with pytest.raises(FencedError, match="attempt 2 has started, so attempt 1 may not"):
        first.check()


@pytest.mark.parametrize("after_checks", [1, 7, 17])
def test_of_two_pods_with_one_file_only_the_newest_publishes(
    after_checks: int,
    make_later_config: MakeConfig,
    make_stage: Callable[..., dict[str, Any]],
    never: Any,
    tmp_path: Path,
) -> None:
    config = make_later_config("Train", stage=make_stage(0, 0, 1))
    second = SecondPod(config, never, after_checks=after_checks)
    first_report, first_code = run_task(config, second)
    assert second.result is not None
    report, code = second.result
    assert code is TrainerExitCode.SUCCEEDED
    assert (report.attempt, first_report.attempt) == (2, 1)
    assert first_code is TrainerExitCode.FENCED
    layout = names.RunLayout(tmp_path / "run").stage("01-layers-0-1")
    assert verify_artifact(layout.output).provenance.attempt == 2
    assert StageReport.model_validate_json(layout.report.read_bytes()) == report
    lines = [json.loads(line) for line in layout.metrics.read_text().splitlines()]
    steps = [(line["step"], line["attempt"]) for line in lines if line["kind"] == "Step"]
    assert steps == [(step, 2) for step in range(1, 9)]


def test_task_that_publishes_nothing_but_its_report_is_fenced_too(
    make_later_config: MakeConfig,
    make_stage: Callable[..., dict[str, Any]],
    never: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage, _ = run_task(make_later_config("Train", stage=make_stage(0, 0, 1)), never)
    config = make_later_config("Evaluate", chain=[stage], evaluation={"samples": 1})
    layout = names.RunLayout(tmp_path / "run").task("evaluate")
    from stagetune_trainer import evaluate

    measure = evaluate.kl_divergence

    def overtaken(*arguments: Any) -> float:
        Fence(layout.fence)
        return measure(*arguments)

    monkeypatch.setattr(evaluate, "kl_divergence", overtaken)
    _, code = run_task(config, never)
    assert code is TrainerExitCode.FENCED
    assert not layout.report.exists()
    monkeypatch.undo()
    report, code = run_task(config, never)
    assert (report.attempt, code) == (3, TrainerExitCode.SUCCEEDED)


def test_number_given_from_outside_counts_as_before(
    make_stage_config: MakeConfig, never: Any
) -> None:
    assert run_task(make_stage_config(attempt=4), never)[0].attempt == 4
    assert run_task(make_stage_config(attempt=0), never)[0].attempt == 5
    assert run_task(make_stage_config(attempt=4), never)[1] is TrainerExitCode.FENCED


def test_claim_that_fails_is_no_older_attempts_business(
    make_stage_config: MakeConfig, never: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at the second start is a full disk, and the first one's report stays."""
    first, _ = run_task(make_stage_config(attempt=0), never)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "touch", full)
    report, code = run_task(make_stage_config(attempt=0), never)
    assert (report.attempt, code) == (0, TrainerExitCode.STORAGE_FULL)
    path = names.RunLayout(tmp_path / "run").task("prepare").report
    assert StageReport.model_validate_json(path.read_bytes()) == first
