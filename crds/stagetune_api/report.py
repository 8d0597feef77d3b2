"""StageReport: everything that one trainer process gives back.

The whole report lies beside the weights; its short form fits a container's termination message.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from stagetune_api import names
from stagetune_api.base import ApiModel
from stagetune_api.facts import Facts
from stagetune_api.stage import Task


class Outcome(StrEnum):
    """How a trainer process ended."""

    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    INTERRUPTED = "Interrupted"


class FailureClass(StrEnum):
    """What kind of failure it was; decides whether a retry makes sense (docs/reliability.md)."""

    USER_ERROR = "UserError"
    OUT_OF_MEMORY = "OutOfMemory"
    DISRUPTED = "Disrupted"
    NODE_LOST = "NodeLost"
    DIVERGED = "Diverged"
    HUNG = "Hung"
    STORAGE_FULL = "StorageFull"
    STORAGE_ERROR = "StorageError"
    FENCED = "Fenced"
    IMAGE_ERROR = "ImageError"
    UNSCHEDULABLE = "Unschedulable"
    INTERNAL = "Internal"


class Failure(ApiModel):
    """Why a task failed."""

    failure_class: FailureClass = Field(alias="class")
    """class of the failure."""
    exit_code: int
    """exitCode of the process; negative is the signal that ended it."""
    message: Annotated[str, Field(max_length=8192)]
    """message for people, with the cure where there is one."""
    log_tail: Annotated[str, Field(max_length=8192)] = ""
    """logTail is the end of what the process logged."""
    artifact: Annotated[str, Field(max_length=4096)] | None = None
    """artifact is the path of the file or folder that was found damaged, where that was it."""


class CheckpointRef(ApiModel):
    """A published checkpoint or stage output."""

    path: Annotated[str, Field(max_length=4096)]
    """path of its folder."""
    digest: Annotated[str, Field(max_length=128)]
    """digest of its content."""
    step: Annotated[int, Field(ge=0)]
    """step of the optimizer at which it was taken."""


class StopReason(StrEnum):
    """Why a stage ended before its last step."""

    PATIENCE = "Patience"
    GAIN = "Gain"


class TrainResult(ApiModel):
    """What a training stage measured."""

    steps: int
    """steps that were taken."""
    planned_steps: int
    """plannedSteps of the plan; more than `steps` after an early stop."""
    stopped_early: bool
    """stoppedEarly says whether earlyStopping ended the stage."""
    stopped_by: StopReason | None = None
    """stoppedBy says what of earlyStopping did: its patience, or minGainPerMinute."""
    best_step: int
    """bestStep whose weights are handed on."""
    loss: float | None
    """loss of the last training step, mean over its answer tokens, in nats."""
    initial_validation_loss: float
    """initialValidationLoss before the first step."""
    validation_loss: float
    """validationLoss of what is handed on, mean over answer tokens, in nats."""
    trainable_parameters: int
    """trainableParameters of the stage."""
    tokens: int
    """tokens that went through the stage in training, padding left out."""
    tokens_per_second: float
    """tokensPerSecond of training, padding and validation left out."""
    train_seconds: float
    """trainSeconds spent in training steps, over all attempts."""
    padding_fraction: float | None = None
    """paddingFraction is the part of the positions computed in training steps that held padding and
    no token."""
    initial_general_loss: float | None = None
    """initialGeneralLoss is the base model's loss on general text, measured by the first stage."""
    general_loss: float | None = None
    """generalLoss of what is handed on: on text that was not trained on, mean over tokens, in nats;
    absent without evaluation.generalText."""
    kl_to_base: float | None = None
    """klToBase is KL(base || tuned) on validation answers, in nats a token, over the base's
    likeliest tokens and one more for all others: never above the whole vocabulary's."""


class SampleAnswer(ApiModel):
    """One validation question with its answers."""

    question: Annotated[str, Field(max_length=8192)]
    """question as the user turn holds it."""
    reference: Annotated[str, Field(max_length=8192)]
    """reference answer of the data."""
    before: Annotated[str, Field(max_length=8192)]
    """before is the base model's greedy answer."""
    after: Annotated[str, Field(max_length=8192)]
    """after is the tuned model's greedy answer."""


class ModelScores(ApiModel):
    """What one model scores."""

    validation_loss: float
    """validationLoss, mean over answer tokens, in nats."""
    exact_match: float | None = None
    """exactMatch is the share of greedy answers equal to the reference after normalisation."""
    general_loss: float | None = None
    """generalLoss on text that was not trained on, mean over tokens, in nats."""
    kl_to_base: float | None = None
    """klToBase is KL(base || tuned) on validation answer tokens, in nats a token; only after."""


class AveragingResult(ApiModel):
    """The share of the tuned weights that was chosen on the validation rows."""

    alphas: Annotated[list[float], Field(max_length=101)]
    """alphas that were tried."""
    validation_losses: Annotated[list[float], Field(max_length=101)]
    """validationLosses with each of them, mean over answer tokens, in nats."""
    chosen: float
    """chosen alpha: that of the exported model."""


class EvaluationResult(ApiModel):
    """The base model and the exported one, side by side."""

    before: ModelScores
    """before is the base model."""
    after: ModelScores
    """after is the exported model."""
    exact_match_rows: int
    """exactMatchRows that were answered."""
    samples: Annotated[list[SampleAnswer], Field(max_length=20)]
    """samples of answers before and after."""
    averaging: AveragingResult | None = None
    """averaging of base and tuned weights, where its share was left to the validation rows."""


class Timings(ApiModel):
    """When the last attempt began, and what it spent before its first step.

    From a pod's own start to `startTime` it is the container's runtime that works.
    """

    start_time: str
    """startTime at which the kernel started the process, RFC 3339 in UTC with milliseconds."""
    imports_seconds: float | None = None
    """importsSeconds from startTime until the interpreter and all of the task's code were loaded.
    """
    load_seconds: float | None = None
    """loadSeconds after that until model, data and checkpoint were verified and in place; of a
    training stage alone."""
    first_step_time: str | None = None
    """firstStepTime at which the attempt's first step was done, in the form of startTime; the
    validation before the first step lies before it."""


class StageReport(ApiModel):
    """How one task of a run ended."""

    api_version: Literal["stagetune.io/v1alpha1"] = "stagetune.io/v1alpha1"
    """apiVersion of this file."""
    kind: Literal["StageReport"] = "StageReport"
    """kind of this file."""
    task: Task | None = None
    """task that was done; absent where the process could not read which."""
    name: str
    """name of the stage, or of the task in lower case."""
    attempt: int
    """attempt that wrote this report; 0 where it failed before it had a number."""
    outcome: Outcome
    """outcome of the task."""
    failure: Failure | None = None
    """failure, unless it succeeded."""
    seconds: float = 0.0
    """seconds that the process took, imports and loading included, over all attempts."""
    timings: Timings | None = None
    """timings of the last attempt's start."""
    peak_memory_bytes: int = 0
    """peakMemoryBytes: of the GPU where there is one, else the resident memory of the process."""
    device: str = "cpu"
    """device that did the work."""
    facts: Facts | None = None
    """facts that prepare measured."""
    output: CheckpointRef | None = None
    """output that was published."""
    train: TrainResult | None = None
    """train is what a training stage measured."""
    evaluation: EvaluationResult | None = None
    """evaluation of the base and the exported model."""
    export: str | None = None
    """export is the path of the exported folder."""

    def termination_message(self) -> str:
        """Return the report as JSON of at most 4,096 bytes; log and samples are cut first.

        Raises ValueError where what is left is still longer: the facts of a model whose layers
        have some sixty linear modules each.
        """
        short = self
        if self.evaluation is not None:
            evaluation = self.evaluation.model_copy(update={"samples": []})
            short = short.model_copy(update={"evaluation": evaluation})
        for budget in (1024, 256, 0):
            text = _with_failure_text(short, budget).model_dump_json(exclude_none=True)
            if len(text.encode()) <= names.TERMINATION_MESSAGE_MAX_BYTES:
                return text
        raise ValueError(
            f"the report of {self.name} has {len(text.encode())} bytes and does not fit a "
            f"termination message of {names.TERMINATION_MESSAGE_MAX_BYTES}"
        )


def _with_failure_text(report: StageReport, budget: int) -> StageReport:
    """Return `report` with each text of its failure cut to `budget` characters.

    A path is whole or it is not there: half of one names another file.
    """
    if report.failure is None:
        return report
    artifact = report.failure.artifact
    failure = report.failure.model_copy(
        update={
            "message": report.failure.message[: max(budget, 128)],
            "log_tail": report.failure.log_tail[-budget:] if budget else "",
            "artifact": artifact if artifact and len(artifact) <= max(budget, 512) else None,
        }
    )
    return report.model_copy(update={"failure": failure})
