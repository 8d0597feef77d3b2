"""Progress: one line of what a trainer process says while it works.

Each is a JSON line on standard output, and the same lines make `metrics.jsonl`.
"""

from enum import StrEnum

from stagetune_api.base import ApiModel
from stagetune_api.report import CheckpointRef
from stagetune_api.stage import Task


class ProgressKind(StrEnum):
    """What a line speaks of."""

    MESSAGE = "Message"
    STEP = "Step"
    VALIDATION = "Validation"
    CHECKPOINT = "Checkpoint"
    METERS = "Meters"


class Progress(ApiModel):
    """One line of progress."""

    kind: ProgressKind
    """kind of the line."""
    task: Task
    """task that is at work."""
    name: str
    """name of the stage, or of the task in lower case."""
    attempt: int
    """attempt at the task."""
    time: str
    """time of the line, RFC 3339 in UTC."""
    message: str | None = None
    """message for people."""
    step: int | None = None
    """step of the optimizer that is done."""
    total_steps: int | None = None
    """totalSteps of the plan."""
    loss: float | None = None
    """loss of the step, mean over its answer tokens, in nats."""
    losses: dict[str, float] | None = None
    """losses of the step by term, before their weights, where there is more than that on answers:
    answers, distillation, anchor, replay."""
    validation_loss: float | None = None
    """validationLoss, mean over answer tokens, in nats."""
    general_loss: float | None = None
    """generalLoss on text that is not trained on, mean over tokens, in nats."""
    kl_to_base: float | None = None
    """klToBase on validation answers, in nats a token."""
    learning_rate: float | None = None
    """learningRate of the step."""
    grad_norm: float | None = None
    """gradNorm of the stage's gradients before clipping."""
    tokens: int | None = None
    """tokens that went through the stage so far, padding left out."""
    tokens_per_second: float | None = None
    """tokensPerSecond of the step."""
    padding_fraction: float | None = None
    """paddingFraction is the part of the step's positions that held padding and no token."""
    step_seconds: float | None = None
    """stepSeconds that the step took, from its first row to the optimizer's update."""
    eta_seconds: float | None = None
    """etaSeconds until the last step, at the mean pace so far."""
    peak_memory_bytes: int | None = None
    """peakMemoryBytes of the process so far."""
    checkpoint: CheckpointRef | None = None
    """checkpoint that was published."""
