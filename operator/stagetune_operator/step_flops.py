"""The operations of a stage's step; a part of `estimate`.

Everything is linear in layers, tokens and parameters except attention, whose quadratic term counts
every query-key pair of a row, as PyTorch's FlopCounterMode does.
"""

from stagetune_api.facts import Facts, ModelFacts
from stagetune_api.training_spec import (
    GradientCheckpointing,
    MethodSpec,
    TrainingSpec,
)
from stagetune_operator.stage_scope import (
    EXTRA_NORM_TYPES,
    StageScope,
    adapter_parameters,
    idle_adapters,
    uses_adapters,
)


def step_flops(facts: Facts, method: MethodSpec, training: TrainingSpec, scope: StageScope) -> int:
    """Return the operations of one optimizer step on `batchSize` rows of mean length.

    A matrix costs twice its size per token and pass: forward, the gradient of its input, and the
    gradient of its weights. The prefix runs forward only; the suffix has no weight gradients, nor
    has a group under adapters; attention has a backward of twice its forward wherever there is
    one. Checkpointing runs each layer above the prefix forward again, up to the inputs of its last
    matrix: PyTorch's non-reentrant checkpoint stops there. A cached prefix is not run.
    """
    model, data = facts.model, facts.data
    row_tokens = data.train_tokens / data.train_rows
    tokens = training.batch_size * row_tokens
    answers = training.batch_size * data.train_answer_tokens / data.train_rows
    matrices = 2 * sum(inputs * outputs for inputs, outputs in model.layer.linear_shapes.values())
    # Packed sequences are as long as the longest row, or shorter.
    sequence_tokens = data.max_row_tokens if training.packing else row_tokens
    attention = 4 * model.num_attention_heads * model.head_dim * sequence_tokens
    above = model.num_layers - scope.layers.first
    weight_gradients = 0 if uses_adapters(method) else scope.count
    run = model.num_layers - scope.lowest_run
    layers = run * (matrices + attention) + above * (matrices + 2 * attention)
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
    if model.model_type in EXTRA_NORM_TYPES:
        return 0
    shape = (model.intermediate_size, model.hidden_size)
    return 2 * shape[0] * shape[1] if shape in model.layer.linear_shapes.values() else 0


def _adapter_flops(
    model: ModelFacts, method: MethodSpec, training: TrainingSpec, scope: StageScope
) -> int:
    """Return the adapters' operations per token: the stage's own and those of earlier stages."""
    forward = 2 * adapter_parameters(model, method, scope.rank)
    again = 1 if training.gradient_checkpointing is GradientCheckpointing.ALWAYS else 0
    idle = sum(
        2 * parameters * (1 if layer < scope.layers.first else 2 + again)
        for layer, parameters in idle_adapters(model, method, scope).items()
        if layer >= scope.lowest_run
    )
    return forward * scope.count * (3 + again) + idle
