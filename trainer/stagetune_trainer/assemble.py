"""The finished model: the base with every stage's output merged into its weights.

With averaging or depth scaling in between: `averaging` says what of the change is kept.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from stagetune_api.spec import ExportDtype
from stagetune_api.stage import StageConfig
from stagetune_trainer.averaging import (
    AveragedWeights,
    WeightChange,
    alpha_of,
    depth_of,
    needs_averaging,
)
from stagetune_trainer.decoder import Decoder
from stagetune_trainer.methods import make_method
from stagetune_trainer.methods.adapters import detach_adapters, merge_adapters, merged_weight
from stagetune_trainer.model import Numerics, StageOutput, apply_chain, load_base, load_chain


def export_numerics(config: StageConfig, device: torch.device) -> Numerics:
    """Return the number format of exported weights on `device`; Auto is that of the base model."""
    match config.export.dtype:
        case ExportDtype.BF16:
            dtype = torch.bfloat16
        case ExportDtype.FP32:
            dtype = torch.float32
        case ExportDtype.AUTO:
            dtype = (
                AutoConfig.from_pretrained(_model_directory(config), trust_remote_code=False).dtype
                or torch.float32
            )
    return Numerics(device=device, dtype=dtype)


def load_base_for_export(config: StageConfig, device: torch.device) -> Decoder:
    """Return the base model in the format of the export."""
    digest = config.model_digest
    if digest is None:
        raise ValueError("the task needs the base model's digest")
    return load_base(_model_directory(config), digest, export_numerics(config, device))


def assemble(config: StageConfig, device: torch.device) -> Decoder:
    """Return a plain model with the same weights as the export: base, stages, adapters merged.

    Raises ArtifactError that names what is damaged, missing or out of order in the chain, and
    ValueError where the share of the tuned weights has yet to be chosen.
    """
    if needs_averaging(config):
        alpha = alpha_of(config)
        if alpha is None:
            raise ValueError("the share of the tuned weights has not been chosen")
        decoder, weights = assemble_for_averaging(config, device)
        weights.set_share(alpha)
        return decoder
    if config.model_digest is None:
        raise ValueError("the task needs the base model's digest")
    outputs = load_chain(config.chain, config.model_digest)
    decoder = load_base_for_export(config, device)
    method = make_method(config.method)
    # Reshaped but never compressed: what is exported stands on the base's own weights.
    method.reshape(decoder)
    apply_chain(decoder, outputs, method)
    merge_adapters(decoder)
    decoder.model.train(False)
    return decoder


def assemble_for_averaging(
    config: StageConfig, device: torch.device
) -> tuple[Decoder, AveragedWeights]:
    """Return a plain model with the base's weights, and what sets it to an average.

    Raises ArtifactError as `assemble` does.
    """
    if config.model_digest is None:
        raise ValueError("the task needs the base model's digest")
    outputs = load_chain(config.chain, config.model_digest)
    decoder = load_base_for_export(config, device)
    changes = list(_changes(config, decoder, outputs))
    decoder.model.train(False)
    return decoder, AveragedWeights(changes)


def _changes(
    config: StageConfig, decoder: Decoder, outputs: list[StageOutput]
) -> Iterator[WeightChange]:
    """Yield every weight that a stage has changed: what it became in the last one to change it."""
    scaling = config.protection.depth_scaling
    parameters = dict(decoder.model.named_parameters())
    whole = {
        name: tensor
        for output in outputs
        for name, tensor in output.tensors.items()
        if name in parameters
    }
    for name, tensor in whole.items():
        yield WeightChange(
            parameter=parameters[name],
            base=parameters[name].detach().clone(),
            tuned=partial(_same, tensor),
            depth=depth_of(name, decoder, scaling),
        )
    if whole:
        return
    apply_chain(decoder, outputs, make_method(config.method))
    for name, module in detach_adapters(decoder).items():
        weight = module.get_base_layer().weight
        yield WeightChange(
            parameter=weight,
            base=weight.detach().clone(),
            tuned=partial(merged_weight, module),
            depth=depth_of(f"{name}.weight", decoder, scaling),
        )


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _model_directory(config: StageConfig) -> Path:
    if config.model_directory is None:
        raise ValueError("the task needs the base model's folder")
    return Path(config.model_directory)
