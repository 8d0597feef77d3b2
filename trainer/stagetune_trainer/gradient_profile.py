"""How strongly the data pulls at each decoder layer of the base model: a profile of gradient norms.

Prepare measures it for order GradientNorm, after the rows are tokenised; the plan decides by it
(`stagetune_operator.gradient_groups`). The signal of a layer is the relative gradient norm
||g|| / ||w|| of Auto-RGN (arXiv 2210.11466), the mean over micro-batches, each with the gradient of
its own mean loss. Every gradient is freed as soon as its norm is taken, so that beside the weights
and activations never more than one layer's gradients stand in memory; that is also why gradients of
several micro-batches are not added up before.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from stagetune_api import names
from stagetune_api.artifact import digest_of_json
from stagetune_api.base import ApiModel
from stagetune_api.facts import Facts, GradientFacts
from stagetune_api.files import write_file_atomically
from stagetune_api.problems import ProblemReason
from stagetune_api.stage import StageConfig
from stagetune_api.training_spec import GradientCheckpointing
from stagetune_trainer.data.batch import Batch
from stagetune_trainer.data.batches import open_profile_batches
from stagetune_trainer.decoder import Decoder, checkpoint_activations, freeze_prefix
from stagetune_trainer.errors import UserError
from stagetune_trainer.loss import AnswerLoss
from stagetune_trainer.model import Numerics, choose_numerics, load_base

PROFILE_FILE = "gradient-profile.json"
_VERSION = 1
"""Raised when equal inputs would give another profile."""


class StoredProfile(ApiModel):
    """A profile on the volume, with what it was measured from."""

    settings: str
    """settings is the digest of all that decides the numbers."""
    profile: GradientFacts
    """profile that was measured."""


def with_gradient_profile(
    config: StageConfig, facts: Facts, say: Callable[[str], None] = lambda text: None
) -> Facts:
    """Return `facts` with the profile that `config` asks for, or with none where it asks for none.

    A profile of the same model, rows and options is used again. Raises UserError where a gradient
    is not finite, ArtifactError where model or rows are not sound.
    """
    if config.gradient_norm is None:
        return facts.model_copy(update={"gradients": None})
    path = names.RunLayout(Path(config.run_directory)).prepare / PROFILE_FILE
    settings = _settings_digest(config, facts)
    stored = _read(path)
    if stored is None or stored.settings != settings:
        say("measuring the gradient norm of every layer")
        stored = StoredProfile(settings=settings, profile=_measure(config, facts))
        write_file_atomically(path, stored.model_dump_json(indent=2))
        say(f"measured gradient norms on {stored.profile.rows} rows")
    return facts.model_copy(update={"gradients": stored.profile})


def _read(path: Path) -> StoredProfile | None:
    try:
        return StoredProfile.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _settings_digest(config: StageConfig, facts: Facts) -> str:
    """Return the digest of what decides the numbers; what becomes of them is the plan's matter."""
    if config.gradient_norm is None:
        raise ValueError("the task asks for no profile")
    training = config.training
    return digest_of_json(
        {
            "version": _VERSION,
            "model": facts.model.digest,
            "data": facts.data.digest,
            "batches": config.gradient_norm.batches,
            "batchSize": training.batch_size,
            "microBatchSize": training.micro_batch_size,
            "seed": training.seed,
            "precision": training.precision.value,
        }
    )


def _measure(config: StageConfig, facts: Facts) -> GradientFacts:
    options, digest = config.gradient_norm, facts.model.digest
    if options is None or digest is None:
        raise ValueError("a profile needs its options and a prepared model")
    config = config.model_copy(update={"data_digest": facts.data.digest})
    numerics = choose_numerics(config.training.precision)
    decoder = load_base(Path(facts.model_directory), digest, numerics)
    if config.training.gradient_checkpointing is GradientCheckpointing.ALWAYS:
        checkpoint_activations(decoder, 0)
    batches = open_profile_batches(config, options.batches)
    signals = relative_gradient_norms(decoder, numerics, batches)
    broken = [index for index, signal in enumerate(signals) if not math.isfinite(signal)]
    if broken:
        raise UserError.at(
            "spec.schedule.order",
            f"GradientNorm: the gradient of layer {broken[0]} is not finite on these rows; use "
            "training.precision: FP32 or another order",
            ProblemReason.INVALID,
        )
    return GradientFacts(
        relative_norms=[float(f"{signal:.4g}") for signal in signals],
        rows=sum(batch.input_ids.shape[0] for batch in batches),
        tokens=sum(batch.num_tokens for batch in batches),
    )


def relative_gradient_norms(
    decoder: Decoder, numerics: Numerics, micro_batches: list[Batch]
) -> list[float]:
    """Return ||g|| / ||w|| of each decoder layer, the mean over `micro_batches`.

    `decoder` is frozen; its layers are open while this works, and dropout is off. Micro-batches
    without an answer count for nothing.
    """
    loss = AnswerLoss(decoder)
    decoder.model.train(False)
    freeze_prefix(decoder, 0, embeddings_train=False)
    squares: dict[str, float] = {}
    hooks = []
    weights = []
    for index, layer in enumerate(decoder.layers):
        layer.requires_grad_(True)
        # Checkpointing asks the layer itself, dropout what is inside.
        layer.training = True
        weights.append(_norm([_square(value) for value in layer.parameters()]))
        for name, parameter in layer.named_parameters():
            key = f"{index}.{name}"
            hook = partial(_take_norm, key, squares)
            hooks.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
    sums = [0.0] * decoder.num_layers
    measured = [batch for batch in micro_batches if batch.num_answer_tokens > 0]
    for batch in measured:
        squares.clear()
        with numerics.autocast():
            loss_sum, count = loss.of(batch)
        (loss_sum / count).backward()  # type: ignore[no-untyped-call]
        for index, layer in enumerate(decoder.layers):
            # In the order of the parameters, not in that of the backward pass.
            found = [squares.get(f"{index}.{name}", 0.0) for name, _ in layer.named_parameters()]
            sums[index] += _norm(found) / weights[index]
    for handle in hooks:
        handle.remove()
    decoder.model.requires_grad_(False)
    return [total / max(len(measured), 1) for total in sums]


def _take_norm(key: str, squares: dict[str, float], parameter: Tensor) -> None:
    """Note the square of a gradient's norm and free the gradient."""
    if parameter.grad is not None:
        squares[key] = _square(parameter.grad)
        parameter.grad = None


@torch.no_grad()
def _square(tensor: Tensor) -> float:
    """Return the sum of squares, summed in fp32."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32)) ** 2


def _norm(squares: list[float]) -> float:
    return math.sqrt(math.fsum(squares))
