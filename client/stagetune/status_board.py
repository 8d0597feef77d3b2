"""The run's status, kept current and on disk while a local run goes on.

The same object that the operator writes to a cluster's API server. Every change is a function from
status to status; this class only holds the newest and writes it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from stagetune_api.problems import Problem, ProblemReason
from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.report import EvaluationResult, Failure, StageReport
from stagetune_api.stage import PlannedStage
from stagetune_api.status import (
    ConditionReason,
    ConditionStatus,
    ConditionType,
    RunState,
    StagedFineTuneStatus,
    StageMeasurements,
    StageState,
    StageStatus,
    format_duration,
    progress_column,
    utc_now,
    with_condition,
)

TRUE, FALSE, UNKNOWN = ConditionStatus.TRUE, ConditionStatus.FALSE, ConditionStatus.UNKNOWN


class StatusBoard:
    """Holds the status of one run and writes it whenever it changes."""

    def __init__(
        self,
        path: Path,
        *,
        on_change: Callable[[StagedFineTuneStatus], None],
        now: Callable[[], str] = utc_now,
    ) -> None:
        """Go on from the status at `path`, where there is one."""
        self._path = path
        self._on_change = on_change
        self._now = now
        try:
            self.status = read_status(path) or StagedFineTuneStatus()
        except ValidationError:
            # Damaged, or of another version: everything in it comes from the reports again.
            self.status = StagedFineTuneStatus()

    def enter(self, state: RunState, reason: ConditionReason) -> None:
        """Say that the run is at work in `state`."""
        self._update(state=state, last_failure=None)
        self._conditions(
            (ConditionType.READY, UNKNOWN, reason, ""),
            (ConditionType.SUCCEEDED, UNKNOWN, reason, ""),
            (ConditionType.RECONCILING, TRUE, reason, ""),
            (ConditionType.STALLED, FALSE, reason, ""),
            (ConditionType.SUSPENDED, FALSE, ConditionReason.NOT_SUSPENDED, ""),
            (ConditionType.FINISHED, FALSE, reason, ""),
        )

    def passed(self, type: ConditionType, reason: ConditionReason, message: str = "") -> None:
        """Say that a part of the run is done."""
        self._conditions((type, TRUE, reason, message))

    def planned(
        self,
        stages: Sequence[PlannedStage],
        *,
        plan_digest: str,
        model_digest: str,
        data_digest: str,
    ) -> None:
        """Show the stages of the plan; what is known of a stage from before is kept."""
        known = {stage.name: stage for stage in self.status.stages}
        self._update(
            plan_digest=plan_digest,
            model_digest=model_digest,
            data_digest=data_digest,
            stages=[
                known.get(stage.name)
                or StageStatus(
                    name=stage.name,
                    layers=stage.layers,
                    top_layers=stage.top_layers,
                    total_steps=stage.steps,
                    estimate=stage.estimate,
                )
                for stage in stages
            ],
        )
        self.passed(ConditionType.PLANNED, ConditionReason.PLANNED, f"{len(stages)} stages")

    def stage_started(self, index: int, attempt: int) -> None:
        """Say that a stage runs."""
        name = self.status.stages[index].name
        self._stage(index, state=StageState.RUNNING, attempts=attempt, last_failure=None)
        self._update(stage=f"{index + 1}/{len(self.status.stages)} {name}")

    def stage_progressed(self, index: int, progress: Progress) -> None:
        """Take over what a line of progress says."""
        values: dict[str, object] = {}
        if progress.kind is ProgressKind.STEP:
            values = {
                "step": progress.step,
                "loss": progress.loss,
                "tokens_per_second": progress.tokens_per_second,
                "eta_seconds": round(progress.eta_seconds or 0),
            }
        elif progress.kind is ProgressKind.VALIDATION:
            values = {"validation_loss": progress.validation_loss}
        elif progress.kind is ProgressKind.CHECKPOINT:
            values = {"checkpoint": progress.checkpoint}
        if values:
            self._stage(index, **values)
            self._columns(index)

    def stage_done(self, index: int, report: StageReport) -> None:
        """Take over a finished stage's report."""
        train = report.train
        if train is None or report.output is None:
            raise ValueError(f"the report of {report.name} holds no result")
        self._stage(
            index,
            state=StageState.SUCCEEDED,
            attempts=report.attempt,
            step=train.steps,
            loss=train.loss,
            validation_loss=train.validation_loss,
            stopped_by=train.stopped_by,
            tokens_per_second=train.tokens_per_second,
            eta_seconds=None,
            checkpoint=report.output,
            measured=StageMeasurements(
                seconds=report.seconds,
                peak_memory_bytes=report.peak_memory_bytes,
                tokens_per_second=train.tokens_per_second,
                general_loss=train.general_loss,
                kl_to_base=train.kl_to_base,
            ),
            last_failure=None,
        )
        self._columns(index)

    def stage_reset(self, index: int) -> None:
        """Say that a stage has to be done again."""
        self._stage(
            index, state=StageState.PENDING, measured=None, checkpoint=None, stopped_by=None
        )

    def stage_ended(self, index: int, state: StageState, failure: Failure | None) -> None:
        """Say that a stage was interrupted or failed."""
        self._stage(index, state=state, eta_seconds=None, last_failure=failure)

    def interrupted(self) -> None:
        """Say that the run was asked to stop and can be gone on with."""
        self._update(state=RunState.INTERRUPTED, eta="")
        self._conditions(
            (ConditionType.RECONCILING, FALSE, ConditionReason.INTERRUPTED, "run it again"),
        )

    def refused(self, problems: Sequence[Problem]) -> None:
        """Say that the plan cannot be made."""
        self._update(state=RunState.FAILED, eta="")
        does_not_fit = any(problem.reason is ProblemReason.DOES_NOT_FIT for problem in problems)
        reason = ConditionReason.DOES_NOT_FIT if does_not_fit else ConditionReason.INVALID_SPEC
        message = "\n".join(str(problem) for problem in problems)
        self._conditions(
            (ConditionType.READY, FALSE, reason, message),
            (ConditionType.SUCCEEDED, FALSE, reason, message),
            (ConditionType.RECONCILING, FALSE, reason, ""),
            (ConditionType.STALLED, TRUE, reason, message),
            (ConditionType.PLANNED, FALSE, reason, message),
        )

    def failed(self, reason: ConditionReason, failure: Failure) -> None:
        """Say that the run cannot go on by itself."""
        self._update(state=RunState.FAILED, last_failure=failure, eta="")
        message = failure.message
        self._conditions(
            (ConditionType.READY, FALSE, reason, message),
            (ConditionType.SUCCEEDED, FALSE, reason, message),
            (ConditionType.RECONCILING, FALSE, reason, ""),
            (ConditionType.STALLED, TRUE, reason, message),
            (ConditionType.FINISHED, TRUE, reason, message),
        )

    def evaluated(self, result: EvaluationResult) -> None:
        """Show the evaluation."""
        self._update(evaluation=result)
        self.passed(ConditionType.EVALUATED, ConditionReason.EVALUATED)

    def succeeded(self, export: str) -> None:
        """Say that the run is finished well."""
        self._update(state=RunState.SUCCEEDED, export=export, progress="100%", eta="")
        done = ConditionReason.COMPLETED
        self._conditions(
            (ConditionType.READY, TRUE, done, ""),
            (ConditionType.SUCCEEDED, TRUE, done, ""),
            (ConditionType.RECONCILING, FALSE, done, ""),
            (ConditionType.STALLED, FALSE, done, ""),
            (ConditionType.FINISHED, TRUE, done, ""),
        )

    def _columns(self, index: int) -> None:
        """Bring the ready-made strings of the columns up to date."""
        stage = self.status.stages[index]
        self._update(
            progress=progress_column(self.status.stages),
            loss="" if stage.loss is None else f"{stage.loss:.4f}",
            eta="" if stage.eta_seconds is None else format_duration(stage.eta_seconds),
        )

    def _stage(self, index: int, **values: object) -> None:
        stages = list(self.status.stages)
        stages[index] = stages[index].model_copy(update=values)
        self._update(stages=stages)

    def _conditions(
        self, *changes: tuple[ConditionType, ConditionStatus, ConditionReason, str]
    ) -> None:
        conditions = self.status.conditions
        for type, status, reason, message in changes:
            conditions = with_condition(
                conditions,
                type=type,
                status=status,
                reason=reason,
                message=message,
                now=self._now(),
            )
        self._update(conditions=conditions)

    def _update(self, **values: object) -> None:
        self.status = self.status.model_copy(update=values)
        # Not flushed to the disk: it is written with every step and can be derived again.
        draft = self._path.with_suffix(".tmp")
        draft.write_text(self.status.model_dump_json(indent=2, exclude_none=True), encoding="utf-8")
        draft.replace(self._path)
        self._on_change(self.status)


def read_status(path: Path) -> StagedFineTuneStatus | None:
    """Return the status at `path`, or None where there is none yet."""
    if not path.exists():
        return None
    return StagedFineTuneStatus.model_validate_json(path.read_bytes())
