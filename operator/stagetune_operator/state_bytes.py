"""The bytes of what trains: masters, gradients and moments, by optimizer and number format.

A part of `estimate`; docs/plan.md explains the numbers in words.
"""

from dataclasses import dataclass

from stagetune_api.training_spec import MethodSpec, MethodType, OptimizerType, TrainingSpec

_BLOCK_SIZE = 256
"""Values of an 8-bit moment that share an fp32 scale."""
_UPDATED_AT_ONCE = 2**24
_TEMPORARY_BYTES = 32
"""Eight fp32 copies of what AdamW8bit updates at once."""


@dataclass(frozen=True)
class StateBytes:
    """What a stage's training state takes."""

    master: int
    """Bytes of one parameter that trains."""
    memory: int
    """Bytes of masters, gradients, moments and what an update needs for itself, on the device."""
    between_steps: int
    """Bytes of what of these is left between two steps: masters and moments."""
    checkpoint: int
    """Bytes of one checkpoint: masters, moments and the best masters so far."""


def state_bytes(
    method: MethodSpec,
    training: TrainingSpec,
    *,
    element: int,
    trainable: int,
    largest: int,
    best_in_memory: bool = False,
) -> StateBytes:
    """Return what `trainable` parameters take, the largest tensor of which has `largest`.

    `element` is the bytes of a computed number. A gradient has its master's format; in the backward
    pass one stands at a time. The best masters so far are in host memory: on a CPU they count.
    """
    is_8_bit = training.optimizer is OptimizerType.ADAMW_8BIT
    has_adapters = method.type in (MethodType.LORA, MethodType.QLORA)
    master = element if is_8_bit and not has_adapters else 4
    moments = 8 * trainable
    temporary = 0
    if is_8_bit:
        moments = 2 * trainable + 2 * 4 * trainable // _BLOCK_SIZE
        temporary = _TEMPORARY_BYTES * min(largest, _UPDATED_AT_ONCE)
    gradients = master * (largest if training.optimizer_in_backward else trainable)
    between_steps = (2 if best_in_memory else 1) * master * trainable + moments
    return StateBytes(
        master=master,
        memory=between_steps + gradients + temporary,
        between_steps=between_steps,
        checkpoint=2 * master * trainable + moments,
    )
