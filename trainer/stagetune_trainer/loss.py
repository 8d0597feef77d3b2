"""The loss on answer tokens: the head sees only positions that have a label.

Everything else a row holds (template, question, padding) costs no head computation and no logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stagetune_trainer.data.batch import Batch
from stagetune_trainer.decoder import Decoder
from stagetune_trainer.prefix.states import PrefixStates

IGNORED = -100
"""Label of positions without a loss, as everywhere in the field."""


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """From the features at a position to the logits of the next token.

    Features are the last hidden states, or the model's own logits where there is no other way.
    """

    module: nn.Module | None
    """The language-model head; None where features are logits."""
    weight: Tensor | None
    """The head's matrix [vocabulary, hidden]."""
    softcap: float | None
    """Bound of the logits as in Gemma 2, where the model has one."""

    def logits(self, features: Tensor) -> Tensor:
        """Return logits [..., vocabulary] of features [..., hidden or vocabulary]."""
        if self.module is None or self.weight is None:
            return features
        logits: Tensor = self.module(features.to(self.weight.dtype))
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def cross_entropy_sum(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the summed cross entropy (fp32 scalar, nats) of features [N, ...]."""
        if self.module is None or self.weight is None or self.softcap is not None:
            logits = self.logits(features).float()
            return functional.cross_entropy(logits, targets, reduction="sum")
        # Below this size torch's own documentation finds the unchunked path cheaper.
        chunked = features.shape[0] >= features.shape[1]
        with torch.autocast(features.device.type, enabled=False):
            losses = functional.linear_cross_entropy(
                features.to(self.weight.dtype),
                self.weight,
                targets,
                linear_bias=self.module.bias,  # type: ignore[arg-type]  # None or [vocabulary]
                reduction="none",
                options=nn.LinearCrossEntropyOptions() if chunked else None,
            )
        # Summed here and not by torch: in bf16 its chunked path adds up in bf16, which was 2 % off
        # at 600 tokens.
        return losses.float().sum()


class AnswerLoss:
    """Cross entropy of a decoder's answers, summed over tokens.

    Models differ in what stands between the last hidden state and the logits. The plain head and
    Gemma's soft cap are computed here, at labelled positions only; a probe at construction compares
    them with the model's own logits, and any model that does something else computes its logits
    itself, at all positions.
    """

    def __init__(self, decoder: Decoder, prefix: PrefixStates | None = None) -> None:
        """With a `prefix`, passes over batches begin with the hidden states that it gives."""
        self.decoder = decoder
        self._prefix = prefix
        self.head = OutputHead(
            module=decoder.head,
            weight=decoder.head_weight,
            softcap=getattr(
                decoder.model.config.get_text_config(), "final_logit_softcapping", None
            ),
        )
        if not self._computes_the_model_s_logits():
            self.head = OutputHead(module=None, weight=None, softcap=None)

    @torch.no_grad()
    def _computes_the_model_s_logits(self) -> bool:
        """Whether the head's logits computed here are the model's own."""
        model = self.decoder.model
        tokens = torch.arange(1, 9, device=self.decoder.device).unsqueeze(0)
        was_training = model.training
        model.train(False)
        expected = model(input_ids=tokens, use_cache=False).logits
        found = self.head.logits(self._hidden_states(tokens))
        model.train(was_training)
        return torch.allclose(found.float(), expected.float(), rtol=1e-5, atol=1e-6)

    def _hidden_states(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Return what the head sees, [B, T, hidden], for token ids [B, T].

        Rows are padded on the right, so causal attention alone keeps padding away from real tokens
        and no mask is needed; without one the fastest attention kernels apply. Where positions
        begin anew inside of a sequence, transformers makes the mask that keeps its rows apart.
        """
        output = self.decoder.backbone(input_ids=input_ids, **_inputs(position_ids))
        hidden: Tensor = output.last_hidden_state
        return hidden

    def features(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return features [N, ...] of the positions before answer tokens, and those tokens [N].

        All are [B, T] int64; a label stands at the position of its own token, and `position_ids`
        are given where rows share a sequence.
        """
        targets = labels[:, 1:]
        labelled = targets != IGNORED
        if self.head.module is None:
            features = self.decoder.model(input_ids=input_ids, **_inputs(position_ids)).logits
        else:
            features = self._hidden_states(input_ids, position_ids)
        return features[:, :-1][labelled], targets[labelled]

    def features_of(
        self, batch: Batch, before_pass: Callable[[], None] = lambda: None
    ) -> tuple[Tensor, Tensor]:
        """Return features [N, ...] of the positions before answer tokens, and those tokens [N].

        `before_pass` is called when the states that the pass begins with are there.
        """
        tensors = batch.on(self.decoder.device)
        if self._prefix is None:
            before_pass()
            return self.features(*tensors)
        states = self._prefix.of(batch)
        before_pass()
        with self._prefix.window.above(self._prefix.first, states):
            return self.features(*tensors)

    def of(self, batch: Batch) -> tuple[Tensor, int]:
        """Return the summed cross entropy in nats (fp32 scalar) and the number of answer tokens."""
        features, targets = self.features_of(batch)
        return self.head.cross_entropy_sum(features, targets), len(targets)

    def __call__(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """Return the same for token ids and labels [B, T], through the whole decoder."""
        features, targets = self.features(input_ids, labels, position_ids)
        return self.head.cross_entropy_sum(features, targets), len(targets)


def _inputs(position_ids: Tensor | None) -> dict[str, Any]:
    """Return what a model is given beside token ids."""
    # Without positions it counts them itself, and makes no mask.
    packed = {} if position_ids is None else {"position_ids": position_ids}
    return {"use_cache": False, **packed}
