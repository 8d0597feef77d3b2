"""What trains inside a stage: one file per method, all of the same shape.

A method opens a stage's parameters in a frozen decoder, says what of them is handed on, and puts
what an earlier stage handed on back into its place. The loop knows nothing else about it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from stagetune_api.stage import PlannedStage
from stagetune_api.training_spec import LayerRange, MethodSpec, MethodType
from stagetune_trainer.decoder import Decoder


class Method(Protocol):
    """A way of training a stage."""

    def reshape(self, decoder: Decoder) -> None:
        """Give a base model the structure that stages are put onto, in training and at export."""
        return

    def compress(self, decoder: Decoder, device: torch.device) -> None:
        """Hold frozen weights smaller on `device`; only for training, outputs fit either form.

        Called with the base in host memory, before the rest of it moves to `device`.
        """
        return

    can_be_loaded_in_part: bool = True
    """Whether layers from one up are enough to `reshape` and to `open` a stage above it."""

    def lowest_layer(self, stage: PlannedStage) -> int:
        """Return the index in the reshaped decoder below which nothing of the stage trains."""
        return stage.layers.first

    def open(self, decoder: Decoder, stage: PlannedStage) -> dict[str, nn.Parameter]:
        """Make the stage's parameters trainable and return them by a stable name."""

    def keep_still(self, decoder: Decoder) -> None:
        """Switch off what is random in frozen parts of a decoder that was set to train."""
        return

    def output(self, decoder: Decoder, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the stage hands on, given its trained tensors by the names of `open`."""

    def apply(self, decoder: Decoder, layers: LayerRange, tensors: Mapping[str, Tensor]) -> None:
        """Put what a finished stage handed on into `decoder`, frozen."""


def make_method(spec: MethodSpec, master_dtype: torch.dtype = torch.float32) -> Method:
    """Return the method that `spec` names; weights that train are kept in `master_dtype`.

    Adapters are fp32 always: they are small.
    """
    # Imported here: each method may need packages that the others do not.
    match spec.type:
        case MethodType.FULL:
            from stagetune_trainer.methods.full import FullMethod

            return FullMethod(master_dtype)
        case MethodType.LORA:
            from stagetune_trainer.methods.lora import LoraMethod

            return LoraMethod(spec.lora)
        case MethodType.QLORA:
            from stagetune_trainer.methods.qlora import QloraMethod

            return QloraMethod(spec.lora)
        case MethodType.EXPAND:
            from stagetune_trainer.methods.expand import ExpandMethod

            return ExpandMethod(spec.expand, master_dtype)


def check_packages(spec: MethodSpec) -> None:
    """Raise UserError where this machine lacks a package that the method needs."""
    if spec.type is MethodType.QLORA:
        from stagetune_trainer.methods.nf4 import check_nf4

        check_nf4()


def check_model(spec: MethodSpec, directory: Path) -> None:
    """Raise UserError where the method cannot train the model in `directory`."""
    if spec.type is MethodType.EXPAND:
        from stagetune_trainer.methods.expand import check_expandable

        check_expandable(directory, spec.expand)
