"""The bytes that a stage keeps for its backward pass; a part of `estimate`.

docs/plan.md explains the formulas in words and says how far each is from what was measured.
"""

import math

from stagetune_api.facts import DataFacts, Facts, ModelFacts
from stagetune_api.training_spec import (
    GradientCheckpointing,
    LoraSpec,
    MethodSpec,
    TrainingSpec,
)
from stagetune_operator.stage_scope import (
    EXTRA_NORM_TYPES,
    StageScope,
    adapted_shapes,
    adapter_parameters,
    uses_adapters,
)

_QUERY_KEY_NORM_TYPES = frozenset({"qwen3", "gemma3_text"})
_SOFT_CAPPED_TYPES = frozenset({"gemma2"})  # neither attention nor loss has a fused form


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
    normed = (4 if model.model_type in EXTRA_NORM_TYPES else 2) * hidden
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


def activation_bytes(
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
    # Every layer keeps the mask between the rows of a sequence as numbers that it adds to scores.
    mask = element * row if training.packing else 0
    trained += mask
    last_norm = model.hidden_size * (4 + element)
    copy = _working_copy_bytes(model, method, scope) if element < master else 0
    loss = _loss_bytes(model, data, tokens, master if scope.head else element)
    loss += master * model.vocab_size * model.hidden_size if scope.head else 0
    if training.gradient_checkpointing is GradientCheckpointing.ALWAYS:
        borders = (model.num_layers - scope.layers.first) * model.hidden_size * element
        return tokens * (borders + last_norm) + max(tokens * trained + copy, loss)
    frozen = layer_activation_bytes(model, trained=False, element=element, row_tokens=row) + mask
    suffix = model.num_layers - scope.layers.first - scope.count
    kept = scope.count * trained + suffix * frozen + last_norm
    return tokens * kept + scope.count * copy + loss


def _loss_bytes(model: ModelFacts, data: DataFacts, tokens: int, element: int) -> int:
    """Return the bytes of the logits, their softmax, and the gradients of both.

    Only tokens of answers reach the head; above as many as the hidden size the loss works in
    smaller chunks. Soft-capped logits are never chunked and keep two steps of the cap too.
    """
    answers = math.ceil(tokens * data.train_answer_tokens / data.train_tokens)
    if model.model_type in _SOFT_CAPPED_TYPES:
        return answers * model.vocab_size * (4 + 4 + 3 * element)
    return min(answers, model.hidden_size) * model.vocab_size * logit_bytes(element)


def logit_bytes(element: int) -> int:
    """Return the bytes of one logit in the loss: it, its softmax, and the gradients of both."""
    return 4 * element


def _working_copy_bytes(model: ModelFacts, method: MethodSpec, scope: StageScope) -> int:
    """Return the bytes of autocast's bf16 copy of what trains in one layer.

    It lives from its use to its gradient: with checkpointing one layer at a time.
    """
    if uses_adapters(method):
        return 2 * adapter_parameters(model, method, scope.rank)
    return 2 * model.layer.parameters
