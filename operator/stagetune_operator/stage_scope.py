"""What a stage opens, counted in parameters; a part of `estimate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stagetune_api.facts import ModelFacts
from stagetune_api.training_spec import (
    LayerRange,
    LoraSpec,
    MethodSpec,
    MethodType,
)

EXTRA_NORM_TYPES = frozenset({"gemma2", "gemma3_text"})  # a norm behind each block too


@dataclass(frozen=True)
class StageScope:
    """What a stage opens, and which adapters of earlier stages the decoder holds already."""

    layers: LayerRange
    embeddings: bool = False
    head: bool = False
    idle_ranks: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Ranks of the adapters of earlier stages that stand beside what trains, by layer."""
    top_layers: LayerRange | None = None
    """Layers that it opens too, above `layers` and not touching them."""
    rank: int | None = None
    """Rank of its adapters; None where that of the method counts."""
    prefix_cached: bool = False
    """Whether the hidden states below it are read, and the layers below run in no step."""
    loaded_from: int = 0
    """The lowest of the layers that fill the cache, if there is one; they are given back before the
    stage trains."""
    asks_base: bool = False
    """Whether the whole base model is asked for something before the stage trains."""
    measures_general: bool = False
    """Whether its loss on general text is measured at its end."""

    @property
    def lowest_run(self) -> int:
        """The lowest layer that its steps run."""
        return self.layers.first if self.prefix_cached else 0

    @property
    def count(self) -> int:
        """Number of layers that it opens."""
        return self.layers.count + (self.top_layers.count if self.top_layers else 0)


def uses_adapters(method: MethodSpec) -> bool:
    """Whether adapters train, and not weights of the model."""
    return method.type in (MethodType.LORA, MethodType.QLORA)


def is_target(module: str, target: str) -> bool:
    """Whether the linear module `module` is meant by the last name part `target`."""
    return module.rpartition(".")[2] == target


def adapted_shapes(model: ModelFacts, method: MethodSpec) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of the linear modules of one layer that get an adapter."""
    if not uses_adapters(method):
        return []
    targets = (method.lora or LoraSpec()).target_modules
    shapes = model.layer.linear_shapes.items()
    return [
        shape
        for name, shape in shapes
        if targets is None or any(is_target(name, target) for target in targets)
    ]


def adapter_parameters(model: ModelFacts, method: MethodSpec, rank: int | None) -> int:
    """Return the adapters' parameters in one layer: rank * (inputs + outputs) per module.

    DoRA adds a length for each output.
    """
    lora = method.lora or LoraSpec()
    shapes = adapted_shapes(model, method)
    lengths = sum(outputs for _, outputs in shapes) if lora.dora else 0
    return (rank or lora.rank) * sum(inputs + outputs for inputs, outputs in shapes) + lengths


def idle_adapters(model: ModelFacts, method: MethodSpec, scope: StageScope) -> dict[int, int]:
    """Return the parameters of the adapters of earlier stages, by layer."""
    return {
        layer: sum(adapter_parameters(model, method, rank) for rank in ranks)
        for layer, ranks in scope.idle_ranks.items()
    }


def trainable_parameters(model: ModelFacts, method: MethodSpec, scope: StageScope) -> int:
    """Return how many parameters the stage trains."""
    if uses_adapters(method):
        return scope.count * adapter_parameters(model, method, scope.rank)
    head = model.head_parameters + model.final_norm_parameters
    return (
        scope.count * model.layer.parameters
        + (model.embedding_parameters if scope.embeddings else 0)
        + (head if scope.head else 0)
    )


def largest_tensor(model: ModelFacts, method: MethodSpec, scope: StageScope) -> int:
    """Return the parameters of the largest tensor that trains."""
    if uses_adapters(method):
        rank = scope.rank or (method.lora or LoraSpec()).rank
        return rank * max((max(shape) for shape in adapted_shapes(model, method)), default=0)
    matrices = [inputs * outputs for inputs, outputs in model.layer.linear_shapes.values()]
    embeddings = model.embedding_parameters if scope.embeddings else 0
    return max([*matrices, embeddings, model.head_parameters if scope.head else 0])
