"""Which stages keep the hidden states below them: for the least time of the whole run."""

from __future__ import annotations

from typing import Any

import pytest

from stagetune_api.facts import DataFacts, Facts, ModelFacts
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.stage import EnginePlan, PlannedStage, PrefixCachePlan
from stagetune_api.status import StagedFineTuneStatus, StageState, StageStatus
from stagetune_operator.estimate import CPU_PROCESS_BYTES, Machine
from stagetune_operator.model_facts import model_facts_from_config
from stagetune_operator.plan import Plan, make_plan
from stagetune_operator.plan_record import PlanRecord
from stagetune_operator.replan import plan_run

CPU = Machine(is_gpu=False)
HIDDEN = 64


def facts(num_layers: int = 12, **data: Any) -> Facts:
    model = model_facts_from_config(
        {
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": 160,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "vocab_size": 500,
            "tie_word_embeddings": False,
        }
    )
    assert isinstance(model, ModelFacts)
    sizes = {
        "train_rows": 1000,
        "validation_rows": 50,
        "train_tokens": 200_000,
        "train_answer_tokens": 60_000,
        "max_row_tokens": 512,
    }
    return Facts(model=model, data=DataFacts(**{**sizes, **data}), model_directory="models/base")


def plan(
    schedule: dict[str, Any] | None,
    *,
    machine: Machine = CPU,
    given: Facts | None = None,
    **more: Any,
) -> Plan:
    found = make_plan(_spec(schedule, **more), given or facts(), machine)
    assert isinstance(found, Plan), found
    return found


def _spec(schedule: dict[str, Any] | None, **more: Any) -> StagedFineTuneSpec:
    sections = {"training": {"learningRate": 1e-4, "batchSize": 10}, **more}
    body = {
        "model": {"source": "hf://org/model"},
        "dataset": {"source": "hf://org/rows", "validation": {"fraction": 0.05}},
        **({"schedule": schedule} if schedule is not None else {}),
        **sections,
    }
    return StagedFineTuneSpec.model_validate(body)


def cache(stage: PlannedStage) -> PrefixCachePlan:
    assert stage.prefix_cache is not None
    return stage.prefix_cache


def kept_bytes(found: Plan) -> int:
    """What all stages leave, and the checkpoint that one of them writes beside those it keeps."""
    estimates = [stage.estimate for stage in found.stages]
    left = sum(estimate.disk_bytes - estimate.checkpoint_bytes for estimate in estimates)
    return left + max(estimate.checkpoint_bytes for estimate in estimates)


def test_nothing_lies_below_the_lowest_stage() -> None:
    assert plan({"stageCount": 3}).stages[0].prefix_cache is None


def test_states_are_carried_on_from_border_to_border() -> None:
    found = plan({"stageCount": 3, "epochsPerStage": 3})

    middle, top = (cache(stage) for stage in found.stages[1:])
    assert (middle.used, middle.begins_at) == (True, 0)
    assert (top.used, top.begins_at) == (True, 4)
    # 1,050 rows of 200 tokens, 64 numbers of 4 bytes each.
    assert middle.disk_bytes == top.disk_bytes == 1050 * 200 * HIDDEN * 4
    # Four layers each, once.
    assert middle.flops == top.flops
    assert "below layer 8" in top.reason


def test_a_cached_prefix_is_neither_run_nor_loaded() -> None:
    without = plan({"stageCount": 3, "epochsPerStage": 3}, training=never()).stages[2].estimate
    found = plan({"stageCount": 3, "epochsPerStage": 3}).stages[2].estimate
    model = facts().model

    below = 8 * model.layer.parameters + model.embedding_parameters
    assert without.weights_bytes - found.weights_bytes == 4 * below
    assert without.memory_bytes - found.memory_bytes == 4 * below
    matrices = sum(inputs * outputs for inputs, outputs in model.layer.linear_shapes.values())
    attention = 4 * HIDDEN * 200
    saved = 10 * 200 * 8 * (2 * matrices + attention)
    assert without.step_flops - found.step_flops == pytest.approx(saved, rel=1e-6)
    assert found.training_state_bytes == without.training_state_bytes
    assert found.activation_bytes == without.activation_bytes


def never() -> dict[str, Any]:
    return {"learningRate": 1e-4, "batchSize": 10, "prefixCache": "Never"}


def test_never_is_never() -> None:
    found = plan({"stageCount": 3, "epochsPerStage": 3}, training=never())

    assert [cache(stage).used for stage in found.stages[1:]] == [False, False]
    assert cache(found.stages[1]).reason == "prefixCache is Never"
    assert found.summary.disk_bytes == kept_bytes(found)


def test_two_caches_stand_on_the_volume_while_one_is_carried_on() -> None:
    found = plan({"stageCount": 4, "epochsPerStage": 3})

    kept = kept_bytes(found)
    assert found.summary.disk_bytes == kept + 2 * cache(found.stages[1]).disk_bytes


def test_what_fills_a_cache_counts_among_the_operations() -> None:
    found = plan({"stageCount": 3, "epochsPerStage": 3})

    steps = sum(stage.steps * stage.estimate.step_flops for stage in found.stages)
    filled = sum(cache(stage).flops for stage in found.stages[1:])
    assert found.summary.total_flops == steps + filled


def test_rows_of_a_stage_s_own_are_not_there_from_the_stage_before() -> None:
    schedule = {"stageCount": 3, "epochsPerStage": 4, "dataPartition": "Disjoint"}

    assert [cache(stage).begins_at for stage in plan(schedule).stages[1:]] == [0, 0]


def test_from_the_top_down_every_border_is_computed_from_the_tokens() -> None:
    found = plan({"stageCount": 3, "epochsPerStage": 3, "order": "TopDown"})

    assert [cache(stage).used for stage in found.stages[:2]] == [True, True]
    assert [cache(stage).begins_at for stage in found.stages[:2]] == [0, 0]
    assert found.stages[2].prefix_cache is None


def test_a_fast_device_computes_a_small_prefix_sooner_than_it_reads_it() -> None:
    found = cache(plan({"stageCount": 2}, machine=Machine()).stages[1])

    assert not found.used
    assert "keeping its states would take longer than computing 6 layers" in found.reason
    assert found.disk_bytes == found.flops == 0


def test_several_processes_compute_a_prefix_together_and_one_alone_fills_a_cache() -> None:
    engine = EnginePlan(processes_per_node=8, zero_stage=2)
    spec = {"training": {"learningRate": 1e-4, "batchSize": 16, "microBatchSize": 1}}
    alone = plan({"stageCount": 3}, **spec)
    together = plan({"stageCount": 3}, machine=Machine(is_gpu=False, engine=engine), **spec)
    assert [cache(stage).used for stage in alone.stages[1:]] == [True, True]
    assert [cache(stage).used for stage in together.stages[1:]] == [False, False]


def test_what_does_not_pay_for_itself_may_pay_for_the_stages_above() -> None:
    """A large model's low border, read about once, begins the caches of all borders above it."""
    config = {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    }
    model = model_facts_from_config(config)
    assert isinstance(model, ModelFacts)
    given = facts().model_copy(update={"model": model})
    found = plan({"layersPerStage": 4}, machine=Machine(), given=given, evaluation={})

    used = [stage.prefix_cache for stage in found.stages if stage.prefix_cache]
    first = next(item for item in used if item.used)
    assert "carries the states" in first.reason
    assert [item.used for item in used] == sorted(item.used for item in used)


def test_filling_a_cache_needs_the_weights_below_it() -> None:
    """Those from the border that it begins at up to the stage; all where the base is asked."""
    given = facts(num_layers=60)
    schedule = {"layersPerStage": 20, "epochsPerStage": 3}
    explicit = [
        {"name": "top", "layers": {"first": 59, "last": 59}, "epochs": 3},
    ]
    alone = plan(None, stages=explicit, given=given).stages[0]
    above = plan({**schedule, "layersPerStage": 59}, given=given).stages[1]
    assert cache(alone).begins_at == cache(above).begins_at == 0
    # fp32 weights of what computes the states: the embeddings, all layers but one, the final norm.
    model = given.model
    below = 59 * model.layer.parameters + model.embedding_parameters + model.final_norm_parameters
    assert above.estimate.memory_bytes == CPU_PROCESS_BYTES + 4 * below
    # The first stage asks the base too: all weights, and logits of a micro-batch's answers.
    logits = 154 * 500 * 16
    assert alone.estimate.memory_bytes == CPU_PROCESS_BYTES + 4 * model.parameters + logits
    carried = plan({"layersPerStage": 1, "epochsPerStage": 3}, given=given).stages[59]
    assert cache(carried).begins_at == 58
    of_carried = carried.estimate.memory_bytes - CPU_PROCESS_BYTES
    assert of_carried < (alone.estimate.memory_bytes - CPU_PROCESS_BYTES) / 2


def test_what_trained_below_a_border_since_makes_its_states_useless() -> None:
    """In a second pass everything below was trained again."""
    found = plan({"stageCount": 2, "passes": 2, "epochsPerStage": 3})

    assert [stage.name for stage in found.stages][3] == "layers-6-11-p2"
    assert cache(found.stages[3]).begins_at == 0
    assert cache(found.stages[3]).flops == cache(found.stages[1]).flops
    head = {"stageCount": 2, "passes": 2, "epochsPerStage": 3, "head": "LastStage"}
    assert cache(plan(head).stages[3]).begins_at == 0


def test_a_cache_stays_while_a_stage_above_has_none() -> None:
    """Whatever stands on the volume while the third one is filled counts."""
    stage = {"epochs": 6.0}
    found = plan(
        None,
        stages=[
            {"name": "a", "layers": {"first": 0, "last": 3}, **stage},
            {"name": "b", "layers": {"first": 4, "last": 5}, **stage},
            {"name": "c", "layers": {"first": 6, "last": 7}, "dataFraction": 0.01, "epochs": 0.01},
            {"name": "d", "layers": {"first": 8, "last": 11}, **stage},
        ],
    )
    used = [stage.prefix_cache for stage in found.stages[1:] if stage.prefix_cache]
    assert [item.used for item in used] == [True, False, True]
    assert used[2].begins_at == 4
    kept = kept_bytes(found)
    assert found.summary.disk_bytes == kept + used[0].disk_bytes + used[2].disk_bytes


def test_an_edit_of_a_later_stage_may_change_an_earlier_one_s_cache() -> None:
    """And changes nothing else of it, so that a run which has passed it may be edited."""
    stages = [
        {"name": "a", "layers": {"first": 0, "last": 3}},
        {"name": "b", "layers": {"first": 4, "last": 7}, "epochs": 0.5},
        {"name": "c", "layers": {"first": 8, "last": 11}, "epochs": 6.0},
    ]
    training = {"learningRate": 1e-4, "batchSize": 10, "validationsPerEpoch": 1}
    before = plan(None, stages=stages, training=training)
    shorter = [*stages[:2], {**stages[2], "epochs": 0.1}]
    after = plan(None, stages=shorter, training=training)
    assert cache(before.stages[1]) != cache(after.stages[1])
    spec = _spec(None, stages=shorter, training=training)
    record = PlanRecord(plan=before, facts=facts(), spec_digest="0" * 64)
    status = StagedFineTuneStatus(
        stages=[
            StageStatus(name="a", state=StageState.SUCCEEDED, layers=before.stages[0].layers),
            StageStatus(name="b", state=StageState.SUCCEEDED, layers=before.stages[1].layers),
        ]
    )
    assert isinstance(plan_run(spec, facts(), status, record), PlanRecord)


def test_a_volume_without_room_has_no_cache() -> None:
    storage = {"size": "100Mi"}
    small = plan({"stageCount": 2, "epochsPerStage": 3}, storage=storage)
    assert not cache(small.stages[1]).used
    assert "raise spec.storage.size" in cache(small.stages[1]).reason
    large = plan({"stageCount": 2, "epochsPerStage": 3}, storage={"size": "1Gi"})
    assert cache(large.stages[1]).used


def test_other_text_that_a_stage_looks_at_is_kept_too() -> None:
    schedule = {"stageCount": 2, "epochsPerStage": 3}
    plain = cache(plan(schedule).stages[1])
    general = {"generalText": {"source": "hf://org/text", "maxTokens": 3000}}
    replay = {"replay": {"ratio": 0.1, "source": "hf://org/other"}}
    with_text = cache(plan(schedule, evaluation=general).stages[1])
    given = facts(replay_rows=10, replay_tokens=5000)
    with_replay = cache(plan(schedule, protection=replay, given=given).stages[1])

    assert with_text.disk_bytes - plain.disk_bytes == 3000 * HIDDEN * 4
    assert with_replay.disk_bytes - plain.disk_bytes == 5000 * HIDDEN * 4


def test_the_digest_of_a_plan_does_not_depend_on_the_cache() -> None:
    cached = plan({"stageCount": 2, "epochsPerStage": 3})
    plain = plan({"stageCount": 2, "epochsPerStage": 3}, training=never())

    assert cached.digest == plain.digest


def test_blocks_that_are_added_count_as_layers_below() -> None:
    method = {"type": "Expand", "expand": {"layersPerBlock": 4}}
    found = plan({"stageCount": 3, "epochsPerStage": 3}, method=method)

    # Behind 4, 9 and 14 layers of the deeper model.
    assert [cache(stage).begins_at for stage in found.stages] == [0, 4, 9]
