"""`Expand`: added decoder blocks train, everything else stays as it is (arXiv 2401.02415).

Behind every few layers stands a copy of the layer below it whose two writes to the residual stream
are zero, so before the first step the deeper model computes what the base does, to the bit.
"""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from stagetune_api.expansion import block_indices, num_blocks
from stagetune_api.problems import ProblemReason
from stagetune_api.stage import PlannedStage
from stagetune_api.training_spec import ExpandSpec, LayerRange
from stagetune_trainer.decoder import Decoder, find_decoder
from stagetune_trainer.errors import UserError
from stagetune_trainer.methods.full import FullMethod

_PATH = "spec.method.type"


class ExpandMethod(FullMethod):
    """Inserts all blocks at once and opens those behind a stage's layers.

    Tensors are named as in the expanded model, which has its full depth from the first stage on:
    the blocks of later stages stand there and change nothing.
    """

    can_be_loaded_in_part = False
    """A block is a copy of the layer below it."""

    def __init__(self, spec: ExpandSpec | None, master_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(master_dtype)
        self._size = (spec or ExpandSpec()).layers_per_block
        self._handed_on: set[str] = set()
        """Parameters that earlier stages have trained."""

    @torch.no_grad()
    def reshape(self, decoder: Decoder) -> None:
        """Insert a block behind every `layersPerBlock` layers and correct the configuration.

        Raises ValueError where a layer has not two linear modules that write to the residual
        stream.
        """
        depth = decoder.num_layers
        for index in reversed(range(num_blocks(depth, self._size))):
            below = (index + 1) * self._size - 1
            block = copy.deepcopy(decoder.layers[below])
            for linear in residual_writers(block, _hidden_size(decoder)):
                linear.weight.zero_()
                if linear.bias is not None:
                    linear.bias.zero_()
            decoder.layers.insert(below + 1, block)
        _count_layers(decoder)
        _deepen(decoder.model.config, depth, self._size)

    def modules(self, decoder: Decoder, stage: PlannedStage) -> list[nn.Module]:
        """Return the blocks behind the stage's layers."""
        return [decoder.layers[index] for index in self._blocks(stage)]

    def lowest_layer(self, stage: PlannedStage) -> int:
        """Return the index in the expanded decoder of the stage's lowest block."""
        return self._blocks(stage)[0]

    def open(self, decoder: Decoder, stage: PlannedStage) -> dict[str, nn.Parameter]:
        """Make the stage's blocks trainable and return them by their model name.

        Raises UserError where a block that no stage has trained yet would change what the base
        computes.
        """
        beginning = [
            index
            for index in self._blocks(stage)
            if not any(
                name.startswith(f"{decoder.layers_path}.{index}.") for name in self._handed_on
            )
        ]
        _check_blocks_do_nothing(decoder, beginning)
        return super().open(decoder, stage)

    def apply(self, decoder: Decoder, layers: LayerRange, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the blocks with a finished stage's, which a later one may go on with."""
        super().apply(decoder, layers, tensors)
        self._handed_on |= tensors.keys()

    def _blocks(self, stage: PlannedStage) -> list[int]:
        blocks = {
            index for layers in stage.layer_ranges for index in block_indices(layers, self._size)
        }
        if not blocks:
            raise ValueError(f"no block is added behind the layers of stage {stage.name}")
        return sorted(blocks)


def residual_writers(layer: nn.Module, hidden_size: int) -> tuple[nn.Linear, nn.Linear]:
    """Return the linear modules whose outputs a decoder layer adds to the residual stream.

    They are, of attention and feed-forward block each, the last linear module with `hidden_size`
    outputs. Raises ValueError where there are not two such blocks.
    """
    writers = []
    for block in layer.children():
        linear = [module for module in block.modules() if isinstance(module, nn.Linear)]
        writing = [module for module in linear if module.out_features == hidden_size]
        if writing:
            writers.append(writing[-1])
    if len(writers) != 2:
        raise ValueError(
            f"a {type(layer).__name__} has {len(writers)} blocks whose last linear module writes "
            f"{hidden_size} numbers, not attention and feed-forward alone"
        )
    return writers[0], writers[1]


def _hidden_size(decoder: Decoder) -> int:
    return decoder.head_weight.shape[1]


def _count_layers(decoder: Decoder) -> None:
    """Tell every module its layer's new index, by which attention finds its cache."""
    for index, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]  # a plain attribute


def _deepen(config: PreTrainedConfig, depth: int, size: int) -> None:
    """Give `config` the new depth, and its lists with an entry for each layer those of the blocks.

    A block is of the kind of the layer that it is a copy of.
    """
    text = config.get_text_config()
    blocks = num_blocks(depth, size)
    for key, value in list(vars(text).items()):
        if "layer" in key and isinstance(value, list | tuple) and len(value) == depth:
            deeper = list(value)
            for below in reversed(range(size - 1, blocks * size, size)):
                deeper.insert(below + 1, value[below])
            setattr(text, key, deeper)
    text.num_hidden_layers = depth + blocks


@torch.no_grad()
def _check_blocks_do_nothing(decoder: Decoder, blocks: list[int]) -> None:
    """Refuse a family whose added blocks would not hand their input on as it is."""
    changed: list[int] = []

    def hook(index: int) -> Any:
        def compare(
            module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], output: Any
        ) -> None:
            given = inputs[0] if inputs else named["hidden_states"]
            found = output[0] if isinstance(output, tuple) else output
            if not torch.equal(found, given):
                changed.append(index)

        return compare

    hooks = [
        decoder.layers[index].register_forward_hook(hook(index), with_kwargs=True)
        for index in blocks
    ]
    was_training = decoder.model.training
    decoder.model.train(False)
    tokens = torch.arange(1, 9, device=decoder.device).unsqueeze(0)
    decoder.backbone(input_ids=tokens, use_cache=False)
    decoder.model.train(was_training)
    for handle in hooks:
        handle.remove()
    if changed:
        raise _refused(decoder.model, f"its added blocks {changed} do not begin as the identity")


def check_expandable(directory: Path, spec: ExpandSpec | None) -> None:
    """Raise UserError where the model in `directory` cannot be expanded so that others load it.

    The expanded model is compared with the one that transformers builds from the expanded
    configuration: parameters, and every plain attribute of every module in a layer.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    expanded = _build_without_weights(config)
    decoder = find_decoder(expanded)
    try:
        ExpandMethod(spec).reshape(decoder)
    except ValueError as error:
        raise _refused(expanded, str(error)) from error
    rebuilt = find_decoder(_build_without_weights(expanded.config))
    differences = list(_differences(decoder, rebuilt))
    if differences:
        raise _refused(expanded, f"its layers differ by place: {'; '.join(differences[:3])}")


def _build_without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model: PreTrainedModel = build(copy.deepcopy(config), trust_remote_code=False)
    return model


def _differences(found: Decoder, expected: Decoder) -> Iterator[str]:
    """Yield what differs between two models that should be built alike."""
    ours, theirs = dict(found.model.named_modules()), dict(expected.model.named_modules())
    for name in sorted(ours.keys() ^ theirs.keys()):
        yield f"{name} is in one of them only"
    for name in ours.keys() & theirs.keys():
        first, second = _description(ours[name]), _description(theirs[name])
        for key in first.keys() | second.keys():
            if first.get(key) != second.get(key):
                yield f"{name}.{key} is {first.get(key)!r}, and {second.get(key)!r} when loaded"


def _description(module: nn.Module) -> Mapping[str, object]:
    plain = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, str | int | float | None) and not key.startswith("_")
    }
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    return {**plain, **shapes}


def _refused(model: PreTrainedModel, why: str) -> UserError:
    kind = model.config.model_type
    return UserError.at(
        _PATH,
        f"Expand cannot add blocks to a {kind} model: {why}; use Full or LoRA",
        ProblemReason.NOT_YET_SUPPORTED,
    )
