"""Status: what a run says about itself, the same on a cluster and on one machine."""

from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stagetune_api.base import ApiModel
from stagetune_api.report import CheckpointRef, EvaluationResult, Failure, StopReason
from stagetune_api.stage import StageEstimate
from stagetune_api.training_spec import LayerRange


class ConditionType(StrEnum):
    """Conditions of a run. The first six follow kstatus and Kubernetes' own habits."""

    READY = "Ready"
    SUCCEEDED = "Succeeded"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    SUSPENDED = "Suspended"
    FINISHED = "Finished"
    VALIDATED = "Validated"
    PREPARED = "Prepared"
    PLANNED = "Planned"
    TRAINED = "Trained"
    EVALUATED = "Evaluated"
    EXPORTED = "Exported"


class ConditionStatus(StrEnum):
    """Status of a condition."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class ConditionReason(StrEnum):
    """Reasons of conditions, and of the events that go with them."""

    PENDING = "Pending"
    VALID = "Valid"
    INVALID_SPEC = "InvalidSpec"
    PREPARING = "Preparing"
    PREPARED = "Prepared"
    PREPARE_FAILED = "PrepareFailed"
    PLANNED = "Planned"
    DOES_NOT_FIT = "DoesNotFit"
    TRAINING = "Training"
    TRAINED = "Trained"
    STAGE_FAILED = "StageFailed"
    EXPORTING = "Exporting"
    EXPORTED = "Exported"
    EXPORT_FAILED = "ExportFailed"
    EVALUATING = "Evaluating"
    EVALUATED = "Evaluated"
    EVALUATION_FAILED = "EvaluationFailed"
    INTERRUPTED = "Interrupted"
    SUSPENDED = "Suspended"
    SUSPENDING = "Suspending"
    NOT_SUSPENDED = "NotSuspended"
    COMPLETED = "Completed"
    QUEUED = "Queued"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_ERROR = "ImageError"
    CANNOT_CREATE = "CannotCreate"
    NAME_CONFLICT = "NameConflict"
    RETRYING = "Retrying"
    STARTED_STAGE_CHANGED = "StartedStageChanged"


class RunState(StrEnum):
    """The run in one word, for the State column."""

    PENDING = "Pending"
    QUEUED = "Queued"
    PREPARING = "Preparing"
    TRAINING = "Training"
    EXPORTING = "Exporting"
    EVALUATING = "Evaluating"
    SUSPENDED = "Suspended"
    INTERRUPTED = "Interrupted"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class StageState(StrEnum):
    """A stage or another task in one word."""

    PENDING = "Pending"
    QUEUED = "Queued"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    INTERRUPTED = "Interrupted"
    FAILED = "Failed"


class Condition(ApiModel):
    """A condition as in metav1.Condition."""

    type: ConditionType
    """type of the condition."""
    status: ConditionStatus
    """status of the condition."""
    reason: ConditionReason
    """reason in one CamelCase word."""
    message: Annotated[str, Field(max_length=4096)] = ""
    """message for people."""
    last_transition_time: Annotated[
        str, Field(max_length=64, json_schema_extra={"format": "date-time"})
    ]
    """lastTransitionTime at which `status` last changed."""
    observed_generation: Annotated[int, Field(ge=0)] = 0
    """observedGeneration of the spec that this condition speaks of."""


class StageMeasurements(ApiModel):
    """What a stage really took."""

    seconds: float
    """seconds of its processes, imports and loading included."""
    peak_memory_bytes: int
    """peakMemoryBytes: of the GPU where there is one, else of the process."""
    tokens_per_second: float
    """tokensPerSecond in training steps."""
    general_loss: float | None = None
    """generalLoss of what was handed on, on text that was not trained on, in nats a token."""
    kl_to_base: float | None = None
    """klToBase of what was handed on: KL(base || tuned) on validation answers, in nats a token."""


class StageStatus(ApiModel):
    """One stage as it stands."""

    name: Annotated[str, Field(max_length=64)]
    """name of the stage."""
    layers: LayerRange
    """layers that it opens."""
    top_layers: LayerRange | None = None
    """topLayers that it opens too, where some stay frozen between them and `layers`."""
    state: StageState = StageState.PENDING
    """state of the stage in one word."""
    attempts: int = 0
    """attempts that were started; on a cluster each is a Job."""
    attempts_before: int = 0
    """attemptsBefore are those of the attempts that no longer count: from before the task was begun
    again, and those that a suspension ended."""
    disruptions: int = 0
    """disruptions from outside that a pod of the stage was ended by; they do not count as
    attempts."""
    micro_batch_size: int | None = None
    """microBatchSize that the stage trains with where it ran out of memory with the manifest's."""
    queued_seconds: float | None = None
    """queuedSeconds from the making of the last Job to the start of its container."""
    handoff_seconds: float | None = None
    """handoffSeconds from the end of the previous stage's container to this one's first step."""
    gpu_seconds: float | None = None
    """gpuSeconds of all its containers together: how long they ran, times the GPUs of each."""
    step: int = 0
    """step of the optimizer that is done."""
    total_steps: int = 0
    """totalSteps of the plan."""
    loss: float | None = None
    """loss of the last reported step."""
    validation_loss: float | None = None
    """validationLoss, last computed; once the stage is done, that of what it handed on."""
    stopped_by: StopReason | None = None
    """stoppedBy says what of earlyStopping ended the stage, where it ended before its last step."""
    tokens_per_second: float | None = None
    """tokensPerSecond, last reported."""
    eta_seconds: int | None = None
    """etaSeconds until the stage's last step."""
    checkpoint: CheckpointRef | None = None
    """checkpoint last published; once the stage is done, its output."""
    estimate: StageEstimate | None = None
    """estimate of the plan."""
    measured: StageMeasurements | None = None
    """measured values, once the stage is done."""
    last_failure: Failure | None = None
    """lastFailure of the stage."""


class TaskStatus(ApiModel):
    """A task that is no stage, as it stands: prepare, evaluate or export."""

    name: Annotated[str, Field(max_length=64)]
    """name of the task in lower case."""
    state: StageState = StageState.PENDING
    """state of the task in one word."""
    attempts: int = 0
    """attempts that were started; on a cluster each is a Job."""
    attempts_before: int = 0
    """attemptsBefore are those of the attempts that no longer count: from before the task was begun
    again, and those that a suspension ended."""
    disruptions: int = 0
    """disruptions from outside; they do not count as attempts."""
    micro_batch_size: int | None = None
    """microBatchSize of the task where it ran out of memory with the manifest's."""
    last_failure: Failure | None = None
    """lastFailure of the task."""


class StagedFineTuneStatus(ApiModel):
    """The run as it stands."""

    observed_generation: int = 0
    """observedGeneration of the spec that this status speaks of."""
    state: RunState = RunState.PENDING
    """state of the run in one word."""
    stage: Annotated[str, Field(max_length=128)] = ""
    """stage that runs, as `2/7 layers-4-7`."""
    progress: Annotated[str, Field(max_length=16)] = ""
    """progress over all planned steps, as `43%`."""
    loss: Annotated[str, Field(max_length=32)] = ""
    """loss last reported, for the column."""
    eta: Annotated[str, Field(max_length=32)] = ""
    """eta of the running stage, for the column."""
    plan_digest: Annotated[str, Field(max_length=128)] = ""
    """planDigest of the plan that the stages follow."""
    model_digest: Annotated[str, Field(max_length=128)] = ""
    """modelDigest of the prepared base model."""
    data_digest: Annotated[str, Field(max_length=128)] = ""
    """dataDigest of the tokenised rows."""
    conditions: Annotated[list[Condition], Field(max_length=16)] = Field(default_factory=list)
    """conditions of the run, one of each type."""
    stages: Annotated[list[StageStatus], Field(max_length=128)] = Field(default_factory=list)
    """stages in running order."""
    tasks: Annotated[list[TaskStatus], Field(max_length=8)] = Field(default_factory=list)
    """tasks beside the stages; only on a cluster."""
    retry_number: int = 0
    """retryNumber of the last order in spec.retry that was followed."""
    claim_name: Annotated[str, Field(max_length=253)] = ""
    """claimName of the PersistentVolumeClaim with the run's files; only on a cluster."""
    directory: Annotated[str, Field(max_length=4096)] = ""
    """directory of the run's files from the volume's root; only on a cluster."""
    start_time: Annotated[
        str | None, Field(max_length=64, json_schema_extra={"format": "date-time"})
    ] = None
    """startTime at which the run was first seen."""
    completion_time: Annotated[
        str | None, Field(max_length=64, json_schema_extra={"format": "date-time"})
    ] = None
    """completionTime at which the run succeeded or failed."""
    evaluation: EvaluationResult | None = None
    """evaluation of the base and the exported model."""
    export: Annotated[str, Field(max_length=4096)] = ""
    """export is the path of the exported folder."""
    last_failure: Failure | None = None
    """lastFailure of the run's preparation, export or evaluation."""


def with_condition(
    conditions: Sequence[Condition],
    *,
    type: ConditionType,
    status: ConditionStatus,
    reason: ConditionReason,
    message: str = "",
    now: str,
    generation: int = 0,
) -> list[Condition]:
    """Return `conditions` with the one of `type` set; its transition time moves only with `status`.

    `now` is an RFC 3339 time in UTC.
    """
    previous = next((item for item in conditions if item.type is type), None)
    changed = previous is None or previous.status is not status
    condition = Condition(
        type=type,
        status=status,
        reason=reason,
        message=message[:4096],
        last_transition_time=now if previous is None or changed else previous.last_transition_time,
        observed_generation=generation,
    )
    kept = [item for item in conditions if item.type is not type]
    order = list(ConditionType)
    return sorted([*kept, condition], key=lambda item: order.index(item.type))


def utc_now() -> str:
    """Return the time as RFC 3339 in UTC, to the second: what conditions are dated with."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def progress_column(stages: Sequence[StageStatus]) -> str:
    """Return the part of all planned steps that is done, as `43%`; empty without a plan.

    A stage that ended early counts whole.
    """
    total = sum(stage.total_steps for stage in stages)
    done = sum(
        stage.total_steps
        if stage.state is StageState.SUCCEEDED
        else min(stage.step, stage.total_steps)
        for stage in stages
    )
    return f"{100 * done // total}%" if total else ""


def format_duration(seconds: float) -> str:
    """Return a duration as people write it: `42s`, `3m05s`, `2h10m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
