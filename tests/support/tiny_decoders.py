"""Decoders and stages for tests of methods, without a run around them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from stagetune_api.stage import PlannedStage, RowRange, StageEstimate
from stagetune_api.training_spec import LayerRange
from stagetune_trainer.decoder import Decoder, find_decoder

NO_ESTIMATE = StageEstimate(
    trainable_parameters=0,
    weights_bytes=0,
    training_state_bytes=0,
    activation_bytes=0,
    memory_bytes=0,
    disk_bytes=0,
    step_flops=0,
    relative_step_flops=0.0,
)


def stage(first: int, last: int, **options: Any) -> PlannedStage:
    values: dict[str, Any] = {
        "index": 0,
        "name": f"layers-{first}-{last}",
        "layers": LayerRange(first=first, last=last),
        "embeddings": False,
        "head": False,
        "learning_rate": 1e-3,
        "epochs": 1.0,
        "rows": RowRange(start=0, end=8),
        "steps": 2,
        "warmup_steps": 0,
        "validation_interval": 1,
        "estimate": NO_ESTIMATE,
    }
    return PlannedStage(**{**values, **options})


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    model.requires_grad_(False)
    return find_decoder(model)


def logits(decoder: Decoder) -> torch.Tensor:
    decoder.model.eval()
    with torch.no_grad():
        return decoder.model(input_ids=torch.arange(3, 27).reshape(2, 12)).logits


def perturb(parameters: dict[str, torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
