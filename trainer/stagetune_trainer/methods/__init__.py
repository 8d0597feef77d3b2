"""What trains inside a stage: one file per method, all of the same shape.

A method opens a stage's parameters in a frozen decoder, says what of them is handed on, and puts
what an earlier stage handed on back into its place. The loop knows nothing else about it.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from stagetune_api.spec import LayerRange, MethodSpec, MethodType
from stagetune_api.stage import PlannedStage
from stagetune_trainer.decoder import Decoder


class Method(Protocol):
    """A way of training a stage."""

    def open(self, decoder: Decoder, stage: PlannedStage) -> dict[str, nn.Parameter]:
        """Make the stage's parameters trainable and return them by a stable name."""

    def output(self, decoder: Decoder, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the stage hands on, given its trained tensors by the names of `open`."""

    def apply(self, decoder: Decoder, layers: LayerRange, tensors: Mapping[str, Tensor]) -> None:
        """Put what a finished stage handed on into `decoder`, frozen."""


def make_method(spec: MethodSpec, master_dtype: torch.dtype = torch.float32) -> Method:
    """Return the method that `spec` names; weights that train are kept in `master_dtype`.

    Adapters are fp32 always: they are small.
    """
    # Imported here: each method may need packages that the other does not.
    if spec.type is MethodType.FULL:
        from stagetune_trainer.methods.full import FullMethod

        return FullMethod(master_dtype)
    if spec.type is MethodType.LORA:
        from stagetune_trainer.methods.lora import LoraMethod

        return LoraMethod(spec.lora)
    raise ValueError(f"method {spec.type} is not supported by this trainer")
