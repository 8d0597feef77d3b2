"""The bytes of a stage's phases beside its training; a part of `estimate`.

A stage loads its model, may first have to ask the base for something or fill a cache, and measures
at its end what it hands on. Each phase gives its memory back before the next, so that the largest
of them counts.
"""

import math

from stagetune_api.facts import Facts, ModelFacts
from stagetune_api.training_spec import MethodSpec, MethodType, TrainingSpec
from stagetune_operator.stage_scope import StageScope, uses_adapters

NF4_BYTES_PER_PARAMETER = 1 / 2 + 1 / 64 + 4 / (64 * 256)
"""4 bits, a scale of 8 bits for 64 of them, and an fp32 scale for 256 of those: 4.127 bits."""
_TEACHER_POSITIONS = 512
"""Positions at which the base's answers are computed at once."""


def weight_bytes(
    model: ModelFacts,
    method: MethodSpec,
    element: int,
    *,
    start: int,
    stop: int | None = None,
    trainable: int = 0,
) -> int:
    """Return the bytes of the weights from layer `start` up to `stop` that do not train.

    Without a `stop` the head is among them. Embeddings are there where layer 0 is, and where they
    are the head's. Under QLoRA most are in NF4.
    """
    layers = (model.num_layers if stop is None else stop) - start
    frozen = layers * model.layer.parameters + model.final_norm_parameters
    if start == 0 or (stop is None and model.tied_embeddings):
        frozen += model.embedding_parameters
    if stop is None:
        frozen += model.head_parameters
    if not uses_adapters(method):
        frozen -= trainable
    if method.type is not MethodType.QLORA:
        return frozen * element
    shapes = model.layer.linear_shapes.values()
    in_nf4 = layers * sum(inputs * outputs for inputs, outputs in shapes)
    return (frozen - in_nf4) * element + math.ceil(in_nf4 * NF4_BYTES_PER_PARAMETER)


def loading_bytes(model: ModelFacts, method: MethodSpec, scope: StageScope, element: int) -> int:
    """Return the most bytes of weights while the model is loaded, in parts where it is.

    Before a cache there is what fills it, and the whole where the base is asked or blocks are
    copied. Pages of files that are read and converted are the kernel's to take back.
    """
    whole = weight_bytes(model, method, element, start=0)
    if not scope.prefix_cached or scope.asks_base or method.type is MethodType.EXPAND:
        return whole
    first = scope.layers.first
    filling = weight_bytes(model, method, element, start=scope.loaded_from, stop=first)
    return max(filling, weight_bytes(model, method, element, start=first))


def asked_bytes(facts: Facts, training: TrainingSpec, scope: StageScope) -> int:
    """Return the bytes of the base's logits, in fp32 with three copies, where it is asked."""
    if not scope.asks_base:
        return 0
    positions = min(answers_at_once(facts, training), _TEACHER_POSITIONS)
    return positions * facts.model.vocab_size * 4 * 4


def measured_bytes(facts: Facts, training: TrainingSpec, element: int, *, general: bool) -> int:
    """Return the bytes of logits while a stage measures what it hands on: no gradient is there.

    Those of validation answers are compared with the base's, in fp32 with two copies. At `general`
    text all tokens of the longest rows have some and their softmax, as computed; from as many
    tokens as the hidden size on the loss works in chunks, which take next to nothing.
    """
    model = facts.model
    answers = min(answers_at_once(facts, training), model.hidden_size) * 3 * 4
    longest = max(facts.data.max_row_tokens, facts.data.max_general_tokens)
    tokens = training.micro_batch_size * longest
    is_whole = general and tokens < model.hidden_size
    return model.vocab_size * max(answers, tokens * 2 * element if is_whole else 0)


def answers_at_once(facts: Facts, training: TrainingSpec) -> int:
    """Return the answer tokens of a micro-batch of the longest row, where it has the mean share."""
    tokens = training.micro_batch_size * facts.data.max_row_tokens
    return math.ceil(tokens * facts.data.train_answer_tokens / facts.data.train_tokens)
