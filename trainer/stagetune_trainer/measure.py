"""The shape of a prepared model, measured on the model itself and on its weights.

Used by `base_model`, to refuse a model before it is published, and by `data.prepare`: the plan is
made from what is found here. No weight is read: the model is built on the meta device, and the
files' headers say which tensors they hold.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from stagetune_api import names
from stagetune_api.artifact import read_manifest
from stagetune_api.facts import LayerFacts, ModelFacts
from stagetune_api.problems import ProblemReason
from stagetune_trainer.decoder import Decoder, find_decoder
from stagetune_trainer.errors import UserError

_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_PATH = "spec.model.source"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor as a safetensors header describes it."""

    shape: tuple[int, ...]
    dtype: str
    """safetensors' name of the number format, e.g. `BF16`."""


def measure_model(directory: Path) -> ModelFacts:
    """Return the facts of the model in `directory`, an ordinary Hugging Face folder.

    Raises UserError where the files do not hold the weights that config.json asks for, where the
    layers differ in size, or where the model is not built as decoders are.
    """
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model: PreTrainedModel = build(config, trust_remote_code=False)
    try:
        decoder = find_decoder(model)
    except ValueError as error:
        raise UserError.at(_PATH, str(error)) from error
    stored = read_tensor_headers(sorted(directory.glob("*.safetensors")))
    _check_weights(decoder, stored)
    sizes = {_count(layer.parameters()) for layer in decoder.layers}
    if len(sizes) > 1:
        raise UserError.at(
            _PATH,
            f"its layers have between {min(sizes)} and {max(sizes)} parameters; models whose "
            "layers differ are not yet supported",
            ProblemReason.NOT_YET_SUPPORTED,
        )
    has_manifest = (directory / names.MANIFEST_FILE).exists()
    return ModelFacts(
        model_type=config.model_type,
        num_layers=decoder.num_layers,
        **_sizes(decoder),
        **_parameter_counts(decoder),
        layer=LayerFacts(parameters=sizes.pop(), linear_shapes=_linear_shapes(decoder.layers[0])),
        dtype_bytes=_dtype_bytes(stored),
        digest=read_manifest(directory).digest if has_manifest else None,
    )


def read_tensor_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return what the safetensors `files` hold, by tensor name.

    Raises UserError that names a file which is not whole safetensors.
    """
    stored = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # not a mapping: iterating it fails
                    part = file.get_slice(name)
                    stored[name] = StoredTensor(
                        shape=tuple(part.get_shape()), dtype=str(part.get_dtype())
                    )
        except (SafetensorError, OSError) as error:
            raise UserError.at(
                _PATH,
                f"{path} cannot be read as safetensors ({error}); fetch it again",
            ) from error
    return stored


def _sizes(decoder: Decoder) -> Mapping[str, int]:
    config = decoder.model.config
    vocab_size, hidden_size = decoder.head.get_parameter("weight").shape
    num_heads = config.num_attention_heads
    return {
        "hidden_size": hidden_size,
        # The few models that name it differently make it four times the hidden size.
        "intermediate_size": getattr(config, "intermediate_size", None) or 4 * hidden_size,
        "vocab_size": vocab_size,
        "num_attention_heads": num_heads,
        "head_dim": getattr(config, "head_dim", None) or hidden_size // num_heads,
    }


def _parameter_counts(decoder: Decoder) -> Mapping[str, int]:
    """Return the parameters outside the layers; what is neither head nor norm is embeddings."""
    tied = decoder.is_tied
    own = decoder.head.named_parameters()
    head = sum(value.numel() for name, value in own if not (tied and name == "weight"))
    norms = sum(_count(norm.parameters()) for norm in decoder.final_norms)
    rest = _count(decoder.model.parameters()) - _count(decoder.layers.parameters()) - head - norms
    return {
        "tied_embeddings": tied,
        "embedding_parameters": rest,
        "head_parameters": head,
        "final_norm_parameters": norms,
    }


def _linear_shapes(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of a layer's linear modules, by their name inside the layer."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }


def _check_weights(decoder: Decoder, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse files that do not hold the model: what is missing would be trained from noise.

    Names may differ where transformers renames old ones as it loads; sizes may not.
    """
    expected = {name: tuple(value.shape) for name, value in decoder.model.named_parameters()}
    wrong = [
        f"{name} is {list(stored[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    missing = [name for name in expected if name not in stored]
    found = sum(_numel(tensor.shape) for tensor in stored.values())
    wanted = sum(_numel(shape) for shape in expected.values())
    if not wrong and (not missing or found >= wanted):
        return
    details = wrong or [f"{name} is missing" for name in missing]
    raise UserError.at(
        _PATH,
        f"the weights are not those of its config.json: {'; '.join(_shortened(details))}; "
        "fetch the model again or mend its config.json",
    )


def _dtype_bytes(stored: Mapping[str, StoredTensor]) -> int:
    """Return the bytes of one weight in the format that most weights have."""
    counts: dict[int, int] = {}
    for tensor in stored.values():
        size = _DTYPE_BYTES.get(tensor.dtype, 1)
        counts[size] = counts.get(size, 0) + _numel(tensor.shape)
    return max(counts, key=lambda size: counts[size])


def _shortened(details: list[str], most: int = 5) -> Iterator[str]:
    yield from details[:most]
    if len(details) > most:
        yield f"and {len(details) - most} more"


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
