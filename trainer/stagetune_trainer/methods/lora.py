"""`LoRA`: adapters beside the linear modules of the stage's layers train (arXiv 2106.09685)."""

from collections.abc import Iterator, Mapping

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from stagetune_api.spec import LayerRange, LoraSpec
from stagetune_api.stage import PlannedStage
from stagetune_trainer.decoder import Decoder

_ADAPTER = "default"


class LoraMethod:
    """Adds adapters to a stage's layers; those of earlier stages stay beside their modules, frozen.

    They are not merged while training goes on, so that what is exported as an adapter is exactly
    what was trained, and bf16 weights are not rounded once per stage.
    """

    def __init__(self, spec: LoraSpec | None) -> None:
        self._spec = spec or LoraSpec()

    def open(self, decoder: Decoder, stage: PlannedStage) -> dict[str, nn.Parameter]:
        """Add adapters to the stage's layers and return their parameters by their export name."""
        self._inject(decoder, stage.layers)
        opened = {}
        for name, parameter in adapter_parameters(decoder, stage.layers):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            opened[name] = parameter
        return opened

    def output(self, decoder: Decoder, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the adapters as they were trained."""
        return dict(trained)

    @torch.no_grad()
    def apply(self, decoder: Decoder, layers: LayerRange, tensors: Mapping[str, Tensor]) -> None:
        """Add a finished stage's adapters, frozen and without dropout."""
        self._inject(decoder, layers)
        parameters = dict(adapter_parameters(decoder, layers))
        if parameters.keys() != tensors.keys():
            raise ValueError("a stage's output does not hold the adapters of its layers")
        for name, parameter in parameters.items():
            parameter.data = tensors[name].to(parameter.device)
            parameter.requires_grad_(False)

    def config(self, target_modules: list[str]) -> LoraConfig:
        """Return PEFT's configuration of adapters at `target_modules`, given by full names."""
        return LoraConfig(
            r=self._spec.rank,
            lora_alpha=self.alpha,
            lora_dropout=self._spec.dropout,
            target_modules=target_modules,
            bias="none",
            task_type="CAUSAL_LM",
        )

    @property
    def alpha(self) -> float:
        """The scale's numerator; twice the rank unless given."""
        return 2.0 * self._spec.rank if self._spec.alpha is None else self._spec.alpha

    def target_modules(self, decoder: Decoder, layers: LayerRange) -> list[str]:
        """Return the full names of the linear modules that get an adapter."""
        wanted = self._spec.target_modules
        return [
            f"{layer_name}.{name}"
            for layer_name, layer in decoder.group(layers)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear) and (wanted is None or name.split(".")[-1] in wanted)
        ]

    def _inject(self, decoder: Decoder, layers: LayerRange) -> None:
        """Add adapters to the linear modules of `layers` that have none yet."""
        existing = {name for name, _ in _adapted_modules(decoder, layers)}
        targets = [
            name
            for name in self.target_modules(decoder, layers)
            if not any(name.startswith(f"{other}.") for other in existing)
        ]
        if targets:
            inject_adapter_in_model(self.config(targets), decoder.model, adapter_name=_ADAPTER)
            # PEFT takes a model that has this for one of its own and warns of several adapters.
            del decoder.model.peft_config
        # PEFT opens every adapter there is, those of earlier stages too.
        decoder.model.requires_grad_(False)


def adapter_parameters(decoder: Decoder, layers: LayerRange) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the adapters' matrices in `layers`, named as an adapter file names them."""
    for module_name, module in _adapted_modules(decoder, layers):
        yield f"{module_name}.lora_A.weight", module.lora_A[_ADAPTER].weight
        yield f"{module_name}.lora_B.weight", module.lora_B[_ADAPTER].weight


def keep_earlier_adapters_still(decoder: Decoder) -> None:
    """Switch off the dropout of adapters that do not train."""
    for module in decoder.model.modules():
        if isinstance(module, LoraLayer) and not module.lora_A[_ADAPTER].weight.requires_grad:
            module.lora_dropout[_ADAPTER].eval()


@torch.no_grad()
def merge_adapters(decoder: Decoder) -> None:
    """Add every adapter to the weight beside it and take it away, leaving a plain model."""
    for name, module in list(decoder.model.named_modules()):
        if isinstance(module, LoraLayer):
            linear = module.get_base_layer()
            linear.weight.data = merged_weight(module).to(linear.weight.dtype)
            _take_adapter_away(decoder, name, module)


def merged_weight(module: LoraLayer) -> Tensor:
    """Return the weight of `module` with its adapter added, in fp32.

    Whoever stores it rounds once: in bf16 a small change would round away.
    """
    weight: Tensor = module.get_base_layer().weight
    delta: Tensor = module.get_delta_weight(_ADAPTER)
    return weight.float() + delta.float()


def detach_adapters(decoder: Decoder) -> dict[str, LoraLayer]:
    """Take every adapter away unmerged, leaving the base, and return them by their module's name.

    Each still holds the linear module that it stood beside, so `merged_weight` goes on to work.
    """
    adapters = {
        name: module
        for name, module in decoder.model.named_modules()
        if isinstance(module, LoraLayer)
    }
    for name, module in adapters.items():
        _take_adapter_away(decoder, name, module)
    return adapters


def _take_adapter_away(decoder: Decoder, name: str, module: LoraLayer) -> None:
    parent, _, child = name.rpartition(".")
    setattr(decoder.model.get_submodule(parent), child, module.get_base_layer())


def _adapted_modules(decoder: Decoder, layers: LayerRange) -> Iterator[tuple[str, LoraLayer]]:
    for layer_name, layer in decoder.group(layers):
        for name, module in layer.named_modules():
            if isinstance(module, LoraLayer):
                yield f"{layer_name}.{name}", module
