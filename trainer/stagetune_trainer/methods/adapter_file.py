"""The finished stages' adapters as one adapter that PEFT loads: its tensors and configuration.

Adapters that lie on one module add up. As factors they are put side by side, so the sum of their
ranks is the rank of one adapter that computes the same.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from torch import Tensor

from stagetune_api.training_spec import AdapterScope, LoraSpec
from stagetune_trainer.methods.adapters import FACTOR_A, FACTOR_B, MAGNITUDE, module_of
from stagetune_trainer.methods.lora import LoraMethod


@dataclass(frozen=True)
class Adapter:
    """One adapter over all of its modules."""

    tensors: dict[str, Tensor]
    """Its tensors, by the module's full name and the tensor's own."""
    config: LoraConfig
    """PEFT's configuration of it."""


def join_adapters(outputs: Sequence[Mapping[str, Tensor]], spec: LoraSpec) -> Adapter:
    """Return one adapter that does what those of all stages do, given oldest first."""
    by_module: dict[str, list[dict[str, Tensor]]] = {}
    for output in outputs:
        modules: dict[str, dict[str, Tensor]] = {}
        for name, tensor in output.items():
            module = module_of(name)
            modules.setdefault(module, {})[name.removeprefix(f"{module}.")] = tensor
        for module, parts in modules.items():
            earlier = by_module.get(module, [])
            # A shared adapter went on from what it was: the newest is the trained one.
            shared = spec.adapters is AdapterScope.SHARED
            by_module[module] = [parts] if shared else [*earlier, parts]
    joined = {name: _side_by_side(parts, spec) for name, parts in by_module.items()}
    tensors = {
        f"{module}.{name}": tensor
        for module, (parts, _) in joined.items()
        for name, tensor in parts.items()
    }
    alphas = {module: alpha for module, (_, alpha) in joined.items()}
    return Adapter(tensors=tensors, config=_config(tensors, alphas, spec))


def _side_by_side(
    adapters: Sequence[Mapping[str, Tensor]], spec: LoraSpec
) -> tuple[dict[str, Tensor], float]:
    """Return the factors of one adapter that is the sum of `adapters`, and its alpha."""
    method = LoraMethod(spec)
    if len(adapters) == 1:
        return dict(adapters[0]), method.alpha(len(adapters[0][FACTOR_A]))
    if any(MAGNITUDE in adapter for adapter in adapters):
        raise ValueError("adapters with magnitudes do not add up")
    ranks = [len(adapter[FACTOR_A]) for adapter in adapters]
    scales = [method.alpha(rank) / _divisor(rank, spec) for rank in ranks]
    # One scale for all: what differs from the first one's goes into the second factor.
    factors = [
        adapter[FACTOR_B] * (scale / scales[0])
        for adapter, scale in zip(adapters, scales, strict=True)
    ]
    parts = {
        FACTOR_A: torch.cat([adapter[FACTOR_A] for adapter in adapters]),
        FACTOR_B: torch.cat(factors, dim=1),
    }
    return parts, scales[0] * _divisor(sum(ranks), spec)


def _divisor(rank: int, spec: LoraSpec) -> float:
    """Return what alpha is divided by for the scale."""
    return float(rank**0.5 if spec.rank_stabilized else rank)


def _config(
    tensors: Mapping[str, Tensor], alphas: Mapping[str, float], spec: LoraSpec
) -> LoraConfig:
    """Return the configuration: the commonest rank and alpha for all, others by module."""
    ranks = {module: len(tensors[f"{module}.{FACTOR_A}"]) for module in alphas}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = LoraMethod(spec).config(list(alphas), rank)
    config.lora_alpha = alpha
    config.rank_pattern = {name: value for name, value in ranks.items() if value != rank}
    config.alpha_pattern = {name: value for name, value in alphas.items() if value != alpha}
    return config
