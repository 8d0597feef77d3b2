"""What protection adds to a stage's estimate: memory, disk and operations by formula.

`plan` calls it once per stage, on what `estimate` says of the stage alone. docs/plan.md explains
the formulas in words.
"""

from dataclasses import dataclass

from stagetune_api.facts import DataFacts, Facts
from stagetune_api.stage import StageEstimate
from stagetune_api.training_spec import MethodSpec, ProtectionSpec, TrainingSpec
from stagetune_operator.activation_bytes import logit_bytes
from stagetune_operator.estimate import Machine, element_bytes, expanded
from stagetune_operator.stage_scope import StageScope
from stagetune_operator.step_flops import step_flops

_HIDDEN_STATE_BYTES = 2
_TOKEN_AND_PROBABILITY_BYTES = 4 + 2
_REST_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class ProtectedStage:
    """What protection's cost depends on, beside model and data."""

    method: MethodSpec
    training: TrainingSpec
    """With the stage's own sizes of batches."""
    scope: StageScope
    rows: int
    """Rows that the stage sees."""
    is_first: bool
    """Whether the stage is the first to run, which computes what all of them read."""


def add_protection(
    estimate: StageEstimate,
    protection: ProtectionSpec | None,
    facts: Facts,
    stage: ProtectedStage,
    machine: Machine,
) -> StageEstimate:
    """Return `estimate` with what distillation, anchor and replay need on top."""
    if protection is None:
        return estimate
    memory = _memory_bytes(protection, facts, stage, machine)
    activations = estimate.activation_bytes + memory
    training = estimate.weights_bytes + estimate.training_state_bytes + activations
    flops = _step_flops(protection, facts, stage)
    factor = (estimate.step_flops + flops) / max(estimate.step_flops, 1)
    return estimate.model_copy(
        update={
            "activation_bytes": activations,
            "memory_bytes": max(estimate.memory_bytes, training + estimate.overhead_bytes),
            "disk_bytes": estimate.disk_bytes + _disk_bytes(protection, facts, stage),
            "step_flops": estimate.step_flops + flops,
            "relative_step_flops": round(estimate.relative_step_flops * factor, 6),
        }
    )


def asks_the_base(protection: ProtectionSpec | None) -> bool:
    """Whether every stage needs the whole base model before it trains, and not the first alone."""
    return protection is not None and has_weight(protection.anchor)


def has_weight(part: object) -> bool:
    """Whether a part of the protection is there and counts for something."""
    return getattr(part, "weight", 0.0) > 0


def _step_flops(protection: ProtectionSpec, facts: Facts, stage: ProtectedStage) -> int:
    """Return the operations that one optimizer step has more.

    Replayed rows cost as other rows do, with all their tokens at the head. Distillation takes its
    logits from those of the loss and computes them once more where a micro-batch has more answer
    tokens than the hidden size. The anchor multiplies no matrix.
    """
    model, flops = facts.model, 0
    if protection.replay is not None:
        rows = protection.replay.rows_per_step(stage.training.batch_size)
        training = stage.training.model_copy(update={"batch_size": rows})
        replayed = facts.model_copy(update={"data": _replay_data(facts.data)})
        deeper, scope = expanded(replayed, stage.method, stage.scope)
        flops += step_flops(deeper, stage.method, training, scope)
    if has_weight(protection.distillation):
        answers_of_row = facts.data.train_answer_tokens / facts.data.train_rows
        if stage.training.micro_batch_size * answers_of_row > model.hidden_size:
            answers = stage.training.batch_size * answers_of_row
            flops += round(answers * 2 * model.vocab_size * model.hidden_size)
    return flops


def _replay_data(data: DataFacts) -> DataFacts:
    """Return the replayed rows as if they were trained on; before prepare, as long as can be."""
    rows = data.replay_rows or 1
    tokens = data.replay_tokens or data.max_row_tokens
    return data.model_copy(
        update={"train_rows": rows, "train_tokens": tokens, "train_answer_tokens": tokens - rows}
    )


def _memory_bytes(
    protection: ProtectionSpec, facts: Facts, stage: ProtectedStage, machine: Machine
) -> int:
    """Return the bytes that stand on the device on top, at the widest point.

    Distillation holds eight numbers in fp32 for each token of the vocabulary, at each answer token
    up to the hidden size, where the loss alone holds four as computed. The anchor keeps both hidden
    states and their difference in fp32 and the base's as stored (14 bytes for each number). All
    tokens of a replayed row are at the head.
    """
    model, data = facts.model, facts.data
    tokens = stage.training.micro_batch_size * data.max_row_tokens
    answers = -(-tokens * data.train_answer_tokens // data.train_tokens)
    at_head = min(answers, model.hidden_size)
    element = element_bytes(stage.training, machine)
    total = 0
    if has_weight(protection.distillation):
        total += at_head * model.vocab_size * (8 * 4 - logit_bytes(element))
    if has_weight(protection.anchor):
        total += tokens * model.hidden_size * 14
    if protection.replay is not None:
        more = min(tokens, model.hidden_size) - at_head
        total = max(total, more * model.vocab_size * logit_bytes(element))
    return total


def _disk_bytes(protection: ProtectionSpec, facts: Facts, stage: ProtectedStage) -> int:
    """Return the bytes on the volume: the teacher with the first stage, hidden states with each."""
    data, total = facts.data, 0
    if (
        stage.is_first
        and protection.distillation is not None
        and has_weight(protection.distillation)
    ):
        top_k = min(protection.distillation.top_k, facts.model.vocab_size)
        total += data.train_answer_tokens * (top_k * _TOKEN_AND_PROBABILITY_BYTES + _REST_BYTES)
    return total + hidden_states_bytes(protection, facts, stage.rows)


def hidden_states_bytes(protection: ProtectionSpec | None, facts: Facts, rows: int) -> int:
    """Return the bytes on the volume of what the anchor of a stage with `rows` rows compares with.

    They are removed when the stage is published.
    """
    if protection is None or not has_weight(protection.anchor):
        return 0
    tokens = round(rows * facts.data.train_tokens / facts.data.train_rows)
    return tokens * facts.model.hidden_size * _HIDDEN_STATE_BYTES
