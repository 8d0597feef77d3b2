"""Events: what is worth telling of the change from one status to the next, few and with reasons.

An event's reason is that of the condition it goes with.
"""

from collections.abc import Iterator
from typing import NamedTuple

from stagetune_api.status import (
    Condition,
    ConditionReason,
    ConditionStatus,
    ConditionType,
    StagedFineTuneStatus,
    StageState,
)
from stagetune_operator.records import records_of

_TOLD = (
    ConditionType.PREPARED,
    ConditionType.PLANNED,
    ConditionType.EVALUATED,
    ConditionType.EXPORTED,
    ConditionType.SUSPENDED,
)


class Event(NamedTuple):
    """An event about a run."""

    type: str
    """Normal or Warning."""
    reason: str
    message: str


def events_between(before: StagedFineTuneStatus, after: StagedFineTuneStatus) -> list[Event]:
    """Return the events of the change from `before` to `after`."""
    return [
        *_milestones(before, after),
        *_stages(before, after),
        *_failures(before, after),
        *_standing(before, after),
    ]


def _milestones(before: StagedFineTuneStatus, after: StagedFineTuneStatus) -> Iterator[Event]:
    for type in _TOLD:
        condition = _condition(after, type)
        if condition is not None and _is_true(condition) and not _is_true(_condition(before, type)):
            yield Event("Normal", condition.reason, condition.message or type)


def _stages(before: StagedFineTuneStatus, after: StagedFineTuneStatus) -> Iterator[Event]:
    done = {item.name for item in before.stages if item.state is StageState.SUCCEEDED}
    for index, stage in enumerate(after.stages):
        if stage.state is not StageState.SUCCEEDED or stage.name in done:
            continue
        loss = stage.validation_loss
        shown = "" if loss is None else f", validation loss {loss:.4f}"
        place = f"{index + 1}/{len(after.stages)}"
        yield Event("Normal", ConditionReason.TRAINED, f"stage {place} {stage.name} is done{shown}")


def _failures(before: StagedFineTuneStatus, after: StagedFineTuneStatus) -> Iterator[Event]:
    """Yield a warning for each failed attempt; `_standing` tells of the last one."""
    known = {
        (item.name, item.last_failure.message)
        for item in records_of(before)
        if item.last_failure is not None
    }
    for item in records_of(after):
        failure = item.last_failure
        if failure is None or item.state is StageState.FAILED:
            continue
        if (item.name, failure.message) not in known:
            text = f"{item.name}, attempt {item.attempts}: {failure.failure_class}: "
            yield Event("Warning", ConditionReason.RETRYING, text + failure.message)


def _standing(before: StagedFineTuneStatus, after: StagedFineTuneStatus) -> Iterator[Event]:
    stalled, finished = ConditionType.STALLED, ConditionType.FINISHED
    now, earlier = _condition(after, stalled), _condition(before, stalled)
    if now is not None and _is_true(now):
        if earlier is None or not _is_true(earlier) or earlier.message != now.message:
            yield Event("Warning", now.reason, now.message)
    elif _is_true(_condition(after, finished)) and not _is_true(_condition(before, finished)):
        yield Event("Normal", ConditionReason.COMPLETED, f"the result is in {after.export}")
    if after.retry_number > before.retry_number and before.start_time is not None:
        yield Event(
            "Normal", ConditionReason.RETRYING, f"begun again by order {after.retry_number}"
        )


def _condition(status: StagedFineTuneStatus, type: ConditionType) -> Condition | None:
    return next((item for item in status.conditions if item.type is type), None)


def _is_true(condition: Condition | None) -> bool:
    return condition is not None and condition.status is ConditionStatus.TRUE
