"""Forgetting, measured at the end of every stage: general text, and how far answers have moved.

Both are forward passes over few rows. KL(base || model) is over the base's likeliest tokens and one
more for all others: a lower bound of what the Evaluate task finds over the whole vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from stagetune_api.stage import StageConfig
from stagetune_trainer.data.batch import Batch
from stagetune_trainer.data.batches import FixedRows, open_general_rows, open_validation_rows
from stagetune_trainer.loss import AnswerLoss
from stagetune_trainer.model import Numerics
from stagetune_trainer.protect.distillation import answer_sums
from stagetune_trainer.protect.teacher import Teacher
from stagetune_trainer.ranks import ALONE, Ranks


@dataclass(frozen=True, kw_only=True)
class Meters:
    """What is measured of a model beside its validation loss."""

    loss: AnswerLoss
    numerics: Numerics
    teacher: Teacher
    """The base model's distribution on validation answers."""
    validation: FixedRows
    general: FixedRows | None
    """Text that is not trained on; None where the manifest names none."""
    is_asked_to_stop: Callable[[], bool]
    """A stage that is done and asked to leave has no time for meters."""
    ranks: Ranks = ALONE
    """The processes that share the rows."""

    def general_loss(self) -> float | None:
        """Return the loss on general text, mean over tokens, in nats."""
        if self.general is None:
            return None
        return self._mean(self.general, self.loss.of)

    def kl_to_base(self) -> float | None:
        """Return KL(base || model) on validation answers, mean over tokens, in nats."""

        def divergence(batch: Batch) -> tuple[torch.Tensor, int]:
            features, targets = self.loss.features_of(batch)
            teacher = self.teacher.targets(batch, self.numerics.device)
            return answer_sums(self.loss.head, features, targets, teacher)[1], len(targets)

        return self._mean(self.validation, divergence)

    @torch.no_grad()
    def _mean(
        self, rows: FixedRows, measure: Callable[[Batch], tuple[torch.Tensor, int]]
    ) -> float | None:
        """Return the mean of `measure` over tokens; None where the process is asked to stop."""
        model = self.loss.decoder.model
        training_modules = [module for module in model.modules() if module.training]
        model.train(False)
        total, count = 0.0, 0.0
        try:
            for batch, is_own in self.ranks.deal(rows.batches()):
                if self.is_asked_to_stop():
                    return None
                with self.numerics.autocast():
                    batch_sum, batch_count = measure(batch)
                if is_own:
                    total += float(batch_sum)
                    count += batch_count
        finally:
            for module in training_modules:
                module.training = True
        total, count = self.ranks.sums([total, count])
        return total / count


def open_meters(
    config: StageConfig,
    loss: AnswerLoss,
    numerics: Numerics,
    teacher: Teacher,
    is_asked_to_stop: Callable[[], bool],
    ranks: Ranks,
) -> Meters:
    """Return the meters of a stage."""
    return Meters(
        loss=loss,
        numerics=numerics,
        teacher=teacher,
        validation=open_validation_rows(config),
        general=open_general_rows(config) if config.evaluation.general_text is not None else None,
        is_asked_to_stop=is_asked_to_stop,
        ranks=ranks,
    )
