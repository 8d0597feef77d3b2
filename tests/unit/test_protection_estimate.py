"""What protection adds to a plan, against the formulas' own terms."""

from typing import Any

import pytest

from stagetune_api.facts import DataFacts, Facts
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.stage import StageEstimate
from stagetune_api.training_spec import LayerRange, MethodSpec, ProtectionSpec, TrainingSpec
from stagetune_operator.estimate import CLUSTER_GPU, estimate_stage
from stagetune_operator.model_facts import model_facts_from_config
from stagetune_operator.plan import Plan, make_plan
from stagetune_operator.protection_estimate import ProtectedStage, add_protection
from stagetune_operator.stage_scope import StageScope
from stagetune_operator.step_flops import step_flops

CONFIG = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
DATA = DataFacts(
    train_rows=100,
    validation_rows=10,
    train_tokens=10000,
    train_answer_tokens=4000,
    max_row_tokens=200,
    replay_rows=20,
    replay_tokens=2000,
)
TRAINING = TrainingSpec(learning_rate=1e-4, batch_size=16, micro_batch_size=2)
SCOPE = StageScope(LayerRange(first=2, last=5))


def facts(**changes: Any) -> Facts:
    model = model_facts_from_config(CONFIG)
    assert not isinstance(model, list)
    data = DATA.model_copy(update=changes)
    return Facts(model=model, data=data, model_directory="")


def protected(
    protection: dict[str, Any], *, is_first: bool = True, **changes: Any
) -> tuple[StageEstimate, StageEstimate]:
    """Return the estimate of a stage without protection and with it."""
    plain = estimate_stage(facts(**changes), MethodSpec(), TRAINING, SCOPE)
    stage = ProtectedStage(
        method=MethodSpec(), training=TRAINING, scope=SCOPE, rows=50, is_first=is_first
    )
    spec = ProtectionSpec.model_validate(protection)
    return plain, add_protection(plain, spec, facts(**changes), stage, CLUSTER_GPU)


def test_no_weight_adds_nothing() -> None:
    plain, found = protected({"distillation": {"weight": 0}, "anchor": {"weight": 0}})
    assert found == plain


def test_distillation_keeps_the_likeliest_tokens_on_the_first_stage_s_disk() -> None:
    plain, found = protected({"distillation": {"weight": 1, "topK": 10}})
    assert found.disk_bytes - plain.disk_bytes == 4000 * 62
    plain, found = protected({"distillation": {"weight": 1}}, is_first=False)
    assert found.disk_bytes == plain.disk_bytes
    # 2 rows of 200 tokens of which two in five are answers.
    assert found.memory_bytes - plain.memory_bytes == 160 * 32000 * 24
    assert found.step_flops == plain.step_flops


def test_distillation_computes_logits_again_where_they_come_in_parts() -> None:
    plain, found = protected({"distillation": {"weight": 1}}, train_answer_tokens=9000)
    assert found.step_flops == plain.step_flops
    rows = {"train_rows": 10, "train_answer_tokens": 9000}
    plain, found = protected({"distillation": {"weight": 1}}, **rows)
    assert found.step_flops - plain.step_flops == 16 * 900 * 2 * 32000 * 512


def test_anchor_keeps_the_hidden_states_of_the_stage_s_rows() -> None:
    plain, found = protected({"anchor": {"weight": 1}}, is_first=False)
    assert found.disk_bytes - plain.disk_bytes == 50 * 100 * 512 * 2
    assert found.memory_bytes - plain.memory_bytes == 2 * 200 * 512 * 14
    assert found.step_flops == plain.step_flops


def test_hidden_states_of_one_stage_at_a_time_are_on_the_volume() -> None:
    body = {
        "model": {"source": "hf://org/model"},
        "dataset": {"source": "hf://org/rows", "validation": {"fraction": 0.05}},
        "training": {"learningRate": 1e-4},
        "schedule": {"layersPerStage": 2, "passes": 3},
    }
    disk = []
    for protection in ({}, {"protection": {"anchor": {"weight": 1}}}):
        plan = make_plan(StagedFineTuneSpec.model_validate({**body, **protection}), facts())
        assert isinstance(plan, Plan)
        disk.append(plan.summary.disk_bytes)

    # 100 rows of 100 tokens, the same in each of the twelve stages.
    assert disk[1] - disk[0] == 100 * 100 * 512 * 2


@pytest.mark.parametrize(("ratio", "rows"), [(0.25, 4), (0.001, 1)])
def test_replayed_rows_cost_what_rows_cost_with_all_tokens_at_the_head(
    ratio: float, rows: int
) -> None:
    plain, found = protected({"replay": {"ratio": ratio, "generated": {}}})
    replayed = facts(train_rows=20, train_tokens=2000, train_answer_tokens=1980)
    training = TRAINING.model_copy(update={"batch_size": rows})
    expected = step_flops(replayed, MethodSpec(), training, SCOPE)
    assert found.step_flops - plain.step_flops == expected
    grown = found.step_flops / plain.step_flops
    assert found.relative_step_flops == pytest.approx(plain.relative_step_flops * grown, rel=1e-4)
    assert found.disk_bytes == plain.disk_bytes


def test_replayed_rows_under_expand_train_the_blocks_alone() -> None:
    method = MethodSpec.model_validate({"type": "Expand", "expand": {"layersPerBlock": 4}})
    scope = StageScope(LayerRange(first=0, last=3))
    given = facts(max_row_tokens=100, train_answer_tokens=9900, replay_rows=10, replay_tokens=1000)
    plain = estimate_stage(given, method, TRAINING, scope)
    stage = ProtectedStage(method=method, training=TRAINING, scope=scope, rows=50, is_first=True)
    spec = ProtectionSpec.model_validate({"replay": {"ratio": 0.5, "generated": {}}})

    found = add_protection(plain, spec, given, stage, CLUSTER_GPU)

    # Rows of the same length, all their tokens at the head: half a batch of them costs half.
    assert found.step_flops == pytest.approx(1.5 * plain.step_flops, rel=1e-9)
