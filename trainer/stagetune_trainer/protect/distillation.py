"""Distillation: the divergence of a model's answers from the base model's, at answer positions.

The base's distribution is its likeliest tokens and one more that stands for all others (`teacher`
computes and keeps it), so no second model is in memory. On these k + 1 outcomes
KL(base || model) = sum p (log p - log q), which is never more than over the whole vocabulary
(data-processing inequality) and equal to it where k is the vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from stagetune_trainer.loss import OutputHead


@dataclass(frozen=True, kw_only=True)
class TeacherTargets:
    """What the base model says at N positions; log-probabilities in fp32, renormalised."""

    tokens: Tensor
    """The base's likeliest tokens, [N, k] int64."""
    log_probabilities: Tensor
    """Theirs, [N, k]."""
    log_rest: Tensor | None
    """That of all other tokens together, [N]; None where there are no others."""

    def part(self, rows: slice) -> "TeacherTargets":
        """Return some of the positions."""
        rest = None if self.log_rest is None else self.log_rest[rows]
        return TeacherTargets(
            tokens=self.tokens[rows],
            log_probabilities=self.log_probabilities[rows],
            log_rest=rest,
        )


def answer_sums(
    head: OutputHead, features: Tensor, targets: Tensor, teacher: TeacherTargets
) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy and the summed KL(base || model), fp32 scalars in nats.

    `features` are [N, ...] and `targets` [N]. Both come from the same logits. As many positions as
    the hidden size are computed at once; where there are more, their logits are computed again in
    the backward pass, so that no more than these are ever held.
    """
    size = features.shape[1]
    if len(features) <= size:
        return _chunk_sums(head, features, targets, teacher)
    cross_entropy = divergence = features.new_zeros((), dtype=torch.float32)
    for start in range(0, len(features), size):
        rows = slice(start, start + size)
        first, second = checkpoint(
            _chunk_sums,
            head,
            features[rows],
            targets[rows],
            teacher.part(rows),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        cross_entropy, divergence = cross_entropy + first, divergence + second
    return cross_entropy, divergence


def _chunk_sums(
    head: OutputHead, features: Tensor, targets: Tensor, teacher: TeacherTargets
) -> tuple[Tensor, Tensor]:
    logits = full_logits(head, features)
    normaliser = logits.logsumexp(dim=-1)
    chosen = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    return (normaliser - chosen).sum(), bucket_divergence(logits, normaliser, teacher).sum()


def full_logits(head: OutputHead, features: Tensor) -> Tensor:
    """Return fp32 logits [N, vocabulary], computed in the head's own number format."""
    # As the cross entropy alone is computed: a head that trains is fp32 and stays so.
    with torch.autocast(features.device.type, enabled=False):
        return head.logits(features).float()


def bucket_divergence(logits: Tensor, normaliser: Tensor, teacher: TeacherTargets) -> Tensor:
    """Return KL(base || model) at each position, [N], of logits [N, vocabulary]."""
    found = logits.gather(1, teacher.tokens) - normaliser.unsqueeze(1)
    expected = teacher.log_probabilities
    divergence = (expected.exp() * (expected - found)).sum(dim=-1)
    if teacher.log_rest is not None:
        # Not 1 minus the others: where little is left, that is all rounding error.
        others = logits.scatter(1, teacher.tokens, float("-inf"))
        rest = others.logsumexp(dim=-1) - normaliser
        divergence = divergence + teacher.log_rest.exp() * (teacher.log_rest - rest)
    return divergence


@torch.no_grad()
def likeliest(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `top_k` likeliest tokens [N, k], their log-probabilities and the rest's [N]."""
    log_probabilities = functional.log_softmax(logits, dim=-1)
    values, tokens = log_probabilities.topk(top_k, dim=-1)
    others = log_probabilities.scatter(1, tokens, float("-inf"))
    return tokens, values, others.logsumexp(dim=-1)
