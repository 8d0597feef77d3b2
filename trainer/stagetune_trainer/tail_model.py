"""A base model of which only some layers have weights: those above a cache, or those that fill it.

What lies outside of them stays on torch's meta device: the modules are there, so that layers keep
their index and their name, and their parameters have a shape and no numbers.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stagetune_trainer.decoder import Decoder, find_decoder
from stagetune_trainer.methods.nf4 import Nf4Linear

META = torch.device("meta")
_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"


def load_part(
    directory: Path, dtype: torch.dtype, first: int, stop: int | None = None
) -> PreTrainedModel | None:
    """Return the model in `directory` with weights in layers `first` to `stop` - 1, in `dtype`.

    Without a `stop` those are all from `first` up and the head. The embeddings have theirs where
    layer 0 is among them, and where they are the head's. None for a model that this would not load
    as transformers loads the whole: one whose files name weights otherwise, that keeps more than
    parameters in them, holds some in fp32 whatever is asked for, or has a file with both of two
    tied matrices.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with _parameters_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, trust_remote_code=False
        )
    outside = {id(parameter) for parameter in parameters_outside(find_decoder(model), first, stop)}
    wanted = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in outside
    }
    places = _places(directory)
    if not wanted.keys() <= places.keys() or _needs_more(model, places):
        return None
    by_file: defaultdict[str, list[str]] = defaultdict(list)
    for name in wanted:
        by_file[places[name]].append(name)
    open_file: Any = safe_open
    for file, names in by_file.items():
        with open_file(directory / file, framework="pt") as tensors:
            for name in names:
                _set(model, name, tensors.get_tensor(name).to(dtype))
    model.tie_weights()
    model.train(False)
    return model


def _needs_more(model: PreTrainedModel, places: Mapping[str, str]) -> bool:
    """Whether loading the model takes more than putting parameters into their places."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    if model.state_dict().keys() - by_name.keys():
        return True
    strict = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    if any(getattr(model, name, None) for name in strict):
        return True
    in_files = [id(parameter) for name, parameter in by_name.items() if name in places]
    return len(in_files) != len(set(in_files))


def parameters_outside(decoder: Decoder, first: int, stop: int | None = None) -> Iterator[Tensor]:
    """Yield the parameters that no pass from layer `first` up to border `stop` computes with.

    The final norm runs in every pass: it is small.
    """
    above = [] if stop is None else list(decoder.layers[stop:])
    for layer in [*decoder.layers[:first], *above]:
        yield from layer.parameters()
    needs_head = stop is None
    if not needs_head and not decoder.is_tied:
        yield from decoder.head.parameters()
    if first > 0 and not (decoder.is_tied and needs_head):
        yield from decoder.embeddings.parameters()


def drop_below(decoder: Decoder, first: int) -> None:
    """Give the memory of everything below layer `first` back."""
    modules = list(decoder.layers[:first])
    if first > 0 and not decoder.is_tied:
        modules.append(decoder.embeddings)
    for module in modules:
        module.to(META)
        for part in module.modules():
            if isinstance(part, Nf4Linear):
                part.forget()


def move_weights(model: nn.Module, device: torch.device) -> None:
    """Move everything that has numbers to `device`."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.is_meta:
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def is_whole(decoder: Decoder) -> bool:
    """Whether everything of the model has weights."""
    return not any(parameter.is_meta for parameter in decoder.model.parameters())


def layers_without_weights(decoder: Decoder) -> frozenset[int]:
    """Return the indices of the layers that have shapes alone."""
    return frozenset(
        index
        for index, layer in enumerate(decoder.layers)
        if any(parameter.is_meta for parameter in layer.parameters())
    )


def lowest_loaded(decoder: Decoder) -> int:
    """Return the index of the lowest layer that has weights."""
    missing = layers_without_weights(decoder)
    return next(index for index in range(decoder.num_layers) if index not in missing)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Make every parameter that is registered inside one without numbers; buffers are computed."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to(META), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _places(directory: Path) -> dict[str, str]:
    """Return the file of every weight in `directory`, by the weight's name."""
    index = directory / _INDEX_FILE
    if index.exists():
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return places
    open_file: Any = safe_open
    with open_file(directory / _SINGLE_FILE, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), _SINGLE_FILE)


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
