"""A frozen linear module in NF4, the 4-bit format of QLoRA (arXiv 2305.14314), by bitsandbytes.

A subclass of `nn.Linear` of our own instead of bitsandbytes' `Linear4bit`: peft adapts it like any
other, whether or not it saw bitsandbytes when it was imported, and of bitsandbytes only the two
conversions are used, not the products that it chooses by the processor.
"""

import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stagetune_trainer.errors import UserError
from stagetune_trainer.large_packages import reveal

BLOCK_SIZE = 64
"""Weights that share one scale."""


def nf4_functions() -> ModuleType:
    """Import bitsandbytes and return its functions; raises ImportError where it cannot be used."""
    reveal("bitsandbytes")
    # It recommends a package that fetches code from a hub; nothing here uses what that is for.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from bitsandbytes import functional as nf4

    module: ModuleType = nf4
    return module


class Nf4Linear(nn.Linear):
    """Computes what the linear module that it is made from does, from 4-bit weights."""

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        """Quantise the weight of `linear` on `device`, block by block, scales in 8 bits."""
        # Without nn.Linear's own: it would make a weight.
        nn.Module.__init__(self)
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        packed, self._scales = nf4_functions().quantize_4bit(
            # As one row: bitsandbytes on a CPU dequantises rows that its blocks do not divide
            # wrongly.
            linear.weight.data.to(device).flatten(),
            blocksize=BLOCK_SIZE,
            compress_statistics=True,
            quant_type="nf4",
        )
        # Not a parameter: it is neither trained nor saved.
        self.register_buffer("packed", packed, persistent=False)
        self.bias = linear.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # computed: there is nothing to set
        """The weight [outputs, inputs] as it is computed with, made anew at each look."""
        weight: Tensor = nf4_functions().dequantize_4bit(self.packed, self._scales)
        return weight.view(self.out_features, self.in_features)

    def forget(self) -> None:
        """Give the memory of the scales back; the module computes nothing from then on."""
        self._scales = None

    def forward(self, input: Tensor) -> Tensor:
        """Return [..., outputs] of `input` [..., inputs], in the number format of the base."""
        output: Tensor = _Product.apply(input, self)
        return output


class _Product(torch.autograd.Function):
    """The product with a 4-bit weight, which is dequantised in each pass and never kept."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, linear: Nf4Linear) -> Tensor:
        ctx.linear = linear
        weight = linear.weight
        return functional.linear(input.to(weight.dtype), weight, linear.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.linear.weight.to(grad.dtype), None


def check_nf4() -> None:
    """Raise UserError where this machine's packages cannot compute in 4 bits."""
    try:
        packed, scales = nf4_functions().quantize_4bit(
            torch.eye(8), compress_statistics=True, quant_type="nf4"
        )
        nf4_functions().dequantize_4bit(packed, scales)
    except (ImportError, RuntimeError, NotImplementedError) as error:
        raise UserError.at(
            "spec.method.type",
            f"QLoRA needs bitsandbytes, which does not work here ({error}); install it for this "
            "machine or use LoRA",
        ) from error
