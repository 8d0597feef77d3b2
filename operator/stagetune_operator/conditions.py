"""Conditions and columns: the run in the words that kubectl, kstatus and people read.

Comes last in a pass. Everything is derived anew from where the run stands, so no condition can be
forgotten; only the times of change are taken from before.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from stagetune_api.status import (
    Condition,
    ConditionReason,
    ConditionStatus,
    ConditionType,
    RunState,
    StagedFineTuneStatus,
    StageState,
    format_duration,
    progress_column,
    with_condition,
)

TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a run stands after a pass, in one word and with its reason."""

    state: RunState
    reason: ConditionReason
    message: str = ""
    refusal: str = ""
    """What is wrong with the manifest, where something is."""
    is_stalled: bool = False
    """Whether a person has to act: failed for good, or the manifest is not accepted."""
    is_suspended: bool = False

    @property
    def is_over(self) -> bool:
        """Whether the run ended well or cannot go on by itself."""
        return self.is_stalled or self.state is RunState.SUCCEEDED


def with_standing(
    status: StagedFineTuneStatus, standing: Standing, *, generation: int, now: str
) -> StagedFineTuneStatus:
    """Return `status` with all conditions and columns for `standing`."""
    conditions: list[Condition] = list(status.conditions)
    for type, value, reason, message in _conditions(status, standing):
        conditions = with_condition(
            conditions,
            type=type,
            status=value,
            reason=reason,
            message=message,
            now=now,
            generation=generation,
        )
    return status.model_copy(
        update={
            "observed_generation": generation,
            "state": standing.state,
            "conditions": conditions,
            **_columns(status, standing),
        }
    )


def _conditions(
    status: StagedFineTuneStatus, standing: Standing
) -> Iterator[tuple[ConditionType, ConditionStatus, ConditionReason, str]]:
    reason, message = standing.reason, standing.message
    succeeded = standing.state is RunState.SUCCEEDED
    outcome = TRUE if succeeded else FALSE if standing.is_stalled else UNKNOWN
    is_working = not standing.is_over and not standing.is_suspended
    yield ConditionType.READY, outcome, reason, message
    yield ConditionType.SUCCEEDED, outcome, reason, message
    yield ConditionType.RECONCILING, _of(is_working), reason, message if is_working else ""
    yield ConditionType.STALLED, _of(standing.is_stalled), reason, message
    suspended = _of(standing.is_suspended)
    why = ConditionReason.SUSPENDED if standing.is_suspended else ConditionReason.NOT_SUSPENDED
    yield ConditionType.SUSPENDED, suspended, why, ""
    yield ConditionType.FINISHED, _of(standing.is_over), reason, message
    if standing.refusal:
        yield ConditionType.VALIDATED, FALSE, ConditionReason.INVALID_SPEC, standing.refusal
    else:
        yield ConditionType.VALIDATED, TRUE, ConditionReason.VALID, ""
    yield from _milestones(status, standing)


def _milestones(
    status: StagedFineTuneStatus, standing: Standing
) -> Iterator[tuple[ConditionType, ConditionStatus, ConditionReason, str]]:
    """Yield the conditions of the parts of a run, each True once its part is done."""
    tasks = {task.name: task.state for task in status.tasks}
    done = StageState.SUCCEEDED
    num_done = sum(stage.state is done for stage in status.stages)
    planned = bool(status.plan_digest)
    refused = standing.reason is ConditionReason.DOES_NOT_FIT
    parts = (
        (ConditionType.PREPARED, tasks.get("prepare") is done, ConditionReason.PREPARED, ""),
        (ConditionType.PLANNED, planned, ConditionReason.PLANNED, f"{len(status.stages)} stages"),
        (
            ConditionType.TRAINED,
            planned and num_done == len(status.stages),
            ConditionReason.TRAINED,
            f"{num_done} of {len(status.stages)} stages" if planned else "",
        ),
        (ConditionType.EVALUATED, tasks.get("evaluate") is done, ConditionReason.EVALUATED, ""),
        (ConditionType.EXPORTED, tasks.get("export") is done, ConditionReason.EXPORTED, ""),
    )
    for type, is_done, reason, message in parts:
        if is_done:
            yield type, TRUE, reason, message
        elif type is ConditionType.PLANNED and refused:
            yield type, FALSE, standing.reason, standing.message
        elif standing.is_over and (not standing.refusal or status.completion_time is not None):
            yield type, FALSE, standing.reason, ""
        else:
            yield type, UNKNOWN, ConditionReason.PENDING, message if num_done else ""


def _of(value: bool) -> ConditionStatus:
    return TRUE if value else FALSE


def _columns(status: StagedFineTuneStatus, standing: Standing) -> dict[str, str]:
    """Return the ready-made strings of the printer columns."""
    stages = status.stages
    current = next(
        (index for index, stage in enumerate(stages) if stage.state is not StageState.SUCCEEDED),
        None,
    )
    loss = next((stage.loss for stage in reversed(stages) if stage.loss is not None), None)
    columns = {"loss": "" if loss is None else _short(loss), "eta": ""}
    if standing.state is RunState.SUCCEEDED:
        return {**columns, "stage": f"{len(stages)}/{len(stages)}", "progress": "100%"}
    columns["progress"] = progress_column(stages)
    if current is None:
        return {**columns, "stage": f"{len(stages)}/{len(stages)}" if stages else ""}
    stage = stages[current]
    columns["stage"] = f"{current + 1}/{len(stages)} {stage.name}"
    if stage.eta_seconds is not None and stage.state is StageState.RUNNING:
        columns["eta"] = format_duration(stage.eta_seconds)
    return columns


def _short(loss: float) -> str:
    """Return a loss as its column takes it; one that runs away has three hundred digits."""
    return f"{loss:.4f}" if abs(loss) < 1e6 else f"{loss:.3e}"
