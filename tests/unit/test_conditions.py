"""Conditions and columns of a run in every state, as in the table of the architecture."""

from collections.abc import Sequence

import pytest

from stagetune_api.status import (
    ConditionReason,
    ConditionType,
    RunState,
    StagedFineTuneStatus,
    StageState,
    StageStatus,
    TaskStatus,
)
from stagetune_api.training_spec import LayerRange
from stagetune_operator.conditions import Standing, with_standing

NOW, LATER = "2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z"
KSTATUS = ("Ready", "Succeeded", "Reconciling", "Stalled", "Suspended", "Finished")


def stage(name: str, state: StageState, *, step: int = 0, loss: float | None = None) -> StageStatus:
    return StageStatus(
        name=name,
        layers=LayerRange(first=0, last=1),
        state=state,
        step=step,
        total_steps=10,
        loss=loss,
        eta_seconds=61,
    )


def status_of(*states: StageState, tasks: Sequence[TaskStatus] = ()) -> StagedFineTuneStatus:
    stages = [stage(f"s{number}", state) for number, state in enumerate(states)]
    return StagedFineTuneStatus(
        stages=stages, tasks=list(tasks), plan_digest="f" * 64 if states else ""
    )


def statuses(status: StagedFineTuneStatus) -> dict[str, str]:
    return {item.type.value: item.status.value for item in status.conditions}


WORKING = ("Unknown", "Unknown", "True", "False", "False", "False")
STANDINGS = {
    "queued": (Standing(state=RunState.QUEUED, reason=ConditionReason.QUEUED), WORKING),
    "preparing": (Standing(state=RunState.PREPARING, reason=ConditionReason.PREPARING), WORKING),
    "training": (Standing(state=RunState.TRAINING, reason=ConditionReason.TRAINING), WORKING),
    "waiting for a retry": (
        Standing(state=RunState.TRAINING, reason=ConditionReason.RETRYING),
        WORKING,
    ),
    "refused by a quota": (
        Standing(state=RunState.QUEUED, reason=ConditionReason.CANNOT_CREATE),
        WORKING,
    ),
    "saving for a suspension": (
        Standing(state=RunState.SUSPENDED, reason=ConditionReason.SUSPENDING),
        WORKING,
    ),
    "suspended": (
        Standing(state=RunState.SUSPENDED, reason=ConditionReason.SUSPENDED, is_suspended=True),
        ("Unknown", "Unknown", "False", "False", "True", "False"),
    ),
    "finished well": (
        Standing(state=RunState.SUCCEEDED, reason=ConditionReason.COMPLETED),
        ("True", "True", "False", "False", "False", "True"),
    ),
    "failed for good": (
        Standing(state=RunState.FAILED, reason=ConditionReason.STAGE_FAILED, is_stalled=True),
        ("False", "False", "False", "True", "False", "True"),
    ),
    "invalid": (
        Standing(
            state=RunState.FAILED,
            reason=ConditionReason.INVALID_SPEC,
            refusal="spec.stages: wrong",
            is_stalled=True,
        ),
        ("False", "False", "False", "True", "False", "True"),
    ),
    "in conflict with another's Job": (
        Standing(state=RunState.QUEUED, reason=ConditionReason.NAME_CONFLICT, is_stalled=True),
        ("False", "False", "False", "True", "False", "True"),
    ),
}


@pytest.mark.parametrize("name", STANDINGS)
def test_conditions_of_each_state_are_those_of_the_table(name: str) -> None:
    standing, expected = STANDINGS[name]
    status = with_standing(status_of(), standing, generation=3, now=NOW)
    found = statuses(status)
    assert tuple(found[type] for type in KSTATUS) == expected
    assert found["Validated"] == ("False" if standing.refusal else "True")
    assert set(found) == set(ConditionType)
    assert {item.observed_generation for item in status.conditions} == {3}
    assert status.observed_generation == 3
    assert status.state is standing.state


@pytest.mark.parametrize("name", STANDINGS)
def test_second_pass_changes_nothing(name: str) -> None:
    standing, _ = STANDINGS[name]
    first = with_standing(status_of(), standing, generation=1, now=NOW)
    assert with_standing(first, standing, generation=1, now=LATER) == first


def test_time_of_a_condition_moves_with_its_status_alone() -> None:
    queued, training = STANDINGS["queued"][0], STANDINGS["training"][0]
    status = with_standing(status_of(), queued, generation=1, now=NOW)
    status = with_standing(status, training, generation=2, now=LATER)
    assert {item.last_transition_time for item in status.conditions} == {NOW}
    status = with_standing(status, STANDINGS["suspended"][0], generation=2, now=LATER)
    moved = {item.type for item in status.conditions if item.last_transition_time == LATER}
    assert moved == {ConditionType.RECONCILING, ConditionType.SUSPENDED}


def test_milestones_are_open_until_they_are_reached_or_the_run_is_over() -> None:
    prepared = TaskStatus(name="prepare", state=StageState.SUCCEEDED)
    status = status_of(StageState.SUCCEEDED, StageState.RUNNING, tasks=[prepared])
    working = with_standing(status, STANDINGS["training"][0], generation=1, now=NOW)
    over = with_standing(status, STANDINGS["failed for good"][0], generation=1, now=NOW)
    parts = ("Prepared", "Planned", "Trained", "Evaluated", "Exported")
    assert [statuses(working)[type] for type in parts] == ["True", "True", *["Unknown"] * 3]
    assert [statuses(over)[type] for type in parts] == ["True", "True", *["False"] * 3]
    trained = next(item for item in working.conditions if item.type is ConditionType.TRAINED)
    assert trained.message == "1 of 2 stages"


def test_plan_that_does_not_fit_is_no_plan() -> None:
    standing = Standing(
        state=RunState.FAILED,
        reason=ConditionReason.DOES_NOT_FIT,
        message="needs 90 GiB",
        is_stalled=True,
    )
    status = with_standing(status_of(), standing, generation=1, now=NOW)
    planned = next(item for item in status.conditions if item.type is ConditionType.PLANNED)
    assert (planned.status, planned.reason) == ("False", "DoesNotFit")
    assert planned.message == "needs 90 GiB"


def test_message_of_any_length_fits_its_field() -> None:
    standing = Standing(state=RunState.QUEUED, reason=ConditionReason.QUEUED, message="€" * 9000)
    status = with_standing(status_of(), standing, generation=1, now=NOW)
    assert max(len(item.message) for item in status.conditions) == 4096


def test_columns_show_the_stage_that_is_at_work() -> None:
    status = StagedFineTuneStatus(
        stages=[
            stage("lower", StageState.SUCCEEDED, step=7, loss=1.5),
            stage("upper", StageState.RUNNING, step=5, loss=1.25),
        ],
        plan_digest="f",
    )
    shown = with_standing(status, STANDINGS["training"][0], generation=1, now=NOW)
    assert (shown.stage, shown.progress, shown.loss, shown.eta) == (
        *("2/2 upper", "75%", "1.2500", "1m01s"),
    )
    done = with_standing(status, STANDINGS["finished well"][0], generation=1, now=NOW)
    assert (done.stage, done.progress, done.eta) == ("2/2", "100%", "")


def test_loss_of_the_stage_before_is_shown_until_there_is_one() -> None:
    status = StagedFineTuneStatus(
        stages=[
            stage("lower", StageState.SUCCEEDED, loss=1.5),
            stage("upper", StageState.QUEUED),
        ],
        plan_digest="f",
    )
    shown = with_standing(status, STANDINGS["queued"][0], generation=1, now=NOW)
    assert (shown.loss, shown.eta) == ("1.5000", "")


@pytest.mark.parametrize(
    ("loss", "column"), [(0.0, "0.0000"), (999999.0, "999999.0000"), (-1e308, "-1.000e+308")]
)
def test_loss_of_any_size_fits_its_column(loss: float, column: str) -> None:
    status = StagedFineTuneStatus(stages=[stage("lower", StageState.RUNNING, loss=loss)])
    shown = with_standing(status, STANDINGS["training"][0], generation=1, now=NOW)
    assert shown.loss == column
