"""Which changes of a status are told as events, and which are not."""

from typing import Any

from stagetune_api.report import Failure, FailureClass
from stagetune_api.status import (
    ConditionReason,
    RunState,
    StagedFineTuneStatus,
    StageState,
    StageStatus,
    TaskStatus,
)
from stagetune_api.training_spec import LayerRange
from stagetune_operator.conditions import Standing, with_standing
from stagetune_operator.events import Event, events_between

TRAINING = Standing(state=RunState.TRAINING, reason=ConditionReason.TRAINING, message="lower")
SUSPENDED = Standing(state=RunState.SUSPENDED, reason=ConditionReason.SUSPENDED, is_suspended=True)
COMPLETED = Standing(state=RunState.SUCCEEDED, reason=ConditionReason.COMPLETED)
FAILED = Standing(
    state=RunState.FAILED,
    reason=ConditionReason.STAGE_FAILED,
    message="lower: row 7 is wrong",
    is_stalled=True,
)
FAILURE = Failure(failure_class=FailureClass.INTERNAL, exit_code=47, message="a bug")


def status(
    standing: Standing = TRAINING, *, generation: int = 1, **values: Any
) -> StagedFineTuneStatus:
    base = StagedFineTuneStatus(start_time="2026-01-01T00:00:00Z", **values)
    return with_standing(base, standing, generation=generation, now="2026-01-01T00:00:00Z")


def stage(state: StageState = StageState.RUNNING, **values: Any) -> StageStatus:
    return StageStatus(name="lower", layers=LayerRange(first=0, last=1), state=state, **values)


def test_nothing_is_told_of_progress_and_of_edits() -> None:
    before = status(stages=[stage()])
    after = status(stages=[stage(step=5, loss=1.0)], generation=2)
    assert events_between(before, after) == []


def test_parts_of_a_run_are_told_when_they_are_done() -> None:
    before = status()
    prepared = [TaskStatus(name="prepare", state=StageState.SUCCEEDED)]
    planned = status(tasks=prepared, plan_digest="f", stages=[stage()])
    assert events_between(before, planned) == [
        Event("Normal", "Prepared", "Prepared"),
        Event("Normal", "Planned", "1 stages"),
    ]
    done = stage(StageState.SUCCEEDED, validation_loss=1.25)
    trained = status(tasks=prepared, plan_digest="f", stages=[done])
    assert events_between(planned, trained) == [
        Event("Normal", "Trained", "stage 1/1 lower is done, validation loss 1.2500")
    ]
    completed = status(COMPLETED, tasks=prepared, plan_digest="f", stages=[done], export="/x")
    assert events_between(trained, completed) == [
        Event("Normal", "Completed", "the result is in /x")
    ]
    assert events_between(completed, completed) == []


def test_failed_attempt_is_told_once_and_the_last_one_with_the_end_of_the_run() -> None:
    before = status(stages=[stage(attempts=1)])
    after = status(stages=[stage(StageState.QUEUED, attempts=1, last_failure=FAILURE)])
    assert events_between(before, after) == [
        Event("Warning", "Retrying", "lower, attempt 1: Internal: a bug")
    ]
    again = status(stages=[stage(StageState.QUEUED, attempts=2, last_failure=FAILURE)])
    assert events_between(after, again) == []
    over = status(FAILED, stages=[stage(StageState.FAILED, attempts=2, last_failure=FAILURE)])
    assert events_between(again, over) == [Event("Warning", "StageFailed", "lower: row 7 is wrong")]
    assert events_between(over, over) == []


def test_suspension_is_told_and_its_end_is_not() -> None:
    assert events_between(status(), status(SUSPENDED)) == [
        Event("Normal", "Suspended", "Suspended")
    ]
    assert events_between(status(SUSPENDED), status()) == []


def test_what_a_person_has_to_mend_is_told_again_when_it_is_something_else() -> None:
    other = Standing(
        state=RunState.FAILED,
        reason=ConditionReason.INVALID_SPEC,
        message="spec.stages: wrong",
        refusal="spec.stages: wrong",
        is_stalled=True,
    )
    before = status(FAILED)
    assert events_between(before, status(other)) == [
        Event("Warning", "InvalidSpec", "spec.stages: wrong")
    ]


def test_order_to_begin_again_is_told_of_a_run_that_had_begun() -> None:
    ordered = status(retry_number=2)
    assert events_between(status(FAILED), ordered) == [
        Event("Normal", "Retrying", "begun again by order 2")
    ]
    assert events_between(StagedFineTuneStatus(), ordered) == []
