"""`LoRA`: adapters beside the linear modules of the stage's layers train (arXiv 2106.09685)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

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
        targets = self.target_modules(decoder, stage.layer_ranges)
        self._inject(decoder, targets, stage.rank)
        opened = {}
        for name, parameter in adapter_parameters(decoder, stage.layer_ranges):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            opened[name] = parameter
        return opened

    def output(self, decoder: Decoder, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the adapters as they were trained."""
        return dict(trained)

    @torch.no_grad()
    def apply(self, decoder: Decoder, layers: LayerRange, tensors: Mapping[str, Tensor]) -> None:
        """Add a finished stage's adapters, frozen and without dropout.

        Which modules they stand beside, and their rank, is what `tensors` say: a stage may open
        more than the one range `layers`.
        """
        ranks = adapter_ranks(tensors)
        for rank in sorted(set(ranks.values())):
            self._inject(decoder, [name for name in ranks if ranks[name] == rank], rank)
        everything = LayerRange(first=0, last=decoder.num_layers - 1)
        parameters = {
            name: parameter
            for name, parameter in adapter_parameters(decoder, [everything])
            if name in tensors
        }
        if parameters.keys() != tensors.keys():
            raise ValueError("a stage's output holds adapters of modules that the model has not")
        for name, parameter in parameters.items():
            parameter.data = tensors[name].to(parameter.device)
            parameter.requires_grad_(False)

    def config(self, target_modules: Sequence[str], rank: int | None = None) -> LoraConfig:
        """Return PEFT's configuration of adapters at `target_modules`, given by full names.

        `rank` is that of the stage where it has one of its own.
        """
        rank = rank or self._spec.rank
        return LoraConfig(
            r=rank,
            lora_alpha=self.alpha(rank),
            lora_dropout=self._spec.dropout,
            target_modules=list(target_modules),
            bias="none",
            task_type="CAUSAL_LM",
        )

    def config_of_ranks(self, ranks: Mapping[str, int]) -> LoraConfig:
        """Return PEFT's configuration of adapters whose modules have `ranks` of their own."""
        config = self.config(list(ranks))
        other = {name: rank for name, rank in ranks.items() if rank != config.r}
        config.rank_pattern = other
        config.alpha_pattern = {name: self.alpha(rank) for name, rank in other.items()}
        return config

    def alpha(self, rank: int) -> float:
        """Return the scale's numerator; twice the rank unless given."""
        return 2.0 * rank if self._spec.alpha is None else self._spec.alpha

    def target_modules(self, decoder: Decoder, ranges: Iterable[LayerRange]) -> list[str]:
        """Return the full names of the linear modules that get an adapter."""
        wanted = self._spec.target_modules
        return [
            f"{layer_name}.{name}"
            for layer_name, layer in decoder.groups(ranges)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear) and (wanted is None or name.split(".")[-1] in wanted)
        ]

    def _inject(self, decoder: Decoder, modules: Sequence[str], rank: int | None) -> None:
        """Add adapters of `rank` to those of `modules`, given by full names, that have none yet."""
        everything = LayerRange(first=0, last=decoder.num_layers - 1)
        # Inside an adapted module there is a linear one again: the weight that it stands beside.
        adapted = {name for name, _ in _adapted_modules(decoder, [everything])}
        adapted |= {f"{name}.base_layer" for name in adapted}
        targets = [name for name in modules if name not in adapted and ".lora_" not in name]
        if targets:
            config = self.config(targets, rank)
            inject_adapter_in_model(config, decoder.model, adapter_name=_ADAPTER)
            # PEFT takes a model that has this for one of its own and warns of several adapters.
            del decoder.model.peft_config
        # PEFT opens every adapter there is, those of earlier stages too.
        decoder.model.requires_grad_(False)


def adapter_ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the full names of the modules that `tensors` are adapters of, with their ranks."""
    suffix = ".lora_A.weight"
    return {
        name.removesuffix(suffix): tensor.shape[0]
        for name, tensor in tensors.items()
        if name.endswith(suffix)
    }


def adapter_parameters(
    decoder: Decoder, ranges: Iterable[LayerRange]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the adapters' matrices in `ranges`, named as an adapter file names them."""
    for module_name, module in _adapted_modules(decoder, ranges):
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


def _adapted_modules(
    decoder: Decoder, ranges: Iterable[LayerRange]
) -> Iterator[tuple[str, LoraLayer]]:
    for layer_name, layer in decoder.groups(ranges):
        for name, module in layer.named_modules():
            if isinstance(module, LoraLayer):
                yield f"{layer_name}.{name}", module
