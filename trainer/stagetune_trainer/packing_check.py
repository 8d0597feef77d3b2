"""Whether a model keeps rows that share a sequence apart: tried out before a stage trains.

transformers makes a mask for the rows of a sequence where positions begin anew. A family may not
ask for that mask, may count positions in another way, or may carry a state from token to token. No
list of names says which, so the model itself is asked.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stagetune_trainer.decoder import Decoder
from stagetune_trainer.errors import UserError
from stagetune_trainer.prefix.window import LayerWindow

_LENGTHS = (5, 3, 4)
_RELATIVE_ERRORS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""How far a row's hidden states may be from those it has alone, by the format of the weights."""


def check_packing(decoder: Decoder, window: LayerWindow, first: int) -> None:
    """Raise UserError where rows of one sequence see each other, or are not as they are alone.

    `first` is the lowest layer that has weights. Dropout has to be off.
    """
    reason = why_not_packed(decoder, window, first)
    if reason is not None:
        raise UserError.at(
            "spec.training.packing",
            f"true is not possible for a {decoder.model.config.model_type} model: {reason}; leave "
            "packing out, or use groupByLength for less padding",
        )


@torch.no_grad()
def why_not_packed(decoder: Decoder, window: LayerWindow, first: int) -> str | None:
    """Return why rows of one sequence are not what they are alone; None where they are."""
    probe = _Probe(decoder, window, first)
    try:
        packed = probe.hidden_states(_LENGTHS)
    except (TypeError, ValueError) as error:
        return f"it takes no positions ({error})"
    rows = torch.split(packed, list(_LENGTHS))
    for index in range(len(_LENGTHS)):
        # What is masked counts for exactly nothing, so not a bit may differ.
        others = torch.split(probe.hidden_states(_LENGTHS, changed=index), list(_LENGTHS))
        same = [torch.equal(a, b) for a, b in zip(rows, others, strict=True)]
        if same.pop(index) or not all(same):
            return "rows of one sequence see each other"
    bound = _RELATIVE_ERRORS.get(packed.dtype, max(_RELATIVE_ERRORS.values()))
    for index, row in enumerate(rows):
        alone = probe.hidden_states(_LENGTHS[index : index + 1], skipped=sum(_LENGTHS[:index]))
        if float((row - alone).norm() / alone.norm()) > bound:
            return "a row's hidden states in a sequence are not those that it has alone"
    return None


class _Probe:
    """Passes over three short rows of some tokens, or of some states at border `first`."""

    def __init__(self, decoder: Decoder, window: LayerWindow, first: int) -> None:
        self._decoder = decoder
        self._window = window
        self._first = first

    def hidden_states(
        self, lengths: Sequence[int], *, skipped: int = 0, changed: int | None = None
    ) -> Tensor:
        """Return what the head sees [T, hidden] of rows that share a sequence.

        The first `skipped` of all tokens are left out; row `changed` has others than usual.
        """
        places = torch.arange(skipped, skipped + sum(lengths))
        if changed is not None:
            start = sum(lengths[:changed])
            places[start : start + lengths[changed]] += sum(_LENGTHS)
        weight = self._decoder.head_weight
        tokens = (1 + places % (len(weight) - 1)).unsqueeze(0).to(weight.device)
        positions = torch.cat([torch.arange(length) for length in lengths])
        options = {"position_ids": positions.unsqueeze(0).to(weight.device)}
        if len(lengths) == 1:
            options = {}
        if self._first == 0:
            return self._run(tokens, options)
        angles = torch.outer(1.0 + places, torch.arange(1.0, 1.0 + weight.shape[1]))
        states = angles.sin().unsqueeze(0).to(weight.device, weight.dtype)
        with self._window.above(self._first, states):
            return self._run(tokens, options)

    def _run(self, tokens: Tensor, options: dict[str, Tensor]) -> Tensor:
        output = self._decoder.backbone(input_ids=tokens, use_cache=False, **options)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden
