"""What one pass over a run works with: the run as it is, and the status that grows from it.

`decide` walks the tasks and `attempts` brings one of them on; both change nothing but this.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from stagetune_api.report import Failure
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.stage import PlannedStage, StageConfig, Task
from stagetune_api.status import ConditionReason, RunState, StagedFineTuneStatus, StageState
from stagetune_operator.conditions import Standing
from stagetune_operator.ownership import Owner
from stagetune_operator.plan_record import PlanRecord
from stagetune_operator.records import ProgressView, Record, begun_again, record_of, with_record
from stagetune_operator.settings import Settings
from stagetune_operator.stage_files import PREPARE, Step, build_stage_file, steps_after_prepare
from stagetune_operator.views import Object, RunObjects

_FAILED = {
    Task.PREPARE: ConditionReason.PREPARE_FAILED,
    Task.TRAIN: ConditionReason.STAGE_FAILED,
    Task.EVALUATE: ConditionReason.EVALUATION_FAILED,
    Task.EXPORT: ConditionReason.EXPORT_FAILED,
}


@dataclass(frozen=True, kw_only=True)
class Create:
    """Make an object."""

    manifest: Object
    is_optional: bool = False
    """Whether the run goes on as well without it."""


@dataclass(frozen=True, kw_only=True)
class DeleteJob:
    """Delete a Job; its pod saves and leaves first."""

    name: str
    uid: str


Action = Create | DeleteJob


@dataclass(frozen=True, kw_only=True)
class Intent:
    """An action, and the status for the case that it is refused: as far as the run came before."""

    action: Action
    fallback: StagedFineTuneStatus


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """What a decision depends on beside the run's objects."""

    settings: Settings
    now: str
    """The time of a change of condition, RFC 3339 in UTC; nothing is computed from it."""
    age: Callable[[str], float]
    """Seconds since something was first asked about, by the operator's own clock."""
    record: PlanRecord | None = None
    """The plan that the status names."""
    progress: Mapping[str, ProgressView]
    """What was last posted, by task."""
    declined: Collection[str] = ()
    """Names of optional objects that could not be made."""


@dataclass(kw_only=True)
class RunPass:
    """One pass over a run with a sound manifest."""

    owner: Owner
    spec: StagedFineTuneSpec
    objects: RunObjects
    circumstances: Circumstances
    status: StagedFineTuneStatus
    record: PlanRecord | None
    """The plan that the run follows."""
    intents: list[Intent] = field(default_factory=list)
    look_again_seconds: float | None = None
    refusal: str = ""
    """What is wrong with the manifest though the run goes on as it is."""
    offers: dict[str, str] = field(default_factory=dict)
    """Stage files for pods that stand by and whose task is due, by the pod's uid."""

    @property
    def stages(self) -> Sequence[PlannedStage]:
        """The planned stages; empty before there is a plan."""
        return self.record.plan.stages if self.record is not None else ()

    @property
    def steps(self) -> list[Step]:
        """All tasks of the run that are known by now, in order."""
        return [PREPARE, *(steps_after_prepare(self.stages) if self.stages else [])]

    def record_of(self, step: Step) -> Record:
        """Return what is known of `step`."""
        return record_of(self.status, step)

    def set(self, step: Step, /, **values: object) -> None:
        """Set `values` in what is known of `step`."""
        self.status = with_record(self.status, step, **values)

    def update(self, **values: object) -> None:
        """Set fields of the status itself."""
        self.status = self.status.model_copy(update=values)

    def begin_again(self, step: Step) -> None:
        """Let `step` be done again; earlier attempts no longer count."""
        self.status = begun_again(self.status, self.record_of(step))

    def act(self, action: Action) -> None:
        """Have `action` done before the status is written."""
        self.intents.append(Intent(action=action, fallback=self.status))

    def stage_file(self, step: Step) -> StageConfig:
        """Return what a trainer is given for `step` now."""
        return build_stage_file(
            self.owner,
            self.spec,
            step,
            facts=self.record.facts if self.record is not None else None,
            stages=self.stages,
            digests=self._digests_before(step),
            micro_batch_size=self.record_of(step).micro_batch_size,
            averaging_alpha=self._averaging_alpha,
        )

    @property
    def _averaging_alpha(self) -> float | None:
        """The share of the tuned weights that was chosen in evaluate; None where none was."""
        evaluation = self.status.evaluation
        averaging = evaluation.averaging if evaluation is not None else None
        return averaging.chosen if averaging is not None else None

    @property
    def lacks_averaging_alpha(self) -> bool:
        """Whether evaluate has to choose a share and the status does not say which it was."""
        averaging = self.spec.protection.averaging if self.spec.protection is not None else None
        is_left_open = averaging is not None and averaging.alpha is None
        return is_left_open and self._averaging_alpha is None

    def _digests_before(self, step: Step) -> list[str]:
        """Return the digests of the outputs that `step` goes on from."""
        if step == PREPARE:
            return []
        before = self.status.stages[: step.stage.index] if step.stage else self.status.stages
        return [item.checkpoint.digest for item in before if item.checkpoint is not None]

    def suspended(self) -> Standing:
        """Return the standing of a run that is suspended, with nothing at work."""
        return Standing(
            state=RunState.SUSPENDED, reason=ConditionReason.SUSPENDED, is_suspended=True
        )

    def give_up(self, step: Step, failure: Failure) -> Standing:
        """End the run: `step` failed for good."""
        self.set(step, state=StageState.FAILED, last_failure=failure)
        self.update(last_failure=failure, completion_time=self.circumstances.now)
        return Standing(
            state=RunState.FAILED,
            reason=_FAILED[step.task],
            message=f"{step.title}: {failure.message}"[:4096],
            is_stalled=True,
        )
