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
from stagetune_trainer.decoder import Decoder, find_decoder
from stagetune_trainer.methods import Method


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
    verify_artifact(directory, digest=digest, kind=ArtifactKind.BASE_MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=numerics.dtype, use_safetensors=True, trust_remote_code=False
    )
    model.requires_grad_(False)
    if method is not None:
        decoder = find_decoder(model)
        method.reshape(decoder)
        method.compress(decoder, numerics.device)
    model.to(numerics.device)
    return find_decoder(model)


@dataclass(frozen=True, kw_only=True)
class StageOutput:
    """What a finished stage changed."""

    layers: LayerRange
    tensors: dict[str, Tensor]


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
        outputs.append(StageOutput(layers=content.layers, tensors=tensors))
        expected_parent = parent.digest
    return outputs


def apply_chain(decoder: Decoder, outputs: Sequence[StageOutput], method: Method) -> None:
    """Put the outputs of finished stages onto the base, oldest first."""
    for output in outputs:
        method.apply(decoder, output.layers, output.tensors)
