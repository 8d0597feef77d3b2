"""What several processes divide among them, by ZeRO stage and offload: a part of `estimate`.

docs/plan.md explains the numbers in words.
"""

from stagetune_api.spec import Offload
from stagetune_api.stage import EnginePlan

BUCKET_BYTES = 4 * 50_000_000
"""Gradients are summed over processes in buckets of so many bytes; one is filled while one is
sent."""
_BUCKETS = 2
_LAYERS_AT_ONCE = 2
"""Whole layers that stand in a process with ZeRO stage 3: one is computed, one is on its way."""


def shared_state_bytes(engine: EnginePlan, trainable: int) -> int:
    """Return what `trainable` parameters take in the memory of one device.

    The weights that are computed with are fp32 and whole, with ZeRO stage 3 a part. Of masters,
    gradients and AdamW's two moments each process has its part, and with offload those in host
    memory.
    """
    count = engine.num_processes
    part = -(-trainable // count)
    weights = 4 * (part if engine.zero_stage == 3 else trainable)
    if engine.offload is Offload.OPTIMIZER_AND_PARAMETERS:
        weights = 0
    buckets = min(_BUCKETS * BUCKET_BYTES, 4 * trainable)
    on_host = engine.offload is not Offload.NONE
    return weights + buckets + (0 if on_host else (4 + 4 + 8) * part)


def shared_weights_bytes(engine: EnginePlan, *, layers: int, others: int, layer: int) -> int:
    """Return what frozen weights take: `layers` bytes in layers of `layer` bytes, and `others`.

    ZeRO stage 3 divides those in layers and puts whole layers together for each pass.
    """
    if engine.zero_stage != 3:
        return layers + others
    is_on_host = engine.offload is Offload.OPTIMIZER_AND_PARAMETERS
    kept = 0 if is_on_host else -(-layers // engine.num_processes)
    return kept + min(_LAYERS_AT_ONCE * layer, layers) + others
