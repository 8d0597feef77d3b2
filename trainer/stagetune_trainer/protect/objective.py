"""The objective of a step: the loss on answers and what protection adds to it, term by term.

Each term is a mean over the whole batch: its sums over micro-batches divided by the batch's count.
So every split of a batch into micro-batches gives the same gradient within rounding.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from stagetune_trainer.data.batch import Batch
from stagetune_trainer.loss import AnswerLoss
from stagetune_trainer.protect.anchor import Anchor
from stagetune_trainer.protect.distillation import answer_sums
from stagetune_trainer.protect.teacher import Teacher

ANSWERS, DISTILLATION, ANCHOR, REPLAY = "answers", "distillation", "anchor", "replay"


class Objective:
    """What a stage minimises: the weighted sum of its terms."""

    def __init__(
        self,
        loss: AnswerLoss,
        *,
        teacher: Teacher | None = None,
        distillation_weight: float = 0.0,
        anchor: Anchor | None = None,
        anchor_weight: float = 0.0,
        replay_weight: float = 0.0,
    ) -> None:
        """Without a teacher, an anchor and replayed rows it is the loss on answers alone."""
        self._loss = loss
        self._teacher = teacher
        self._anchor = anchor
        self.weights: Mapping[str, float] = {
            ANSWERS: 1.0,
            DISTILLATION: distillation_weight,
            ANCHOR: anchor_weight,
            REPLAY: replay_weight,
        }
        """Weight of each term's mean over the batch."""

    def counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """Return what the sums of a whole batch are divided by, by term."""
        answers = sum(batch.num_answer_tokens for batch in batches if not batch.is_replay)
        tokens = sum(batch.num_tokens for batch in batches if not batch.is_replay)
        replayed = sum(batch.num_answer_tokens for batch in batches if batch.is_replay)
        return {ANSWERS: answers, DISTILLATION: answers, ANCHOR: tokens, REPLAY: replayed}

    def sums(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of a micro-batch, each an fp32 scalar that is summed over tokens."""
        device = self._loss.decoder.device
        if batch.is_replay:
            return {REPLAY: self._loss.of(batch)[0]}
        if self._anchor is None:
            features, targets = self._loss.features_of(batch)
        else:
            features, targets = self._loss.features_of(batch, before_pass=self._anchor.arm)
        sums: dict[str, Tensor] = {}
        if self._teacher is None:
            sums[ANSWERS] = self._loss.head.cross_entropy_sum(features, targets)
        else:
            teacher = self._teacher.targets(batch, device)
            sums[ANSWERS], sums[DISTILLATION] = answer_sums(
                self._loss.head, features, targets, teacher
            )
        if self._anchor is not None:
            sums[ANCHOR] = self._anchor.distance_sum(batch)
        return sums

    def weighted(self, sums: Mapping[str, Tensor], counts: Mapping[str, int]) -> Tensor:
        """Return a micro-batch's share of the objective, a scalar to be differentiated."""
        shares = [self.weights[name] * (value / counts[name]) for name, value in sums.items()]
        return sum(shares[1:], start=shares[0])
