"""What a stage asks of a device: memory, disk and floating-point operations, all by formula.

`plan` calls this once per stage. docs/plan.md explains the formulas in words and says how far each
is from what was measured. Everything is linear in layers, tokens and parameters except attention,
whose quadratic term counts every query-key pair of a row, as PyTorch's FlopCounterMode does.
"""

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from stagetune_api import expansion
from stagetune_api.base import ApiModel
from stagetune_api.facts import Facts, ModelFacts
from stagetune_api.stage import EnginePlan, StageEstimate
from stagetune_api.training_spec import (
    ExpandSpec,
    LayerRange,
    MethodSpec,
    MethodType,
    Precision,
    TrainingSpec,
)
from stagetune_operator.activation_bytes import activation_bytes
from stagetune_operator.engine_bytes import shared_state_bytes, shared_weights_bytes
from stagetune_operator.phase_bytes import (
    asked_bytes,
    loading_bytes,
    measured_bytes,
    weight_bytes,
)
from stagetune_operator.stage_scope import (
    StageScope,
    idle_adapters,
    largest_tensor,
    trainable_parameters,
    uses_adapters,
)
from stagetune_operator.state_bytes import state_bytes
from stagetune_operator.step_flops import step_flops

DEVICE_CONTEXT_BYTES = 6 * 2**30 // 10
"""An allowance of 0.6 GiB for the CUDA context, cuBLAS workspaces and the allocator's rounding."""
CHECKPOINTS_AT_ONCE = 3
"""The one being written and the two that are kept, of which the older one goes afterwards."""
CPU_PROCESS_BYTES = 765 * 2**20
"""Resident memory of a trainer's process with its code loaded and nothing else: that of PyTorch's
Linux wheel with its CUDA libraries, for facts of a prepare that has not measured it."""


class Machine(ApiModel):
    """What the plan may take for granted about the device of a stage."""

    is_gpu: bool = True
    """isGpu says whether it is a GPU; Precision Auto then means BF16."""
    memory_bytes: Annotated[int, Field(ge=1)] | None = None
    """memoryBytes of the device; left out, nothing is too large."""
    engine: EnginePlan | None = None
    """engine by which several processes share a stage, each with a device like this."""


CLUSTER_GPU = Machine()


def estimate_stage(
    facts: Facts,
    method: MethodSpec,
    training: TrainingSpec,
    scope: StageScope,
    machine: Machine = CLUSTER_GPU,
) -> StageEstimate:
    """Return what the stage `scope` needs; no fact is zero."""
    full = step_flops(facts, MethodSpec(), training, _everything(facts.model))
    facts, scope = expanded(facts, method, scope)
    model = facts.model
    element = element_bytes(training, machine)
    trainable = trainable_parameters(model, method, scope)
    state = state_bytes(
        method,
        training,
        element=element,
        trainable=trainable,
        largest=largest_tensor(model, method, scope),
        best_in_memory=not machine.is_gpu and training.early_stopping is not None,
    )
    idle = idle_adapters(model, method, scope)
    weights = weight_bytes(model, method, element, start=scope.lowest_run, trainable=trainable)
    weights += 4 * sum(size for layer, size in idle.items() if layer >= scope.lowest_run)
    output = 4 if uses_adapters(method) else element
    activations = activation_bytes(facts, method, training, scope, element, state.master)
    activations += _made_anew_bytes(model, method, element)
    state_memory, between_steps = state.memory, state.between_steps
    # Of several processes each loads all of it before it gives up what the others hold.
    loading = max(
        loading_bytes(model, method, scope, element) + asked_bytes(facts, training, scope),
        weights + state.master * trainable,
    )
    if machine.engine is not None:
        weights = _shared_weight_bytes(machine.engine, model, method, element, weights, scope)
        state_memory = between_steps = shared_state_bytes(machine.engine, trainable)
    flops = step_flops(facts, method, training, scope)
    measured = measured_bytes(facts, training, element, general=scope.measures_general)
    phases = (
        loading,
        weights + state_memory + activations,
        weights + between_steps + measured,
    )
    overhead = overhead_bytes(facts, machine)
    return StageEstimate(
        trainable_parameters=trainable,
        weights_bytes=weights,
        training_state_bytes=state_memory,
        activation_bytes=activations,
        overhead_bytes=overhead,
        memory_bytes=max(phases) + overhead,
        disk_bytes=CHECKPOINTS_AT_ONCE * state.checkpoint + trainable * output,
        checkpoint_bytes=state.checkpoint,
        step_flops=flops,
        relative_step_flops=round(flops / full, 6),
    )


def estimate_full_fine_tuning(
    facts: Facts, training: TrainingSpec, machine: Machine = CLUSTER_GPU
) -> StageEstimate:
    """Return what one stage that opens everything, embeddings and head too, would need."""
    return estimate_stage(facts, MethodSpec(), training, _everything(facts.model), machine)


def _everything(model: ModelFacts) -> StageScope:
    layers = LayerRange(first=0, last=model.num_layers - 1)
    return StageScope(layers, embeddings=True, head=True)


def added_layers(model: ModelFacts, method: MethodSpec) -> int:
    """Return the number of decoder blocks that the method adds to the model."""
    if method.type is not MethodType.EXPAND:
        return 0
    size = (method.expand or ExpandSpec()).layers_per_block
    return expansion.num_blocks(model.num_layers, size)


def expanded(facts: Facts, method: MethodSpec, scope: StageScope) -> tuple[Facts, StageScope]:
    """Return the facts of the expanded model, and the stage's blocks as layers of it.

    The formulas ask for the lowest layer that trains and for how many do. So blocks that stand
    apart count as if they were the lowest one and its neighbours above. Methods that add no block
    get back what they gave.
    """
    if method.type is not MethodType.EXPAND:
        return facts, scope
    size = (method.expand or ExpandSpec()).layers_per_block
    blocks = expansion.block_indices(scope.layers, size)
    layers = LayerRange(first=blocks[0], last=blocks[0] + len(blocks) - 1)
    depth = facts.model.num_layers + added_layers(facts.model, method)
    model = facts.model.model_copy(update={"num_layers": depth})
    scope = replace(scope, layers=layers, embeddings=False, head=False, top_layers=None)
    return facts.model_copy(update={"model": model}), scope


def _shared_weight_bytes(
    engine: EnginePlan,
    model: ModelFacts,
    method: MethodSpec,
    element: int,
    weights: int,
    scope: StageScope,
) -> int:
    """Return what is left in each process of frozen `weights` bytes; layers alone are divided."""
    others = weight_bytes(model, method, element, start=model.num_layers)
    if scope.lowest_run == 0 and not model.tied_embeddings:
        others += element * model.embedding_parameters
    others = min(others, weights)
    layer = element * model.layer.parameters
    return shared_weights_bytes(engine, layers=weights - others, others=others, layer=layer)


def _made_anew_bytes(model: ModelFacts, method: MethodSpec, element: int) -> int:
    """Return the bytes of what is computed from weights for one matrix at a time.

    Under QLoRA that is the largest matrix as it is multiplied with; under DoRA the product of the
    two factors, the adapted weight and the weight in fp32, for the lengths of its rows.
    """
    largest = max(inputs * outputs for inputs, outputs in model.layer.linear_shapes.values())
    dequantised = element * largest if method.type is MethodType.QLORA else 0
    uses_dora = method.lora is not None and method.lora.dora and uses_adapters(method)
    return dequantised + (3 * 4 * largest if uses_dora else 0)


def overhead_bytes(facts: Facts, machine: Machine) -> int:
    """Return what is there before anything of a stage is: a GPU's context, or the process."""
    return DEVICE_CONTEXT_BYTES if machine.is_gpu else facts.process_bytes or CPU_PROCESS_BYTES


def element_bytes(training: TrainingSpec, machine: Machine) -> int:
    """Return the bytes of one computed number: 2 in BF16, 4 in FP32."""
    bf16 = training.precision is Precision.BF16 or (
        training.precision is Precision.AUTO and machine.is_gpu
    )
    return 2 if bf16 else 4
