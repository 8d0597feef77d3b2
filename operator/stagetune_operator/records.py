"""A run's status, task by task: what is known of each, and taking over what its pods say.

The status is the operator's memory over restarts. Every function takes a status and returns a new
one.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from pydantic import ValidationError

from stagetune_api.report import StageReport
from stagetune_api.stage import PlannedStage, Task
from stagetune_api.status import (
    StagedFineTuneStatus,
    StageMeasurements,
    StageState,
    StageStatus,
    TaskStatus,
)
from stagetune_operator.stage_files import Step
from stagetune_operator.views import Object, PodView, seconds_between

Record = StageStatus | TaskStatus
_MAX_ROUNDS = 1000
_TASKS = tuple(task.value.lower() for task in (Task.PREPARE, Task.EVALUATE, Task.EXPORT))


class ProgressView(Protocol):
    """What a trainer last posted; None is unknown."""

    @property
    def pod_uid(self) -> str: ...
    @property
    def step(self) -> int | None: ...
    @property
    def loss(self) -> float | None: ...
    @property
    def validation_loss(self) -> float | None: ...
    @property
    def tokens_per_second(self) -> float | None: ...
    @property
    def eta_seconds(self) -> float | None: ...


def read_status(run: Object) -> StagedFineTuneStatus:
    """Return the run's status; what this version does not know of a newer one's is left out."""
    body: Any = run.get("status") or {}
    for _ in range(_MAX_ROUNDS):
        try:
            return StagedFineTuneStatus.model_validate(body)
        except ValidationError as error:
            first, *others = error.errors(include_url=False, include_input=False)
            # Keys go all at once, there may be one in each of a hundred stages. Everything else
            # goes one by one, for an item that goes moves those after it.
            keys = [item for item in others if item["type"] == first["type"] == "extra_forbidden"]
            for item in (first, *keys):
                body = _without(body, item["loc"])
    raise ValueError("the status cannot be read")


def _without(body: Any, location: Sequence[str | int]) -> Any:
    """Return `body`, a tree of dicts and lists, without the deepest thing at `location`."""
    if not location:
        return {}
    head, *rest = location
    if isinstance(body, list) and isinstance(head, int) and head < len(body):
        changed = _without(body[head], rest) if rest else None
        kept = [changed] if rest and changed is not None else []
        return [*body[:head], *kept, *body[head + 1 :]]
    if isinstance(body, dict) and head in body:
        if rest and isinstance(body[head], (dict, list)):
            return {**body, head: _without(body[head], rest)}
        return {key: value for key, value in body.items() if key != head}
    # A required field is missing below: the item that lacks it goes.
    return None


def records_of(status: StagedFineTuneStatus) -> list[Record]:
    """Return what is known of every stage and task."""
    return [*status.stages, *status.tasks]


def records_in_order(status: StagedFineTuneStatus) -> list[Record]:
    """Return what is known of all tasks of a run, in the order in which they are done."""
    tasks = {item.name: item for item in status.tasks}
    first, *last = [tasks.get(name, TaskStatus(name=name)) for name in _TASKS]
    return [first, *status.stages, *last] if status.stages else [first]


def record_of(status: StagedFineTuneStatus, step: Step) -> Record:
    """Return what is known of `step`."""
    if step.stage is not None:
        return next(item for item in status.stages if item.name == step.stage.name)
    found = (item for item in status.tasks if item.name == step.key)
    return next(found, TaskStatus(name=step.key))


def with_record(status: StagedFineTuneStatus, step: Step, /, **values: Any) -> StagedFineTuneStatus:
    """Return `status` with `values` set in what is known of `step`."""
    return _with(status, record_of(status, step).model_copy(update=values))


def _with(status: StagedFineTuneStatus, record: Record) -> StagedFineTuneStatus:
    if isinstance(record, StageStatus):
        stages = [record if item.name == record.name else item for item in status.stages]
        return status.model_copy(update={"stages": stages})
    others = [item for item in status.tasks if item.name != record.name]
    tasks = sorted([*others, record], key=lambda item: _TASKS.index(item.name))
    return status.model_copy(update={"tasks": tasks})


def with_stages(
    status: StagedFineTuneStatus, stages: Sequence[PlannedStage]
) -> StagedFineTuneStatus:
    """Return `status` with the stages of a plan; what is known of a started one is kept.

    Of one that is to be done again its attempts are: their Jobs are still there.
    """
    known = {item.name: item for item in status.stages}
    planned = [_as_planned(stage, known.get(stage.name)) for stage in stages]
    return status.model_copy(update={"stages": planned})


def _as_planned(stage: PlannedStage, known: StageStatus | None) -> StageStatus:
    if known is not None and known.state is not StageState.PENDING:
        return known
    planned = {
        "layers": stage.layers,
        "top_layers": stage.top_layers,
        "total_steps": stage.steps,
        "estimate": stage.estimate,
    }
    if known is not None:
        return known.model_copy(update=planned)
    return StageStatus(name=stage.name, **planned)


def begun_again(status: StagedFineTuneStatus, record: Record) -> StagedFineTuneStatus:
    """Return `status` with the task of `record` to be done again; attempts so far do not count."""
    values: dict[str, Any] = {
        "state": StageState.PENDING,
        "attempts_before": record.attempts,
        "last_failure": None,
    }
    if isinstance(record, StageStatus):
        values |= {"measured": None, "step": 0, "eta_seconds": None, "handoff_seconds": None}
        values |= {"stopped_by": None}
    return _with(status, record.model_copy(update=values))


def progress_values(progress: ProgressView) -> dict[str, Any]:
    """Return the fields of a stage that a post changes; what it does not say stays."""
    eta = progress.eta_seconds
    values = {
        "step": progress.step,
        "loss": progress.loss,
        "validation_loss": progress.validation_loss,
        "tokens_per_second": progress.tokens_per_second,
        "eta_seconds": None if eta is None else round(eta),
    }
    return {name: value for name, value in values.items() if value is not None}


def trained_values(
    report: StageReport, pods: Sequence[PodView], *, previous_end: str | None, num_gpus: int
) -> dict[str, Any]:
    """Return the fields of a stage that its report and its pods fill once it is done."""
    train = report.train
    if train is None or report.output is None:
        raise ValueError(f"the report of {report.name} holds no result")
    first_step = report.timings.first_step_time if report.timings is not None else None
    return {
        "state": StageState.SUCCEEDED,
        "step": train.steps,
        "loss": train.loss,
        "validation_loss": train.validation_loss,
        "stopped_by": train.stopped_by,
        "tokens_per_second": train.tokens_per_second,
        "eta_seconds": None,
        "checkpoint": report.output,
        "measured": StageMeasurements(
            seconds=report.seconds,
            peak_memory_bytes=report.peak_memory_bytes,
            tokens_per_second=train.tokens_per_second,
            general_loss=train.general_loss,
            kl_to_base=train.kl_to_base,
        ),
        "gpu_seconds": num_gpus * sum(pod.seconds for pod in pods),
        "handoff_seconds": seconds_between(previous_end, first_step),
        "last_failure": None,
    }
