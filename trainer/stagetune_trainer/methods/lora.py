"""`LoRA`: adapters beside the linear modules of the stage's layers train (arXiv 2106.09685).

With rsLoRA's scale (arXiv 2312.03732), DoRA's magnitudes (arXiv 2402.09353), ranks that differ by
stage, and an adapter for each stage where a layer is opened again.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from stagetune_api.stage import PlannedStage
from stagetune_api.training_spec import AdapterScope, LayerRange, LoraSpec
from stagetune_trainer.decoder import Decoder
from stagetune_trainer.methods import Method
from stagetune_trainer.methods.adapters import (
    FACTOR_A,
    Fp32Dora,
    adapted_modules,
    adapter_tensors,
    keep_earlier_adapters_still,
    module_of,
    use_all_adapters,
)

_SHARED_ADAPTER = "default"


class LoraMethod(Method):
    """Adds adapters to a stage's layers; those of earlier stages stay beside their modules, frozen.

    They are not merged while training goes on, so that what is exported as an adapter is exactly
    what was trained, and bf16 weights are not rounded once per stage.
    """

    def __init__(self, spec: LoraSpec | None) -> None:
        self._spec = spec or LoraSpec()

    def open(self, decoder: Decoder, stage: PlannedStage) -> dict[str, nn.Parameter]:
        """Add adapters to the stage's layers and return their parameters by their export name."""
        targets = self.target_modules(decoder, stage)
        rank = stage.rank or self._spec.rank
        adapter = self._add(decoder, dict.fromkeys(targets, rank))
        opened = {}
        for name, parameter in _tensors_of(decoder, adapter, targets):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            opened[name] = parameter
        return opened

    def keep_still(self, decoder: Decoder) -> None:
        """Switch off the dropout of adapters that do not train."""
        keep_earlier_adapters_still(decoder)

    def output(self, decoder: Decoder, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the adapters as they were trained."""
        return dict(trained)

    @torch.no_grad()
    def apply(self, decoder: Decoder, layers: LayerRange, tensors: Mapping[str, Tensor]) -> None:
        """Add a finished stage's adapters, frozen and without dropout.

        Modules and ranks are those of the tensors. Raises ValueError where they are not those of
        an adapter of this method, or do not fit one that is there already.
        """
        ranks = {
            module_of(name): len(tensor)
            for name, tensor in tensors.items()
            if name.endswith(FACTOR_A)
        }
        adapter = self._add(decoder, ranks)
        parameters = dict(_tensors_of(decoder, adapter, list(ranks)))
        if parameters.keys() != tensors.keys():
            raise ValueError("a stage's output does not hold the adapters of its layers")
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(
                    f"{name} is {list(tensors[name].shape)} in a stage's output and "
                    f"{list(parameter.shape)} in the adapter that its layer has"
                )
            parameter.data = tensors[name].to(parameter.device)

    def target_modules(self, decoder: Decoder, stage: PlannedStage) -> list[str]:
        """Return the full names of the linear modules that get an adapter, bottom to top."""
        wanted = self._spec.target_modules
        return [
            f"{layer_name}.{name}"
            for layer_name, layer in decoder.opened(stage)
            for name, module in _linear_modules(layer)
            if wanted is None or name.rpartition(".")[2] in wanted
        ]

    def alpha(self, rank: int) -> float:
        """Return the scale's numerator for adapters of `rank`; twice the rank unless given."""
        return 2.0 * rank if self._spec.alpha is None else self._spec.alpha

    def config(self, target_modules: Sequence[str], rank: int) -> LoraConfig:
        """Return PEFT's configuration of adapters at `target_modules`, given by full names."""
        return LoraConfig(
            r=rank,
            lora_alpha=self.alpha(rank),
            lora_dropout=self._spec.dropout,
            use_rslora=self._spec.rank_stabilized,
            use_dora=self._spec.dora,
            target_modules=list(target_modules),
            bias="none",
            task_type="CAUSAL_LM",
        )

    def _add(self, decoder: Decoder, ranks: Mapping[str, int]) -> str:
        """Add frozen adapters of the given rank by module, and return the name that they have.

        A shared adapter that is there already is kept.
        """
        adapters = {name: list(module.lora_A) for name, module in adapted_modules(decoder)}
        adapter = _SHARED_ADAPTER
        if self._spec.adapters is AdapterScope.PER_STAGE:
            adapter = f"stage{len({name for there in adapters.values() for name in there})}"
        missing = {name: r for name, r in ranks.items() if adapter not in adapters.get(name, [])}
        for rank in sorted(set(missing.values())):
            targets = [name for name in missing if missing[name] == rank]
            inject_adapter_in_model(self.config(targets, rank), decoder.model, adapter_name=adapter)
            # PEFT takes a model that has this for one of its own and warns of several adapters.
            del decoder.model.peft_config
        if self._spec.dora:
            _compute_lengths_in_fp32(decoder, adapter, missing)
        use_all_adapters(decoder)
        return adapter


def _linear_modules(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a layer's own linear modules with their names, those under adapters by their own."""
    inside = ".base_layer"
    for name, module in layer.named_modules():
        is_part_of_adapter = ".lora_A." in name or ".lora_B." in name
        if isinstance(module, nn.Linear) and not is_part_of_adapter:
            yield name.removesuffix(inside), module


def _tensors_of(
    decoder: Decoder, adapter: str, modules: Sequence[str]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the tensors of `adapter` at `modules`; raises ValueError where one has none."""
    adapted = dict(adapted_modules(decoder))
    for name in modules:
        if name not in adapted:
            raise ValueError(f"{name} is no linear module of this model")
        yield from adapter_tensors(name, adapted[name], adapter)


def _compute_lengths_in_fp32(decoder: Decoder, adapter: str, modules: Mapping[str, int]) -> None:
    for name, module in adapted_modules(decoder):
        if name in modules:
            module.lora_magnitude_vector[adapter] = Fp32Dora(module.get_base_layer().weight)
