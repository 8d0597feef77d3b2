"""Loading the base model and putting the finished stages on top of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from stagetune_api import names
from stagetune_api.artifact import ArtifactError, ArtifactKind, verify_artifact
from stagetune_api.stage import ParentRef
from stagetune_api.training_spec import LayerRange, Precision
from stagetune_trainer.base_check import check_base
from stagetune_trainer.decoder import Decoder, find_decoder
from stagetune_trainer.methods import Method
from stagetune_trainer.tail_model import layers_without_weights, load_part, move_weights


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Where and in which number format a process computes."""

    device: torch.device
    """Device of all weights."""
    dtype: torch.dtype
    """Format of frozen weights and of matrix products."""

    def autocast(self) -> torch.autocast:
        """Return the context in which fp32 weights compute in `dtype`."""
        # Without the cache: it would keep a bf16 copy of every trained layer through the forward
        # pass, also of those that gradient checkpointing has already left behind.
        return torch.autocast(
            self.device.type,
            dtype=torch.bfloat16,
            enabled=self.dtype is torch.bfloat16,
            cache_enabled=False,
        )


def choose_numerics(precision: Precision) -> Numerics:
    """Return the device there is, and the format: bf16 on a GPU and fp32 on a CPU unless told."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision is Precision.AUTO:
        precision = Precision.BF16 if device.type == "cuda" else Precision.FP32
    dtype = torch.bfloat16 if precision is Precision.BF16 else torch.float32
    return Numerics(device=device, dtype=dtype)


def load_base(
    directory: Path, digest: str, numerics: Numerics, method: Method | None = None
) -> Decoder:
    """Return the prepared base model, all of it frozen, after checking every byte of it.

    With a `method` it has the structure and the form that stages are trained in by it. Raises
    ArtifactError where the folder is damaged or is not the model with `digest`.
    """
    check_base(directory, digest)
    return load_verified(directory, numerics, method)


def load_verified(
    directory: Path,
    numerics: Numerics,
    method: Method | None = None,
    *,
    first: int = 0,
    stop: int | None = None,
) -> Decoder:
    """Return what `load_base` does of a folder that has been verified, or a part of it.

    What lies below layer `first` and from `stop` up has no weights; where that cannot be, all of it
    has (`tail_model.is_whole`).
    """
    in_part = first > 0 or stop is not None
    model: Any = load_part(directory, numerics.dtype, first, stop) if in_part else None
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=numerics.dtype, use_safetensors=True, trust_remote_code=False
        )
    model.requires_grad_(False)
    if method is not None:
        decoder = find_decoder(model)
        method.reshape(decoder)
        method.compress(decoder, numerics.device)
    move_weights(model, numerics.device)
    return find_decoder(model)


@dataclass(frozen=True, kw_only=True)
class StageOutput:
    """What a finished stage changed."""

    digest: str
    layers: LayerRange
    tensors: dict[str, Tensor]

    @property
    def lowest_layer(self) -> int:
        """Index of the lowest layer that has one of the tensors; -1 where one is in no layer."""
        return min((layer_of(name) for name in self.tensors), default=-1)


def layer_of(name: str) -> int:
    """Return the index of the layer that a tensor is in by its name; -1 for one outside of them.

    The first number in a name is that of the decoder layer.
    """
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def load_chain(chain: Sequence[ParentRef], base_digest: str) -> list[StageOutput]:
    """Return the outputs of the finished stages, oldest first, after checking bytes and order.

    Raises ArtifactError that names the file or folder that is damaged, missing or out of place.
    """
    outputs = []
    expected_parent = base_digest
    for parent in chain:
        path = Path(parent.path)
        content = verify_artifact(
            path, digest=parent.digest, kind=ArtifactKind.STAGE_OUTPUT
        ).content
        if content.parent != expected_parent or content.base != base_digest:
            raise ArtifactError(
                path, f"was not made from what stands before it in the chain ({content.name})"
            )
        if content.layers is None:
            raise ArtifactError(path, "does not say which layers it changed")
        tensors = load_file(path / names.WEIGHTS_FILE)
        outputs.append(StageOutput(digest=parent.digest, layers=content.layers, tensors=tensors))
        expected_parent = parent.digest
    return outputs


def apply_chain(decoder: Decoder, outputs: Sequence[StageOutput], method: Method) -> None:
    """Put the outputs of finished stages onto the base, oldest first.

    What stands in layers without weights is left out.
    """
    missing = layers_without_weights(decoder)
    for output in outputs:
        tensors = {
            name: tensor for name, tensor in output.tensors.items() if layer_of(name) not in missing
        }
        if tensors:
            method.apply(decoder, output.layers, tensors)
