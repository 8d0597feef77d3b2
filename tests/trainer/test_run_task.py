"""Whatever goes wrong in a task ends in a report with a class and an exit code of its own."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stagetune_api.artifact import ArtifactError
from stagetune_api.names import TrainerExitCode
from stagetune_api.problems import Problem, ProblemReason
from stagetune_api.report import FailureClass, Outcome, StageReport
from stagetune_api.stage import StageConfig, Task
from stagetune_trainer.__main__ import RedactingFormatter
from stagetune_trainer.errors import (
    DivergedError,
    FencedError,
    InterruptedRunError,
    UserError,
)
from stagetune_trainer.run import classify, failed, run_task
from stop_requests import NeverAsked

MakeConfig = Callable[..., StageConfig]
PROBLEM = Problem(path="spec.model.source", reason=ProblemReason.NOT_FOUND, message="is not there")


def cpu_allocation_error() -> BaseException:
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        return error
    raise AssertionError("an exabyte was allocated")


@pytest.mark.parametrize(
    ("error", "failure_class", "code"),
    [
        (UserError([PROBLEM]), FailureClass.USER_ERROR, TrainerExitCode.USER_ERROR),
        (InterruptedRunError("x"), FailureClass.DISRUPTED, TrainerExitCode.INTERRUPTED),
        (KeyboardInterrupt(), FailureClass.DISRUPTED, TrainerExitCode.INTERRUPTED),
        (FencedError("x"), FailureClass.FENCED, TrainerExitCode.FENCED),
        (DivergedError("x"), FailureClass.DIVERGED, TrainerExitCode.DIVERGED),
        (torch.OutOfMemoryError("x"), FailureClass.OUT_OF_MEMORY, TrainerExitCode.OUT_OF_MEMORY),
        (MemoryError(), FailureClass.OUT_OF_MEMORY, TrainerExitCode.OUT_OF_MEMORY),
        (ArtifactError(Path("x"), "y"), FailureClass.STORAGE_ERROR, TrainerExitCode.STORAGE_ERROR),
        (OSError(errno.ENOSPC, "x"), FailureClass.STORAGE_FULL, TrainerExitCode.STORAGE_FULL),
        (OSError(errno.EDQUOT, "x"), FailureClass.STORAGE_FULL, TrainerExitCode.STORAGE_FULL),
        (OSError(errno.EIO, "x"), FailureClass.STORAGE_ERROR, TrainerExitCode.STORAGE_ERROR),
        (OSError(errno.EROFS, "x"), FailureClass.STORAGE_ERROR, TrainerExitCode.STORAGE_ERROR),
        (ZeroDivisionError(), FailureClass.INTERNAL, TrainerExitCode.INTERNAL),
    ],
)
def test_every_kind_of_failure_has_its_class_and_exit_code(
    error: BaseException, failure_class: FailureClass, code: TrainerExitCode
) -> None:
    assert classify(error) == (failure_class, code)


def test_host_memory_that_torch_cannot_get_is_out_of_memory() -> None:
    assert classify(cpu_allocation_error())[0] is FailureClass.OUT_OF_MEMORY


def test_token_that_a_library_quotes_is_in_no_report_and_no_log(
    make_stage_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_from-environment")
    monkeypatch.setenv("STAGETUNE_SECRETS_DIRECTORY", str(tmp_path))
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "token").write_text("ms-from-secret\n")
    error = RuntimeError("401 for Bearer hf_from-environment, ms-from-secret")
    report, _ = failed(make_stage_config(), error)
    assert report.failure is not None
    assert report.failure.message == "401 for Bearer [token], [token]"
    assert "from-" not in report.model_dump_json()
    record = logging.LogRecord("x", logging.INFO, "x", 1, "sent %s", ("hf_from-environment",), None)
    assert RedactingFormatter("%(message)s").format(record) == "sent [token]"


def test_failed_task_leaves_a_report_with_every_problem(
    make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_stage_config(model={"source": "file://./nowhere"})
    report, code = run_task(config, NeverAsked())
    assert code == TrainerExitCode.USER_ERROR
    path = tmp_path / "run" / "tasks" / "prepare" / "report.json"
    assert StageReport.model_validate_json(path.read_bytes()) == report
    assert report.outcome is Outcome.FAILED
    assert report.failure is not None
    assert "spec.model.source" in report.failure.message
    message = report.termination_message()
    assert len(message.encode()) <= 4096
    assert json.loads(message)["failure"]["class"] == "UserError"


def test_full_disk_is_reported_as_such(
    make_stage_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    report, code = run_task(make_stage_config(), NeverAsked())
    assert code == TrainerExitCode.STORAGE_FULL
    assert report.failure is not None
    assert "No space left" in report.failure.message


def test_same_attempt_cannot_be_started_twice(make_stage_config: MakeConfig) -> None:
    assert run_task(make_stage_config(), NeverAsked())[1] == TrainerExitCode.SUCCEEDED
    report, code = run_task(make_stage_config(), NeverAsked())
    assert code == TrainerExitCode.FENCED
    assert report.failure is not None
    assert "attempt 1 has been started already" in report.failure.message


def start_trainer(config: StageConfig, tmp_path: Path) -> "subprocess.Popen[str]":
    path = tmp_path / "stage.json"
    path.write_text(config.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "stagetune_trainer", "--stop-with-parent", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.parametrize("how", ["signal", "closed input"])
def test_task_that_saves_nothing_ends_at_once_when_asked(
    how: str, make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_stage_config()
    assert config.task is Task.PREPARE
    with start_trainer(config, tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert "fetching" in process.stdout.readline()
        if how == "signal":
            process.send_signal(signal.SIGTERM)
        else:
            process.stdin.close()
        process.stdout.read()
        assert process.wait(timeout=60) == TrainerExitCode.INTERRUPTED


def test_stage_whose_reader_is_gone_saves_all_the_same(
    make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    """The command is killed: its ends of both pipes close at the same moment."""
    prepared, code = run_task(make_stage_config(), NeverAsked())
    assert code == TrainerExitCode.SUCCEEDED
    facts = prepared.facts
    assert facts is not None
    estimate = dict.fromkeys(
        (
            "trainableParameters",
            "weightsBytes",
            "trainingStateBytes",
            "activationBytes",
            "memoryBytes",
            "diskBytes",
            "stepFlops",
            "relativeStepFlops",
        ),
        0,
    )
    config = make_stage_config(
        task="Train",
        model_directory=facts.model_directory,
        model_digest=facts.model.digest,
        data_digest=facts.data.digest,
        stage={
            "index": 0,
            "name": "layers-0-1",
            "layers": {"first": 0, "last": 1},
            "embeddings": False,
            "head": False,
            "learningRate": 1e-3,
            "epochs": 1000.0,
            "rows": {"start": 0, "end": 32},
            "steps": 8000,
            "warmupSteps": 0,
            "validationInterval": 8000,
            "estimate": estimate,
        },
    )
    with start_trainer(config, tmp_path) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if '"Step"' in line and json.loads(line)["step"] >= 3:
                break
        process.stdout.close()
        process.stdin.close()
        assert process.wait(timeout=60) == TrainerExitCode.INTERRUPTED
    checkpoints = tmp_path / "run" / "stages" / "01-layers-0-1" / "checkpoints"
    saved = [int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*")]
    assert max(saved) >= 3
