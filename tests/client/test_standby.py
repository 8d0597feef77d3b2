"""The process that stands by is used for what it was started for, and ended otherwise."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagetune.standby import STANDBY_SECONDS, Standby, is_near_its_end
from stagetune.trainer_process import Interruption
from stagetune_api.names import RunLayout, StageLayout, TrainerExitCode
from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.stage import ParentRef, StageConfig, Task

CHAIN = [ParentRef(path="/nowhere", digest="d" * 64)]


@pytest.fixture
def layout(tmp_path: Path) -> StageLayout:
    return RunLayout(tmp_path / "run").task("evaluate")


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    file = (tmp_path / "lock").open("w")
    yield file.fileno()
    file.close()


@pytest.fixture
def config(tmp_path: Path) -> StageConfig:
    """An evaluation of a model that is not there."""
    return StageConfig.model_validate(
        {
            "task": "Evaluate",
            "runName": "tiny",
            "attempt": 1,
            "runDirectory": str(tmp_path / "run"),
            "modelsDirectory": str(tmp_path / "models"),
            "manifestDirectory": str(tmp_path),
            "model": {"source": "file://model"},
            "dataset": {"source": "file://rows.jsonl", "validation": {"fraction": 0.2}},
            "method": {"type": "Full"},
            "training": {"learningRate": 1e-3},
            "evaluation": {},
            "export": {},
            "modelDirectory": str(tmp_path / "models" / "none"),
            "modelDigest": "a" * 64,
            "dataDigest": "b" * 64,
            "chain": [*CHAIN, *CHAIN],
        }
    )


def alive_with(path: Path) -> list[int]:
    """Return the processes that name `path` in their command."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if str(path).encode() in command:
                found.append(int(folder.name))
    return found


def test_the_process_that_waits_does_the_task_it_was_started_for(
    config: StageConfig, layout: StageLayout, descriptor: int
) -> None:
    standby = Standby(descriptor)
    standby.begin(config.forecast(), layout)
    # A process is there a moment before its command can be read.
    while not (waiting := alive_with(layout.forecast)):
        time.sleep(0.01)
    standby.begin(config.forecast(), layout)
    assert alive_with(layout.forecast) == waiting
    assert len(waiting) == 1
    code = standby.start(config, layout).follow(lambda progress: None, Interruption())
    # There is no such model: it came to its task.
    assert code == TrainerExitCode.STORAGE_ERROR
    assert alive_with(layout.root) == []


def test_a_process_for_something_else_is_ended_and_another_one_started(
    config: StageConfig, layout: StageLayout, descriptor: int
) -> None:
    standby = Standby(descriptor)
    standby.begin(config.forecast(), layout)
    other = config.model_copy(update={"attempt": 2})
    process = standby.start(other, layout)
    assert alive_with(layout.forecast) == []
    assert process.is_alive()
    process.end()
    assert not process.is_alive()


def test_a_process_that_is_ended_is_gone(
    config: StageConfig, layout: StageLayout, descriptor: int
) -> None:
    standby = Standby(descriptor)
    standby.begin(config.forecast(), layout)
    standby.end()
    standby.end()
    assert alive_with(layout.forecast) == []


def test_a_run_goes_on_where_no_process_can_be_started(
    config: StageConfig, layout: StageLayout, descriptor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def refuse(*arguments: object, **options: object) -> None:
        tried.append(arguments)
        raise BlockingIOError("too many processes")

    standby = Standby(descriptor)
    with monkeypatch.context() as patched:
        patched.setattr("stagetune.trainer_process.subprocess.Popen", refuse)
        standby.begin(config.forecast(), layout)
        standby.begin(config.forecast(), layout)
    assert len(tried) == 1
    code = standby.start(config, layout).follow(lambda progress: None, Interruption())
    assert code == TrainerExitCode.STORAGE_ERROR


def test_a_stage_is_near_its_end_by_what_its_steps_say() -> None:
    def said(kind: ProgressKind, eta_seconds: float | None) -> bool:
        return is_near_its_end(
            Progress(
                kind=kind,
                task=Task.TRAIN,
                name="layers-0-1",
                attempt=1,
                time="2026-01-01T00:00:00Z",
                eta_seconds=eta_seconds,
            )
        )

    assert said(ProgressKind.STEP, STANDBY_SECONDS - 1)
    assert not said(ProgressKind.STEP, STANDBY_SECONDS)
    assert not said(ProgressKind.STEP, None)
    assert not said(ProgressKind.MESSAGE, 1.0)
