"""How much of the tuning a finished model keeps: averaged with the base, less of it lower down.

A changed weight becomes base + alpha * depth * (tuned - base). alpha is that of WiSE-FT (arXiv
2109.01903), depth that of LiNeS (arXiv 2410.17146); both are one factor, in fp32, and the result is
rounded once. Comes after the chain is loaded and before adapters are gone; `assemble` calls it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stagetune_api.report import AveragingResult
from stagetune_api.stage import StageConfig
from stagetune_api.training_spec import DepthScalingSpec
from stagetune_trainer.decoder import Decoder

ALPHAS = tuple(step / 10 for step in range(11))
"""The shares that are tried where the manifest gives none."""


@dataclass(frozen=True, kw_only=True)
class WeightChange:
    """One weight that stages have changed."""

    parameter: nn.Parameter
    """Where it stands in the model."""
    base: Tensor
    """Its value in the base model, a copy."""
    tuned: Callable[[], Tensor]
    """Gives its tuned value; called while `parameter` has its base value."""
    depth: float
    """The part of the change that its depth leaves, from 0 to 1."""


class AveragedWeights:
    """The changed weights of a model, to be set to any average of base and tuned ones.

    The base values are kept beside them: what changed is in memory twice.
    """

    def __init__(self, changes: Sequence[WeightChange]) -> None:
        self._changes = changes

    @torch.no_grad()
    def set_share(self, alpha: float) -> None:
        """Set every weight to its average with the share `alpha` of the tuned one.

        Nothing remains of earlier calls. 0 gives the base and 1 with a depth of 1 the tuned weight,
        both to the bit.
        """
        for change in self._changes:
            change.parameter.copy_(change.base)
            tuned = change.tuned().to(change.base.device, torch.float32)
            share = alpha * change.depth
            change.parameter.copy_(torch.lerp(change.base.float(), tuned, share))


def needs_averaging(config: StageConfig) -> bool:
    """Whether the finished model is anything else than the tuned one."""
    protection = config.protection
    return protection.averaging is not None or protection.depth_scaling is not None


def alpha_of(config: StageConfig) -> float | None:
    """Return the share of the tuned weights; None where Evaluate has yet to choose it."""
    averaging = config.protection.averaging
    if averaging is None:
        return 1.0
    return config.averaging_alpha if averaging.alpha is None else averaging.alpha


def choose_alpha(validation_loss: Callable[[float], float], tolerance: float) -> AveragingResult:
    """Return the smallest share whose loss is within `tolerance` (nats) of the best one's.

    `validation_loss` gives the mean loss of the model with a share.
    """
    losses = [validation_loss(alpha) for alpha in ALPHAS]
    limit = min(losses) + tolerance
    chosen = next(alpha for alpha, loss in zip(ALPHAS, losses, strict=True) if loss <= limit)
    return AveragingResult(alphas=list(ALPHAS), validation_losses=losses, chosen=chosen)


def depth_of(name: str, decoder: Decoder, scaling: DepthScalingSpec | None) -> float:
    """Return the part that is kept of a change of the parameter `name`.

    The embeddings count as the bottom; what stands above the layers as the top.
    """
    parameter = decoder.model.get_parameter(name)
    if any(parameter is other for other in decoder.embeddings.parameters()):
        return depth_of_layer(0, decoder.num_layers, scaling)
    if not name.startswith(f"{decoder.layers_path}."):
        return 1.0
    layer = name.removeprefix(f"{decoder.layers_path}.").partition(".")[0]
    return depth_of_layer(int(layer), decoder.num_layers, scaling)


def depth_of_layer(layer: int, num_layers: int, scaling: DepthScalingSpec | None) -> float:
    """Return the part that is kept of a change of `layer`: a straight line up to 1 at the top."""
    if scaling is None or layer == num_layers - 1:
        return 1.0
    return scaling.bottom + (1 - scaling.bottom) * layer / (num_layers - 1)


def scale_adapters(
    tensors: Mapping[str, Tensor], config: StageConfig, num_layers: int
) -> dict[str, Tensor]:
    """Return adapters, by their names in the model, whose merging gives the averaged weights.

    A LoRA adapter's change is B times A, so B takes the whole factor. Adapters stand in decoder
    layers alone, whose index is the first number in a name.
    """
    alpha, scaling = alpha_of(config), config.protection.depth_scaling
    if alpha is None:
        raise ValueError("an Export task needs the share of the tuned weights")
    scaled = dict(tensors)
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            layer = next(int(part) for part in name.split(".") if part.isdigit())
            scaled[name] = tensor * (alpha * depth_of_layer(layer, num_layers, scaling))
    return scaled
