"""A window onto a decoder's layers: its forward pass from one border between layers to another.

Below a stage's lower border run the embeddings and the layers that it does not train, above it
everything that a step needs. Each part is the model's own forward pass, in which the layers outside
of the window let their input through: masks, rotary tables and what a family does to its embeddings
stay as they are, and every layer keeps its index.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stagetune_trainer.decoder import Decoder

_PROBE_TOKENS = 8


class WindowError(ValueError):
    """The decoder's layers do not hand one tensor from each to the next."""


class LayerWindow:
    """Runs a decoder's layers from one border to another; the decoder runs whole otherwise.

    Border n lies below layer n; that of the number of layers lies above them all.
    """

    def __init__(self, decoder: Decoder) -> None:
        """Takes over the forward passes of the layers and of the embeddings."""
        self._decoder = decoder
        self._start = 0
        self._stop = decoder.num_layers
        self._states: Tensor | None = None
        decoder.embeddings.forward = self._embed(decoder.embeddings.forward)
        for index, layer in enumerate(decoder.layers):
            layer.forward = self._layer(index, layer.forward)

    @torch.no_grad()
    def run(
        self, input_ids: Tensor, *, stop: int, start: int = 0, states: Tensor | None = None
    ) -> Tensor:
        """Return the hidden states [B, T, hidden] at border `stop`.

        They are computed from token ids [B, T], or from `states` [B, T, hidden] at border `start`,
        where the ids then decide on nothing but the shape. Raises WindowError where the decoder
        cannot be cut.
        """
        if states is not None and start == stop:
            return states
        with self._set(start, stop, states):
            self._decoder.backbone(input_ids=input_ids, use_cache=False)
            if self._states is None or self._states is states:
                raise WindowError(f"no hidden states came to layer {stop}")
            return self._states

    @contextmanager
    def above(self, start: int, states: Tensor) -> Iterator[None]:
        """Let the decoder's passes begin with `states` [B, T, hidden] at border `start`.

        Nothing below it is computed, or needs its weights; token ids decide on the shape alone.
        """
        with self._set(start, self._decoder.num_layers, states):
            yield

    @contextmanager
    def probing(self, start: int) -> Iterator[None]:
        """Let passes over one row of 8 tokens begin at border `start`, with some states or other.

        For checks of a decoder whose layers below have no weights.
        """
        if start == 0:
            yield
            return
        weight = self._decoder.head_weight
        shape = (1, _PROBE_TOKENS, weight.shape[1])
        angles = torch.arange(_PROBE_TOKENS * shape[2], dtype=torch.float32).view(shape)
        with self.above(start, angles.sin().to(weight.device, weight.dtype)):
            yield

    @contextmanager
    def _set(self, start: int, stop: int, states: Tensor | None) -> Iterator[None]:
        before = self._start, self._stop, self._states
        self._start, self._stop, self._states = start, stop, states
        try:
            yield
        finally:
            self._start, self._stop, self._states = before

    def _is_given(self, hidden: Tensor) -> bool:
        """Whether `hidden` are the states that the pass begins with."""
        # By memory: DeepSpeed hands them on as another tensor.
        return self._states is not None and hidden.is_set_to(self._states)

    def _embed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def embed(*args: Any, **kwargs: Any) -> Any:
            # Of the right shape and type; what the model makes of them is thrown away.
            return forward(*args, **kwargs) if self._start == 0 else self._states

        return embed

    def _layer(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if index < self._start:
                return self._states
            if index >= self._stop:
                return hidden
            if index == self._start > 0 and not self._is_given(hidden):
                raise WindowError(f"layer {index} is not given what the layer below it returned")
            output = forward(*args, **kwargs)
            if index == self._stop - 1 and self._stop < self._decoder.num_layers:
                if not isinstance(output, Tensor):
                    raise WindowError(
                        f"a {type(self._decoder.layers[index]).__name__} returns more"
                    )
                self._states = output
            return output

        return run
