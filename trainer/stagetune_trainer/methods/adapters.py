"""The adapters in a decoder: finding them, naming their tensors, merging them.

peft's LoRA layers hold them. A layer may have several under different names; their tensors are
named as a PEFT adapter file names them, without the adapter's own name: each stage has a file of
its own.
"""

from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from stagetune_trainer.decoder import Decoder

FACTOR_A, FACTOR_B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
"""The tensors of an adapter: [rank, inputs], [outputs, rank] and, with DoRA, [outputs]."""


def adapted_modules(decoder: Decoder) -> Iterator[tuple[str, LoraLayer]]:
    """Yield every module that holds adapters with its full name, bottom to top."""
    for name, module in decoder.model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def adapter_tensors(
    module_name: str, module: LoraLayer, adapter: str
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the tensors of one adapter of `module`, named as an adapter file names them."""
    yield f"{module_name}.{FACTOR_A}", module.lora_A[adapter].weight
    yield f"{module_name}.{FACTOR_B}", module.lora_B[adapter].weight
    if adapter in module.lora_magnitude_vector:
        yield f"{module_name}.{MAGNITUDE}", module.lora_magnitude_vector[adapter].weight


def module_of(tensor_name: str) -> str:
    """Return the full name of the module that an adapter's tensor belongs to."""
    for suffix in (FACTOR_A, FACTOR_B, MAGNITUDE):
        if tensor_name.endswith(f".{suffix}"):
            return tensor_name.removesuffix(f".{suffix}")
    raise ValueError(f"{tensor_name} is no tensor of an adapter")


def use_all_adapters(decoder: Decoder) -> None:
    """Let every adapter take part in the forward pass, and let none of them train."""
    for _, module in adapted_modules(decoder):
        module.set_adapter(list(module.lora_A))
    # PEFT opens whatever it adds or activates.
    decoder.model.requires_grad_(False)


def keep_earlier_adapters_still(decoder: Decoder) -> None:
    """Switch off the dropout of adapters that do not train."""
    for _, module in adapted_modules(decoder):
        for adapter, dropout in module.lora_dropout.items():
            if not module.lora_A[adapter].weight.requires_grad:
                dropout.eval()


class Fp32Dora(DoraLinearLayer):  # type: ignore[misc]  # peft is not typed
    """peft's DoRA with lengths of rows computed in fp32.

    In bf16 the length of a row is off by up to 0.2 %, and so would be every weight of the row as
    soon as the magnitudes meet weights in another number format, as they do at export.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(fan_in_fan_out=False)
        self.weight = nn.Parameter(torch.linalg.norm(weight.float(), dim=1))

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        """Return the fp32 length [outputs] of each row of the adapted weight [outputs, inputs]."""
        length: Tensor = torch.linalg.norm(weight.float() + scaling * lora_weight.float(), dim=1)
        return length


@torch.no_grad()
def merge_adapters(decoder: Decoder) -> None:
    """Put every adapter into the weight beside it and take it away, leaving a plain model."""
    for name, module in list(adapted_modules(decoder)):
        weight = module.get_base_layer().weight
        weight.data = merged_weight(module).to(weight.dtype)
        _take_adapters_away(decoder, name, module)


def detach_adapters(decoder: Decoder) -> dict[str, LoraLayer]:
    """Take every adapter away unmerged, leaving the base, and return them by their module's name.

    Each still holds the linear module that it stood beside, so `merged_weight` goes on to work.
    """
    adapted = dict(adapted_modules(decoder))
    for name, module in adapted.items():
        _take_adapters_away(decoder, name, module)
    return adapted


def _take_adapters_away(decoder: Decoder, name: str, module: LoraLayer) -> None:
    parent, _, child = name.rpartition(".")
    setattr(decoder.model.get_submodule(parent), child, module.get_base_layer())


def merged_weight(module: LoraLayer) -> Tensor:
    """Return the fp32 weight that computes what `module` does with all of its adapters.

    Whoever stores it rounds once: in bf16 a small change would round away.
    """
    weight: Tensor = module.get_base_layer().weight.float()
    for adapter in module.lora_A:
        weight = weight + module.get_delta_weight(adapter).float()
    for dora in module.lora_magnitude_vector.values():
        length = torch.linalg.norm(weight, dim=1)
        weight = weight * (dora.weight.float() / length).unsqueeze(1)
    return weight
