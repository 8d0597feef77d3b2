"""The finished model: the base with every stage's output merged into its weights."""

from pathlib import Path

import torch
from transformers import AutoConfig

from stagetune_api.spec import ExportDtype
from stagetune_api.stage import StageConfig
from stagetune_trainer.decoder import Decoder
from stagetune_trainer.methods import make_method
from stagetune_trainer.methods.adapters import merge_adapters
from stagetune_trainer.model import Numerics, apply_chain, load_base, load_chain


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

    Raises ArtifactError that names what is damaged, missing or out of order in the chain.
    """
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


def _model_directory(config: StageConfig) -> Path:
    if config.model_directory is None:
        raise ValueError("the task needs the base model's folder")
    return Path(config.model_directory)
