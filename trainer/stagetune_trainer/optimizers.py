"""Which optimizer a stage has, and in which number format it keeps what trains."""

import torch
from torch import nn
from torch.optim import Optimizer

from stagetune_api.training_spec import OptimizerType, TrainingSpec
from stagetune_trainer.adamw_8bit import AdamW8bit
from stagetune_trainer.model import Numerics


def choose_master_dtype(training: TrainingSpec, numerics: Numerics) -> torch.dtype:
    """Return the format of weights that train: fp32, unless the optimizer rounds stochastically.

    With plain rounding a bf16 weight loses every update below a 256th of it or so.
    """
    rounds_stochastically = training.optimizer is OptimizerType.ADAMW_8BIT
    return numerics.dtype if rounds_stochastically else torch.float32


def make_optimizer(parameters: dict[str, nn.Parameter], training: TrainingSpec) -> Optimizer:
    """Return the optimizer of `parameters`; its rate is set before every step."""
    matrices = [parameter for parameter in parameters.values() if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters.values() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer is OptimizerType.ADAMW_8BIT:
        return AdamW8bit(groups)
    return torch.optim.AdamW(groups, lr=0.0, fused=True)
