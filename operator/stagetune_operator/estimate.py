"""What a stage asks of a device: memory, disk and floating-point operations, all by formula.

`plan` calls this once per stage. docs/plan.md explains the formulas in words and says how far each
is from what was measured. Everything is linear in layers, tokens and parameters except attention,
whose quadratic term counts every query-key pair of a row, as PyTorch's FlopCounterMode does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from stagetune_api import expansion
from stagetune_api.base import ApiModel
from stagetune_api.facts import DataFacts, Facts, ModelFacts
from stagetune_api.stage import StageEstimate
from stagetune_api.training_spec import (
    ExpandSpec,
    GradientCheckpointing,
    LayerRange,
    LoraSpec,
    MethodSpec,
    MethodType,
    Precision,
    TrainingSpec,
)
from stagetune_operator.state_bytes import state_bytes

DEVICE_CONTEXT_BYTES = 6 * 2**30 // 10
"""An allowance of 0.6 GiB for the CUDA context, cuBLAS workspaces and the allocator's rounding."""
CHECKPOINTS_AT_ONCE = 2
"""The one being written and the one it replaces."""
NF4_BYTES_PER_PARAMETER = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""4 bits, a scale of 8 bits for 64 of them, and an fp32 scale for 256 of those: 4.127 bits."""
_EXTRA_NORM_TYPES = frozenset({"gemma2", "gemma3_text"})  # a norm behind each block too
_QUERY_KEY_NORM_TYPES = frozenset({"qwen3", "gemma3_text"})
_SOFT_CAPPED_TYPES = frozenset({"gemma2"})  # neither attention nor loss has a fused form


class Machine(ApiModel):
    """What the plan may take for granted about the device of a stage."""

    is_gpu: bool = True
    """isGpu says whether it is a GPU; Precision Auto then means BF16."""
    memory_bytes: Annotated[int, Field(ge=1)] | None = None
    """memoryBytes of the device; left out, nothing is too large."""


CLUSTER_GPU = Machine()


@dataclass(frozen=True)
class StageScope:
    """What a stage opens, and which other layers already hold adapters of earlier stages."""

    layers: LayerRange
    embeddings: bool = False
    head: bool = False
    adapted_layers: frozenset[int] = frozenset()
    top_layers: LayerRange | None = None
    """Layers that it opens too, above `layers` and not touching them."""
    rank: int | None = None
    """Rank of its adapters; None where that of the method counts."""
    adapted_ranks: Mapping[int, int] = field(default_factory=dict)
    """Rank of the earlier adapters of a layer where it is not that of the method."""

    @property
    def count(self) -> int:
        """Number of layers that it opens."""
        return self.layers.count + (self.top_layers.count if self.top_layers else 0)


def estimate_stage(
    facts: Facts,
    method: MethodSpec,
    training: TrainingSpec,
    scope: StageScope,
    machine: Machine = CLUSTER_GPU,
) -> StageEstimate:
    """Return what the stage `scope` needs; no fact is zero."""
    full = step_flops(facts, MethodSpec(), training, _everything(facts.model))
    if method.type is MethodType.EXPAND:
        facts, scope = _expanded(facts, method, scope)
    model = facts.model
    element = element_bytes(training, machine)
    trainable = trainable_parameters(model, method, scope)
    state = state_bytes(
        method,
        training,
        element=element,
        trainable=trainable,
        largest=_largest_tensor(model, method, scope),
    )
    idle_adapters = sum(_idle_adapters(model, method, scope).values())
    frozen = _frozen_bytes(model, method, trainable, element)
    weights = frozen + idle_adapters * 4
    output = 4 if uses_adapters(method) else element
    context = DEVICE_CONTEXT_BYTES if machine.is_gpu else 0
    activations = _activation_bytes(facts, method, training, scope, element, state.master)
    activations += _made_anew_bytes(model, method, element)
    flops = step_flops(facts, method, training, scope)
    return StageEstimate(
        trainable_parameters=trainable,
        weights_bytes=weights,
        training_state_bytes=state.memory,
        activation_bytes=activations,
        memory_bytes=weights + state.memory + activations + context,
        disk_bytes=CHECKPOINTS_AT_ONCE * state.checkpoint + trainable * output,
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


def _expanded(facts: Facts, method: MethodSpec, scope: StageScope) -> tuple[Facts, StageScope]:
    """Return the facts of the expanded model, and the stage's blocks as layers of it.

    The formulas ask for the lowest layer that trains and for how many do. So blocks that stand
    apart count as if they were the lowest one and its neighbours above.
    """
    size = (method.expand or ExpandSpec()).layers_per_block
    blocks = expansion.block_indices(scope.layers, size)
    layers = LayerRange(first=blocks[0], last=blocks[0] + len(blocks) - 1)
    depth = facts.model.num_layers + added_layers(facts.model, method)
    model = facts.model.model_copy(update={"num_layers": depth})
    return facts.model_copy(update={"model": model}), StageScope(layers)


def uses_adapters(method: MethodSpec) -> bool:
    """Whether adapters train, and not weights of the model."""
    return method.type in (MethodType.LORA, MethodType.QLORA)


def _frozen_bytes(model: ModelFacts, method: MethodSpec, trainable: int, element: int) -> int:
    """Return the bytes of the weights that do not train; under QLoRA most are in NF4."""
    frozen = model.parameters - (0 if uses_adapters(method) else trainable)
    if method.type is not MethodType.QLORA:
        return frozen * element
    shapes = model.layer.linear_shapes.values()
    in_nf4 = model.num_layers * sum(inputs * outputs for inputs, outputs in shapes)
    return (frozen - in_nf4) * element + math.ceil(in_nf4 * NF4_BYTES_PER_PARAMETER)


def _made_anew_bytes(model: ModelFacts, method: MethodSpec, element: int) -> int:
    """Return the bytes of what is computed from weights for one matrix at a time.

    Under QLoRA that is the largest matrix as it is multiplied with; under DoRA the product of the
    two factors, the adapted weight and the weight in fp32, for the lengths of its rows.
    """
    largest = max(inputs * outputs for inputs, outputs in model.layer.linear_shapes.values())
    dequantised = element * largest if method.type is MethodType.QLORA else 0
    uses_dora = method.lora is not None and method.lora.dora and uses_adapters(method)
    return dequantised + (3 * 4 * largest if uses_dora else 0)


def element_bytes(training: TrainingSpec, machine: Machine) -> int:
    """Return the bytes of one computed number: 2 in BF16, 4 in FP32."""
    bf16 = training.precision is Precision.BF16 or (
        training.precision is Precision.AUTO and machine.is_gpu
    )
    return 2 if bf16 else 4


def is_target(module: str, target: str) -> bool:
    """Whether the linear module `module` is meant by the last name part `target`."""
    return module.rpartition(".")[2] == target


def adapted_shapes(model: ModelFacts, method: MethodSpec) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of the linear modules of one layer that get an adapter."""
    if not uses_adapters(method):
        return []
    targets = (method.lora or LoraSpec()).target_modules
    shapes = model.layer.linear_shapes.items()
    return [
        shape
        for name, shape in shapes
        if targets is None or any(is_target(name, target) for target in targets)
    ]


def _adapter_parameters(model: ModelFacts, method: MethodSpec, rank: int | None) -> int:
    """Return the adapters' parameters in one layer: rank * (inputs + outputs) per module.

    DoRA adds a length for each output.
    """
    lora = method.lora or LoraSpec()
    shapes = adapted_shapes(model, method)
    lengths = sum(outputs for _, outputs in shapes) if lora.dora else 0
    return (rank or lora.rank) * sum(inputs + outputs for inputs, outputs in shapes) + lengths


def _idle_adapters(model: ModelFacts, method: MethodSpec, scope: StageScope) -> dict[int, int]:
    """Return the parameters of the adapters of earlier stages, by layer."""
    return {
        layer: _adapter_parameters(model, method, scope.adapted_ranks.get(layer))
        for layer in scope.adapted_layers
    }


def trainable_parameters(model: ModelFacts, method: MethodSpec, scope: StageScope) -> int:
    """Return how many parameters the stage trains."""
    if uses_adapters(method):
        return scope.count * _adapter_parameters(model, method, scope.rank)
    head = model.head_parameters + model.final_norm_parameters
    return (
        scope.count * model.layer.parameters
        + (model.embedding_parameters if scope.embeddings else 0)
        + (head if scope.head else 0)
    )


def _largest_tensor(model: ModelFacts, method: MethodSpec, scope: StageScope) -> int:
    """Return the parameters of the largest tensor that trains."""
    if uses_adapters(method):
        rank = scope.rank or (method.lora or LoraSpec()).rank
        return rank * max((max(shape) for shape in adapted_shapes(model, method)), default=0)
    matrices = [inputs * outputs for inputs, outputs in model.layer.linear_shapes.values()]
    embeddings = model.embedding_parameters if scope.embeddings else 0
    return max([*matrices, embeddings, model.head_parameters if scope.head else 0])


def layer_activation_bytes(
    model: ModelFacts, *, trained: bool, element: int, row_tokens: int
) -> int:
    """Return the bytes per token that one decoder layer keeps for the backward pass.

    With d the hidden size, q the width of all attention heads, f the feed-forward width and n the
    width of all norms (2d; more where a family normalises queries and keys or block outputs), a
    frozen layer above the group keeps, in bf16 numbers of 2 bytes,

    - 4q: query, key and value as if repeated to all heads, and the attention's output;
    - 3f: gate, up and the activated gate (as much for an ungated block's chain of element-wise
      steps);
    - 2d: the residual stream in front of both blocks;

    and n fp32 numbers inside the norms. A layer that trains also keeps 2n bf16 numbers (normalised
    values for the norms' own gradients, and the linear modules' inputs), q in front of the output
    projection and f in front of the down projection. An adapter keeps the same inputs as the weight
    beside it. FP32 counts double. The weights of these terms are those that meet the measurements
    in docs/plan.md; kernels that need no repeated keys and values keep up to a sixth less.
    """
    hidden, feed_forward = model.hidden_size, model.intermediate_size
    query = model.num_attention_heads * model.head_dim
    normed = (4 if model.model_type in _EXTRA_NORM_TYPES else 2) * hidden
    if model.model_type in _QUERY_KEY_NORM_TYPES:
        outputs = sum(outputs for _, outputs in model.layer.linear_shapes.values())
        keys_and_values = outputs - query - 2 * feed_forward - 2 * hidden
        normed += query + keys_and_values // 2
    numbers = 4 * query + 3 * feed_forward + 2 * hidden
    if trained:
        numbers += 2 * normed + query + feed_forward
    scores = 0
    if model.model_type in _SOFT_CAPPED_TYPES:
        scores = model.num_attention_heads * row_tokens * (2 + 4)
    return (2 * numbers + 4 * normed + scores) * element // 2


def _activation_bytes(
    facts: Facts,
    method: MethodSpec,
    training: TrainingSpec,
    scope: StageScope,
    element: int,
    master: int,
) -> int:
    """Return the bytes at the widest point of one micro-batch of the longest row.

    With gradient checkpointing that is either the loss or the recomputation of one trained layer
    with autocast's bf16 copy of its weights, on top of the layers' borders; without, everything at
    once. A head that trains computes in its masters' format, beside the newest gradient.
    """
    model, data = facts.model, facts.data
    row = data.max_row_tokens
    tokens = training.micro_batch_size * row
    rank = scope.rank or (method.lora or LoraSpec()).rank
    trained = layer_activation_bytes(model, trained=True, element=element, row_tokens=row)
    trained += element * rank * len(adapted_shapes(model, method))
    last_norm = model.hidden_size * (4 + element)
    copy = _working_copy_bytes(model, method, scope) if element < master else 0
    loss = _loss_bytes(model, data, tokens, master if scope.head else element)
    loss += master * model.vocab_size * model.hidden_size if scope.head else 0
    if training.gradient_checkpointing is GradientCheckpointing.ALWAYS:
        borders = (model.num_layers - scope.layers.first) * model.hidden_size * element
        return tokens * (borders + last_norm) + max(tokens * trained + copy, loss)
    frozen = layer_activation_bytes(model, trained=False, element=element, row_tokens=row)
    suffix = model.num_layers - scope.layers.first - scope.count
    kept = scope.count * trained + suffix * frozen + last_norm
    return tokens * kept + scope.count * copy + loss


def _loss_bytes(model: ModelFacts, data: DataFacts, tokens: int, element: int) -> int:
    """Return the bytes of the logits: once as computed, and in fp32 softmax and gradient.

    Only tokens of answers reach the head; above as many as the hidden size the loss works in
    smaller chunks. Soft-capped logits are never chunked and keep two steps of the cap too.
    """
    answers = math.ceil(tokens * data.train_answer_tokens / data.train_tokens)
    if model.model_type in _SOFT_CAPPED_TYPES:
        return answers * model.vocab_size * (4 + 4 + 3 * element)
    return min(answers, model.hidden_size) * model.vocab_size * (4 + 4 + element)


def _working_copy_bytes(model: ModelFacts, method: MethodSpec, scope: StageScope) -> int:
    """Return the bytes of autocast's bf16 copy of what trains in one layer.

    It lives from its use to its gradient: with checkpointing one layer at a time.
    """
    if uses_adapters(method):
        return 2 * _adapter_parameters(model, method, scope.rank)
    return 2 * model.layer.parameters


def step_flops(facts: Facts, method: MethodSpec, training: TrainingSpec, scope: StageScope) -> int:
    """Return the operations of one optimizer step on `batchSize` rows of mean length.

    A matrix costs twice its size per token and pass: forward, the gradient of its input, and the
    gradient of its weights. The prefix runs forward only; the suffix has no weight gradients, nor
    has a group under adapters; attention has a backward of twice its forward wherever there is
    one. Checkpointing runs each layer above the prefix forward again, up to the inputs of its last
    matrix: PyTorch's non-reentrant checkpoint stops there.
    """
    model, data = facts.model, facts.data
    row_tokens = data.train_tokens / data.train_rows
    tokens = training.batch_size * row_tokens
    answers = training.batch_size * data.train_answer_tokens / data.train_rows
    matrices = 2 * sum(inputs * outputs for inputs, outputs in model.layer.linear_shapes.values())
    attention = 4 * model.num_attention_heads * model.head_dim * row_tokens
    above = model.num_layers - scope.layers.first
    weight_gradients = 0 if uses_adapters(method) else scope.count
    layers = model.num_layers * (matrices + attention) + above * (matrices + 2 * attention)
    layers += weight_gradients * matrices
    if training.gradient_checkpointing is GradientCheckpointing.ALWAYS:
        layers += above * (matrices + attention - _last_matrix_flops(model))
    layers += _adapter_flops(model, method, training, scope)
    head = 2 * model.vocab_size * model.hidden_size * (3 if scope.head else 2)
    return round(tokens * layers + answers * head)


def _last_matrix_flops(model: ModelFacts) -> int:
    """Return the operations per token of a layer's last matrix, if nothing follows it.

    A norm behind it keeps its output for the backward pass, so it has to be run again.
    """
    if model.model_type in _EXTRA_NORM_TYPES:
        return 0
    shape = (model.intermediate_size, model.hidden_size)
    return 2 * shape[0] * shape[1] if shape in model.layer.linear_shapes.values() else 0


def _adapter_flops(
    model: ModelFacts, method: MethodSpec, training: TrainingSpec, scope: StageScope
) -> int:
    """Return the adapters' operations per token: the stage's own and those of earlier stages."""
    forward = 2 * _adapter_parameters(model, method, scope.rank)
    again = 1 if training.gradient_checkpointing is GradientCheckpointing.ALWAYS else 0
    idle = sum(
        2 * parameters * (1 if layer < scope.layers.first else 2 + again)
        for layer, parameters in _idle_adapters(model, method, scope).items()
    )
    return forward * scope.count * (3 + again) + idle
