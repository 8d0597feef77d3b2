"""Which of a stage's processes is to blame for its end: the launcher ends the others itself."""

import signal
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from stagetune_api.names import TrainerExitCode
from stagetune_api.report import Failure, FailureClass, Outcome, StageReport
from stagetune_api.stage import EnginePlan, StageConfig, Task
from stagetune_trainer.launch import _Death, _judge

PLAN = EnginePlan(processes_per_node=3, zero_stage=2)
FAILED_AT = 1000.4


@pytest.fixture
def config(
    make_later_config: Callable[..., StageConfig], make_stage: Callable[..., Any]
) -> StageConfig:
    return make_later_config("Train", stage=make_stage(0, 0, 1))


def failed(failure_class: FailureClass) -> StageReport:
    failure = Failure(
        failure_class=failure_class, exit_code=int(TrainerExitCode.OUT_OF_MEMORY), message="it"
    )
    return StageReport(
        task=Task.TRAIN, name="x", attempt=1, outcome=Outcome.FAILED, failure=failure
    )


def verdict(
    config: StageConfig,
    outcomes: Mapping[int, tuple[float, StageReport]],
    deaths: Mapping[int, _Death],
) -> Failure:
    report = _judge(config, PLAN, outcomes, deaths)
    assert report.failure is not None
    return report.failure


@pytest.mark.parametrize("code", [-signal.SIGKILL, -signal.SIGTERM])
def test_who_failed_is_to_blame_and_not_whom_the_launcher_ended(
    code: int, config: StageConfig
) -> None:
    outcomes = {1: (FAILED_AT, failed(FailureClass.OUT_OF_MEMORY))}
    # Half a minute later: so long the launcher waits for those that do not listen.
    deaths = {0: _Death(code=code, when=1030), 1: _Death(code=41, when=1000)}
    found = verdict(config, outcomes, {**deaths, 2: _Death(code=code, when=1030)})
    assert found.failure_class is FailureClass.OUT_OF_MEMORY
    assert found.message.startswith("process 2 of 3")


def test_who_was_killed_is_to_blame_and_not_those_that_lost_their_connection(
    config: StageConfig,
) -> None:
    lost = failed(FailureClass.INTERNAL)
    outcomes = {0: (FAILED_AT, lost), 1: (FAILED_AT + 0.1, lost)}
    # The launcher's clock has whole seconds, and looks ten times in one.
    found = verdict(config, outcomes, {2: _Death(code=-signal.SIGKILL, when=1001)})
    assert found.failure_class is FailureClass.DISRUPTED
    assert "process 3 of 3 was ended by signal 9" in found.message


def test_who_died_is_to_blame_where_nobody_left_a_word(config: StageConfig) -> None:
    found = verdict(config, {}, {1: _Death(code=-signal.SIGSEGV, when=1000)})
    assert "process 2 of 3 was ended by signal 11" in found.message
