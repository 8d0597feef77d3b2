"""The training loop of a stage: the only one, for every method.

Comes after `train` has loaded the model and opened the stage's parameters. It ends with the last
step, with patience, with a request to stop, or with numbers that are no longer finite, and knows
nothing of layers, methods or folders.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch

from stagetune_api.progress import ProgressKind
from stagetune_api.report import StopReason
from stagetune_api.stage import PlannedStage
from stagetune_api.training_spec import EarlyStoppingSpec, LearningRateSchedule, TrainingSpec
from stagetune_trainer.data.batch import Batch
from stagetune_trainer.errors import DivergedError, InterruptedRunError
from stagetune_trainer.loss import AnswerLoss
from stagetune_trainer.memory import peak_memory_bytes
from stagetune_trainer.metrics import ProgressLog
from stagetune_trainer.model import Numerics
from stagetune_trainer.protect.objective import ANSWERS, Objective
from stagetune_trainer.ranks import ALONE, Ranks
from stagetune_trainer.training_state import LoopState, RandomState, TrainingState
from stagetune_trainer.update import Update


class StopRequest(Protocol):
    """Whether somebody asked the process to save and leave."""

    @property
    def requested(self) -> bool:
        """True from the moment of the request."""


@dataclass(frozen=True, kw_only=True)
class StageLoop:
    """What the loop works on; all of it is made before the first step."""

    stage: PlannedStage
    training: TrainingSpec
    numerics: Numerics
    loss: AnswerLoss
    """Summed cross entropy of a micro-batch: what validation looks at."""
    objective: Objective
    """What the steps minimise: that loss and what protection adds."""
    update: Update
    """From gradients to new parameters."""
    micro_batches: Callable[[int], Sequence[Batch]]
    """The micro-batches of step n, n from 0, whatever was computed before."""
    validation_batches: Callable[[], Iterable[Batch]]
    """All validation rows, in micro-batches."""
    save: Callable[[TrainingState, RandomState], None]
    """Publishes a checkpoint."""
    stop: StopRequest
    log: ProgressLog
    ranks: Ranks = ALONE
    """The processes that share the rows of a batch; each runs this loop, and all decide alike."""


def train(loop: StageLoop, state: TrainingState) -> None:
    """Take the stage from where `state` stands to its end; the best parameters are then in place.

    Raises InterruptedRunError after saving, when asked to stop, and DivergedError before anything
    of a step with a loss or gradient that is not finite is saved.
    """
    stage, progress = loop.stage, state.loop
    saved_at = time.monotonic()
    while True:
        if _validation_is_due(stage, progress):
            validation_loss = validate(loop)
            if validation_loss is None:
                _save_and_leave(loop, state, RandomState.capture())
            _judge(state, validation_loss, loop.training.early_stopping)
            _log_validation(loop, progress)
        if progress.step == stage.steps or progress.stopped_early:
            break

        started = time.monotonic()
        random_state = RandomState.capture()
        batches = loop.micro_batches(progress.step)
        counts = loop.objective.counts(batches)
        learning_rate = learning_rate_at(progress.step, stage, loop.training)
        loop.ranks.seed_step(loop.training.seed, stage.index, progress.step)
        loop.update.begin(learning_rate)
        own_sums: defaultdict[str, float] = defaultdict(float)
        shares = list(loop.ranks.deal(batches))
        for number, (batch, is_own) in enumerate(shares, start=1):
            if loop.ranks.any(loop.stop.requested):
                # The step is given up and will be computed anew from the same random state.
                _save_and_leave(loop, state, random_state)
            is_last = number == len(shares)
            found = _accumulate(loop, batch, counts, weight=is_own, is_last=is_last)
            for name, value in found.items():
                own_sums[name] += value
        sums = loop.ranks.sums_by_name(own_sums, counts)
        losses = {name: value / counts[name] for name, value in sums.items()}
        loss = losses[ANSWERS]
        grad_norm = loop.update.gradient_norm()
        if not all(map(math.isfinite, [*losses.values(), grad_norm])):
            raise DivergedError(
                f"step {progress.step + 1}: loss {_said(losses)}, gradient norm {grad_norm}; lower "
                "spec.training.learningRate or raise warmupRatio in a run of another name. "
                f"{loop.update.when_not_finite}"
            )
        loop.update.apply()

        # One clock decides, or processes would differ on when to stop and when to save.
        now = time.monotonic()
        seconds, unsaved_seconds = loop.ranks.of_first([now - started, now - saved_at])
        tokens = sum(batch.num_tokens for batch in batches)
        padding = sum(batch.num_padding_tokens for batch in batches)
        progress.step += 1
        progress.loss = loss
        progress.tokens += tokens
        progress.padding_tokens += padding
        progress.train_seconds += seconds
        loop.log.write(
            ProgressKind.STEP,
            step=progress.step,
            total_steps=stage.steps,
            loss=loss,
            losses=losses if len(losses) > 1 else None,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            tokens=progress.tokens,
            tokens_per_second=tokens / seconds,
            padding_fraction=padding / (tokens + padding),
            step_seconds=seconds,
            eta_seconds=progress.train_seconds / progress.step * (stage.steps - progress.step),
            peak_memory_bytes=peak_memory_bytes(loop.numerics.device),
        )
        if unsaved_seconds >= loop.training.checkpoint_interval_seconds:
            loop.save(state, RandomState.capture())
            saved_at = time.monotonic()

    state.restore_best()


def _validation_is_due(stage: PlannedStage, progress: LoopState) -> bool:
    """Whether the validation loss at this step is wanted and not known yet."""
    wanted = progress.step % stage.validation_interval == 0 or progress.step == stage.steps
    return wanted and progress.validated_step != progress.step


def _save_and_leave(loop: StageLoop, state: TrainingState, random_state: RandomState) -> NoReturn:
    loop.save(state, random_state)
    raise InterruptedRunError(f"saved after step {state.loop.step} of {loop.stage.steps}")


def _accumulate(
    loop: StageLoop, batch: Batch, counts: Mapping[str, int], *, weight: bool, is_last: bool
) -> dict[str, float]:
    """Add a micro-batch's gradients and return the sums of its terms.

    Divided by the counts of the whole batch, so that any split into micro-batches gives the
    gradient of the batch's mean losses. Without a `weight` it is only computed.
    """
    with loop.numerics.autocast():
        sums = loop.objective.sums(batch)
    loss = loop.objective.weighted(sums, counts)
    loop.update.backward(loss if weight else 0.0 * loss, is_last=is_last)
    return {name: float(value.detach()) for name, value in sums.items()} if weight else {}


def _said(losses: Mapping[str, float]) -> str:
    """Return the losses of a step in words."""
    if len(losses) == 1:
        return str(losses[ANSWERS])
    return ", ".join(f"{value} ({name})" for name, value in losses.items())


@torch.no_grad()
def validate(loop: StageLoop) -> float | None:
    """Return the mean loss over all validation answers, in nats; None when asked to stop."""
    model = loop.loss.decoder.model
    training_modules = [module for module in model.modules() if module.training]
    model.train(False)
    loss_sum, count = 0.0, 0.0
    for batch, is_own in loop.ranks.deal(loop.validation_batches()):
        if loop.ranks.any(loop.stop.requested):
            return None
        with loop.numerics.autocast():
            batch_loss, batch_count = loop.loss.of(batch)
        if is_own:
            loss_sum += float(batch_loss)
            count += batch_count
    loss_sum, count = loop.ranks.sums([loss_sum, count])
    for module in training_modules:
        module.training = True
    return loss_sum / count


def learning_rate_at(step: int, stage: PlannedStage, training: TrainingSpec) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up, then constant or cosine.

    The first step of a warm-up has a rate above zero, and the cosine reaches zero only after the
    last step, so that no step is wasted.
    """
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / (stage.warmup_steps + 1)
    if training.learning_rate_schedule is LearningRateSchedule.CONSTANT:
        return stage.learning_rate
    done = (step - stage.warmup_steps) / (stage.steps - stage.warmup_steps)
    return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _judge(
    state: TrainingState, validation_loss: float, early_stopping: EarlyStoppingSpec | None
) -> None:
    """Compare the new validation loss with the best, and count the patience down.

    The state before the first step is judged too: a stage that only does harm hands on what it got.
    """
    progress = state.loop
    if not math.isfinite(validation_loss):
        raise DivergedError(f"step {progress.step}: validation loss {validation_loss}")
    if _gains_too_slowly(progress, validation_loss, early_stopping):
        progress.stopped_by = StopReason.GAIN
    progress.validation_loss = validation_loss
    progress.validated_step = progress.step
    progress.validated_train_seconds = progress.train_seconds
    if progress.step == 0:
        progress.initial_validation_loss = validation_loss
    if progress.best_validation_loss is None or validation_loss < progress.best_validation_loss:
        progress.best_validation_loss = validation_loss
        progress.best_step = progress.step
        if state.keeps_best:
            state.keep_best()
    # What is handed on is the best; minDelta decides on patience alone.
    min_delta = early_stopping.min_delta if early_stopping else 0.0
    reference = progress.patience_reference
    if reference is None or validation_loss < reference - min_delta:
        progress.patience_reference = validation_loss
        progress.validations_without_gain = 0
    else:
        progress.validations_without_gain += 1
    if early_stopping and progress.validations_without_gain >= early_stopping.patience:
        progress.stopped_by = StopReason.PATIENCE
    progress.stopped_early = progress.stopped_by is not None


def _gains_too_slowly(
    progress: LoopState, validation_loss: float, early_stopping: EarlyStoppingSpec | None
) -> bool:
    """Whether the fall since the validation before is below minGainPerMinute.

    Minutes are those of training steps; before the first step there is nothing to compare.
    """
    bound = early_stopping.min_gain_per_minute if early_stopping else None
    before = progress.validation_loss
    if bound is None or before is None:
        return False
    minutes = (progress.train_seconds - progress.validated_train_seconds) / 60
    return before - validation_loss < bound * minutes


def _log_validation(loop: StageLoop, progress: LoopState) -> None:
    loop.log.write(
        ProgressKind.VALIDATION,
        step=progress.step,
        total_steps=loop.stage.steps,
        validation_loss=progress.validation_loss,
    )
