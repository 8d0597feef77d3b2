"""A plan's stages: which layers, which rows, how fast, how long, and what keeps one from being."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagetune_api.facts import DataFacts, Facts, LayerFacts, ModelFacts
from stagetune_api.problems import Problem, ProblemReason
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_operator.estimate import Machine
from stagetune_operator.plan import Plan, make_plan
from stagetune_operator.plan_checks import find_problems
from stagetune_operator.schedule import draft_stages

GIB = 2**30


def _model(num_layers: int = 12, *, tied: bool = False) -> ModelFacts:
    shapes = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (64, 32),
        "self_attn.v_proj": (64, 32),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (64, 160),
        "mlp.up_proj": (64, 160),
        "mlp.down_proj": (160, 64),
    }
    matrices = sum(inputs * outputs for inputs, outputs in shapes.values())
    return ModelFacts(
        model_type="llama",
        num_layers=num_layers,
        hidden_size=64,
        intermediate_size=160,
        vocab_size=500,
        num_attention_heads=4,
        head_dim=16,
        tied_embeddings=tied,
        layer=LayerFacts(parameters=matrices + 128, linear_shapes=shapes),
        embedding_parameters=500 * 64,
        head_parameters=0 if tied else 500 * 64,
        final_norm_parameters=64,
        dtype_bytes=2,
        digest="a" * 64,
    )


def _facts(num_layers: int = 12, *, tied: bool = False, **data: Any) -> Facts:
    sizes = {
        "train_rows": 1000,
        "validation_rows": 50,
        "train_tokens": 200_000,
        "train_answer_tokens": 60_000,
        "max_row_tokens": 512,
        "digest": "b" * 64,
    }
    return Facts(
        model=_model(num_layers, tied=tied),
        data=DataFacts(**{**sizes, **data}),
        model_directory="models/base",
    )


def _spec(
    *,
    schedule: dict[str, Any] | None = None,
    stages: list[dict[str, Any]] | None = None,
    training: dict[str, Any] | None = None,
    method: dict[str, Any] | None = None,
) -> StagedFineTuneSpec:
    body: dict[str, Any] = {
        "model": {"source": "hf://org/model"},
        "dataset": {"source": "hf://org/rows", "validation": {"fraction": 0.05}},
        "training": {"learningRate": 1e-4, **(training or {})},
        "method": method or {},
    }
    if training and "learningRateByDepth" in training:
        del body["training"]["learningRate"]
    if stages is not None:
        body["stages"] = stages
    else:
        body["schedule"] = schedule or {"layersPerStage": 4}
    return StagedFineTuneSpec.model_validate(body)


def _plan(spec: StagedFineTuneSpec, facts: Facts | None = None) -> Plan:
    plan = make_plan(spec, facts or _facts())
    assert isinstance(plan, Plan), plan
    return plan


def _problems(
    spec: StagedFineTuneSpec, facts: Facts | None = None, machine: Machine | None = None
) -> list[Problem]:
    problems = make_plan(spec, facts or _facts(), machine or Machine())
    assert isinstance(problems, list), problems
    return problems


def _layers(plan: Plan) -> list[tuple[int, int]]:
    return [(stage.layers.first, stage.layers.last) for stage in plan.stages]


# Layers and names.


def test_layers_per_stage_leaves_the_smaller_group_at_the_top() -> None:
    plan = _plan(_spec(schedule={"layersPerStage": 5}))

    assert _layers(plan) == [(0, 4), (5, 9), (10, 11)]
    assert [stage.name for stage in plan.stages] == ["layers-0-4", "layers-5-9", "layers-10-11"]
    assert plan.stages[2].directory == "03-layers-10-11"


def test_stage_count_spreads_the_layers_with_larger_groups_at_the_bottom() -> None:
    plan = _plan(_spec(schedule={"stageCount": 5}))

    assert _layers(plan) == [(0, 2), (3, 5), (6, 7), (8, 9), (10, 11)]


def test_a_stage_of_one_layer_is_named_by_that_layer() -> None:
    plan = _plan(_spec(schedule={"layersPerStage": 11}))

    assert [stage.name for stage in plan.stages] == ["layers-0-10", "layers-11"]


def test_top_down_runs_the_same_groups_from_the_top_and_counts_from_there() -> None:
    plan = _plan(_spec(schedule={"layersPerStage": 5, "order": "TopDown"}))

    assert [(stage.index, stage.name) for stage in plan.stages] == [
        (0, "layers-10-11"),
        (1, "layers-5-9"),
        (2, "layers-0-4"),
    ]


@pytest.mark.parametrize("order", ["BottomUp", "TopDown"])
def test_head_and_embeddings_train_at_the_ends_of_the_decoder_in_either_order(order: str) -> None:
    schedule = {
        "layersPerStage": 4,
        "order": order,
        "head": "LastStage",
        "embeddings": "FirstStage",
    }

    plan = _plan(_spec(schedule=schedule))

    assert {stage.name for stage in plan.stages if stage.head} == {"layers-8-11"}
    assert {stage.name for stage in plan.stages if stage.embeddings} == {"layers-0-3"}


def test_explicit_stages_keep_their_order_and_may_overlap_or_leave_layers_out() -> None:
    stages = [
        {"name": "top", "layers": {"first": 10, "last": 11}, "head": True, "learningRate": 3e-5},
        {"name": "wide", "layers": {"first": 8, "last": 11}, "epochs": 2, "dataFraction": 0.5},
    ]

    plan = _plan(_spec(stages=stages))

    assert [(stage.index, stage.name, stage.head) for stage in plan.stages] == [
        (0, "top", True),
        (1, "wide", False),
    ]
    assert [stage.learning_rate for stage in plan.stages] == [3e-5, 1e-4]
    assert [stage.rows.count for stage in plan.stages] == [1000, 500]
    assert [stage.steps for stage in plan.stages] == [63, 64]


@settings(deadline=None)
@given(
    num_layers=st.integers(1, 120),
    size=st.integers(1, 40),
    by_count=st.booleans(),
    order=st.sampled_from(["BottomUp", "TopDown"]),
)
def test_a_schedule_opens_every_layer_exactly_once_without_gaps(
    num_layers: int, size: int, by_count: bool, order: str
) -> None:
    size = min(size, num_layers)
    schedule = {"stageCount" if by_count else "layersPerStage": size, "order": order}

    plan = _plan(_spec(schedule=schedule), _facts(num_layers))

    groups = _layers(plan) if order == "BottomUp" else _layers(plan)[::-1]
    assert [layer for first, last in groups for layer in range(first, last + 1)] == list(
        range(num_layers)
    )
    assert [stage.index for stage in plan.stages] == list(range(len(groups)))
    assert len({stage.name for stage in plan.stages}) == len(groups)
    if by_count:
        assert len(groups) == size
        sizes = [last - first + 1 for first, last in groups]
        assert sizes == sorted(sizes, reverse=True)
        assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(num_layers=st.integers(1, 60), size=st.integers(1, 60))
def test_order_changes_when_a_group_trains_and_not_which_groups_there_are(
    num_layers: int, size: int
) -> None:
    def layers(order: str) -> list[tuple[int, int]]:
        schedule = {"layersPerStage": min(size, num_layers), "order": order}
        return _layers(_plan(_spec(schedule=schedule), _facts(num_layers)))

    assert layers("TopDown") == layers("BottomUp")[::-1]


# Learning rates.


def _rates(by_depth: dict[str, Any], schedule: dict[str, Any]) -> dict[str, float]:
    plan = _plan(_spec(schedule=schedule, training={"learningRateByDepth": by_depth}))
    return {stage.name: stage.learning_rate for stage in plan.stages}


@pytest.mark.parametrize("order", ["BottomUp", "TopDown"])
def test_the_rate_follows_the_depth_and_not_the_order(order: str) -> None:
    rates = _rates({"bottom": 1e-5, "top": 1e-3}, {"layersPerStage": 4, "order": order})

    assert rates == {"layers-0-3": 1e-5, "layers-4-7": 1e-4, "layers-8-11": 1e-3}


def test_a_linear_rate_goes_by_the_centres_of_uneven_groups() -> None:
    rates = _rates({"bottom": 1e-5, "top": 4e-5, "interpolation": "Linear"}, {"layersPerStage": 5})

    # Centres 2, 7 and 10.5: the middle group stands at 5 / 8.5 of the height.
    assert rates == {
        "layers-0-4": 1e-5,
        "layers-5-9": pytest.approx(1e-5 + 3e-5 * 5 / 8.5, rel=1e-5),
        "layers-10-11": 4e-5,
    }


def test_a_single_stage_learns_at_the_rate_of_the_top() -> None:
    assert _rates({"bottom": 1e-5, "top": 1e-3}, {"stageCount": 1}) == {"layers-0-11": 1e-3}


@settings(deadline=None)
@given(
    bottom=st.floats(1e-7, 1e-2),
    top=st.floats(1e-7, 1e-2),
    interpolation=st.sampled_from(["Linear", "Geometric"]),
)
def test_rates_by_depth_never_leave_the_range_and_never_turn_back(
    bottom: float, top: float, interpolation: str
) -> None:
    by_depth = {"bottom": bottom, "top": top, "interpolation": interpolation}

    rates = list(_rates(by_depth, {"layersPerStage": 1}).values())

    assert (rates[0], rates[-1]) == (bottom, top)
    assert rates == sorted(rates, reverse=bottom > top)


# Rows and steps.


def test_a_shared_fraction_is_the_same_rows_for_every_stage() -> None:
    plan = _plan(_spec(schedule={"layersPerStage": 4, "dataFraction": 0.3}))

    assert [(stage.rows.start, stage.rows.end) for stage in plan.stages] == [(0, 300)] * 3


def test_disjoint_stages_share_all_rows_in_running_order() -> None:
    schedule = {"layersPerStage": 4, "dataPartition": "Disjoint", "order": "TopDown"}

    plan = _plan(_spec(schedule=schedule))

    assert [(stage.name, stage.rows.start, stage.rows.end) for stage in plan.stages] == [
        ("layers-8-11", 0, 333),
        ("layers-4-7", 333, 667),
        ("layers-0-3", 667, 1000),
    ]


@settings(deadline=None)
@given(
    rows=st.integers(40, 5000),
    num_stages=st.integers(1, 12),
    fraction=st.none() | st.floats(0.03, 1 / 12),
)
def test_disjoint_ranges_touch_and_never_overlap(
    rows: int, num_stages: int, fraction: float | None
) -> None:
    schedule: dict[str, Any] = {"stageCount": num_stages, "dataPartition": "Disjoint"}
    if fraction is not None:
        schedule["dataFraction"] = fraction

    plan = _plan(_spec(schedule=schedule), _facts(train_rows=rows))

    ranges = [stage.rows for stage in plan.stages]
    assert ranges[0].start == 0
    assert all(lower.end == upper.start for lower, upper in itertools.pairwise(ranges))
    assert ranges[-1].end <= rows
    assert fraction is not None or ranges[-1].end == rows


def test_a_partial_last_batch_is_a_step_of_its_own_in_every_epoch() -> None:
    schedule = {"layersPerStage": 12, "epochsPerStage": 2}

    plan = _plan(_spec(schedule=schedule, training={"batchSize": 300}))

    assert plan.stages[0].steps == 8  # ceil(1000 / 300) = 4 in each of two epochs


@pytest.mark.parametrize(
    ("epochs", "steps"), [(0.1, 7), (0.001, 1), (1.5, 95), (1.0, 63), (0.7, 45)]
)
def test_a_part_of_an_epoch_is_rounded_up_to_whole_steps(epochs: float, steps: int) -> None:
    plan = _plan(_spec(schedule={"layersPerStage": 12, "epochsPerStage": epochs}))

    assert plan.stages[0].steps == steps


def test_binary_rounding_adds_no_step() -> None:
    plan = _plan(
        _spec(schedule={"layersPerStage": 12, "epochsPerStage": 2.2}, training={"batchSize": 1}),
        _facts(train_rows=25),
    )

    assert 2.2 * 25 > 55
    assert plan.stages[0].steps == 55


@settings(deadline=None)
@given(
    rows=st.integers(1, 3000),
    batch_size=st.integers(1, 64),
    epochs=st.floats(0.01, 5),
    validations=st.integers(1, 20),
    warmup_ratio=st.floats(0, 0.99),
)
def test_steps_warmup_and_validations_hold_together(
    rows: int, batch_size: int, epochs: float, validations: int, warmup_ratio: float
) -> None:
    spec = _spec(
        schedule={"layersPerStage": 12, "epochsPerStage": epochs},
        training={
            "batchSize": batch_size,
            "validationsPerEpoch": validations,
            "warmupRatio": warmup_ratio,
        },
    )

    stage = _plan(spec, _facts(train_rows=rows)).stages[0]

    steps_per_epoch = math.ceil(rows / batch_size)
    assert max(1, epochs * steps_per_epoch - 1e-5) <= stage.steps <= epochs * steps_per_epoch + 1
    assert stage.warmup_steps < stage.steps
    assert abs(stage.warmup_steps - warmup_ratio * stage.steps) <= 1
    assert stage.validation_interval <= stage.steps
    assert steps_per_epoch // stage.validation_interval <= validations or stage.steps < (
        steps_per_epoch
    )


def test_validations_are_spread_over_an_epoch() -> None:
    plan = _plan(
        _spec(schedule={"layersPerStage": 12}, training={"validationsPerEpoch": 4}), _facts()
    )

    assert (plan.stages[0].steps, plan.stages[0].validation_interval) == (63, 16)


# The whole.


def test_the_summary_adds_up_the_stages() -> None:
    plan = _plan(_spec())

    full = plan.summary.full_fine_tuning
    total = sum(stage.steps * stage.estimate.step_flops for stage in plan.stages)
    assert plan.summary.total_steps == 3 * 63
    assert plan.summary.total_flops == total
    assert plan.summary.relative_total_flops == pytest.approx(total / (63 * full.step_flops))
    assert plan.summary.peak_memory_bytes == max(
        stage.estimate.memory_bytes for stage in plan.stages
    )
    # While the last stage writes a checkpoint, those before it keep two and write none.
    checkpoint = plan.stages[0].estimate.checkpoint_bytes
    assert checkpoint == 16 * plan.stages[0].estimate.trainable_parameters
    stages = sum(stage.estimate.disk_bytes for stage in plan.stages)
    assert plan.summary.disk_bytes == stages - 2 * checkpoint
    assert full.trainable_parameters == plan.summary.parameters == _model().parameters


def test_equal_arguments_give_an_equal_plan() -> None:
    assert _plan(_spec()) == _plan(_spec())


def test_a_plan_survives_being_written_and_read() -> None:
    plan = _plan(_spec(schedule={"layersPerStage": 5}))

    assert Plan.model_validate_json(plan.model_dump_json()) == plan


@pytest.mark.parametrize(
    "spec",
    [
        _spec(training={"seed": 1}),
        _spec(training={"learningRate": 2e-4}),
        _spec(method={"type": "LoRA"}),
        _spec(schedule={"layersPerStage": 4, "order": "TopDown"}),
        _spec(schedule={"layersPerStage": 4, "dataFraction": 0.5}),
    ],
)
def test_the_digest_changes_with_whatever_changes_the_result(spec: StagedFineTuneSpec) -> None:
    assert _plan(spec).digest != _plan(_spec()).digest


def test_the_digest_changes_with_the_prepared_model_and_data() -> None:
    facts = _facts()
    other_model = facts.model_copy(
        update={"model": facts.model.model_copy(update={"digest": "c" * 64})}
    )

    digests = {
        _plan(_spec(), facts).digest,
        _plan(_spec(), other_model).digest,
        _plan(_spec(), _facts(digest="c" * 64)).digest,
    }

    assert len(digests) == 3


@pytest.mark.parametrize(
    "spec",
    [
        _spec(schedule={"stageCount": 3}),
        _spec(training={"checkpointIntervalSeconds": 7}),
    ],
)
def test_the_digest_is_blind_to_what_changes_no_bit_of_the_result(
    spec: StagedFineTuneSpec,
) -> None:
    assert _plan(spec).digest == _plan(_spec()).digest


def test_the_digest_is_blind_to_estimates() -> None:
    gpu, cpu = (make_plan(_spec(), _facts(), Machine(is_gpu=is_gpu)) for is_gpu in (True, False))

    assert isinstance(gpu, Plan)
    assert isinstance(cpu, Plan)
    assert gpu.summary.peak_memory_bytes != cpu.summary.peak_memory_bytes
    assert gpu.digest == cpu.digest


# What is refused.


def test_a_spec_that_validation_refuses_is_not_planned() -> None:
    problems = _problems(_spec(method={"lora": {"rank": 8}}))

    assert [problem.path for problem in problems] == ["spec.method.lora"]


def test_a_tied_head_is_refused_with_the_reason_and_the_cure() -> None:
    spec = _spec(schedule={"layersPerStage": 4, "head": "LastStage"})

    problems = _problems(spec, _facts(tied=True))

    assert [(problem.path, problem.reason) for problem in problems] == [
        ("spec.schedule.head", ProblemReason.CONFLICT)
    ]
    assert "shares its matrix with the embeddings" in problems[0].message
    assert "use head: Never" in problems[0].message


def test_embeddings_of_a_tied_model_may_train() -> None:
    plan = _plan(
        _spec(schedule={"layersPerStage": 12, "embeddings": "FirstStage"}), _facts(tied=True)
    )

    assert plan.stages[0].embeddings


def test_each_explicit_stage_is_held_against_the_model() -> None:
    stages = [
        {"name": "one", "layers": {"first": 0, "last": 12}},
        {"name": "two", "layers": {"first": 4, "last": 7}, "head": True},
        {"name": "three", "layers": {"first": 8, "last": 11}, "head": True},
    ]

    problems = _problems(_spec(stages=stages))

    assert [(problem.path, problem.reason) for problem in problems] == [
        ("spec.stages[0].layers.last", ProblemReason.INVALID),
        ("spec.stages[1].head", ProblemReason.CONFLICT),
    ]
    assert "12 is no layer: the model has 12 layers, counted from 0; use at most 11" in (
        problems[0].message
    )
    assert "this stage ends at layer 7" in problems[1].message


@pytest.mark.parametrize("field", ["layersPerStage", "stageCount"])
def test_more_than_the_model_has_layers_is_refused(field: str) -> None:
    problems = _problems(_spec(schedule={field: 13}))

    assert [(problem.path, problem.message) for problem in problems] == [
        (f"spec.schedule.{field}", "13 is too many: the model has 12 layers; use at most 12")
    ]


def test_more_than_128_stages_are_refused_with_the_size_that_would_do() -> None:
    problems = _problems(_spec(schedule={"layersPerStage": 1}), _facts(300))

    assert [problem.path for problem in problems] == ["spec.schedule.layersPerStage"]
    assert "makes 300 stages" in problems[0].message
    assert "use at least 3" in problems[0].message
    assert len(_plan(_spec(schedule={"layersPerStage": 3}), _facts(300)).stages) == 100


def test_disjoint_parts_that_are_more_than_the_whole_are_refused() -> None:
    schedule = {"layersPerStage": 4, "dataPartition": "Disjoint", "dataFraction": 0.4}

    problems = _problems(_spec(schedule=schedule))

    assert [(problem.path, problem.reason) for problem in problems] == [
        ("spec.schedule.dataFraction", ProblemReason.CONFLICT)
    ]
    assert "for each of 3 disjoint stages" in problems[0].message
    assert "use at most 0.3333" in problems[0].message


def test_target_modules_that_no_layer_has_are_refused_with_those_it_has() -> None:
    method = {"type": "LoRA", "lora": {"targetModules": ["q_proj", "query", "fc1"]}}

    problems = _problems(_spec(method=method))

    assert [(problem.path, problem.reason) for problem in problems] == [
        ("spec.method.lora.targetModules[1]", ProblemReason.NOT_FOUND),
        ("spec.method.lora.targetModules[2]", ProblemReason.NOT_FOUND),
    ]
    assert (
        "'query' is no linear module of a llama layer; use one of down_proj, gate_proj, k_proj, "
        "o_proj, q_proj, up_proj, v_proj"
    ) in problems[0].message


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"train_rows": 0}, "spec.dataset.source"),
        ({"train_answer_tokens": 0}, "spec.dataset.source"),
        ({"validation_rows": 0}, "spec.dataset.validation"),
    ],
)
def test_data_without_anything_to_learn_or_to_judge_by_is_refused(
    data: dict[str, int], path: str
) -> None:
    assert [problem.path for problem in _problems(_spec(), _facts(**data))] == [path]


@pytest.mark.parametrize(
    ("schedule", "path"),
    [
        ({"layersPerStage": 1, "dataPartition": "Disjoint"}, "spec.schedule.dataPartition"),
        (
            {"layersPerStage": 4, "dataPartition": "Disjoint", "dataFraction": 0.01},
            "spec.schedule.dataFraction",
        ),
        ({"layersPerStage": 4, "dataFraction": 0.05}, "spec.schedule.dataFraction"),
    ],
)
def test_a_stage_without_a_row_is_refused_once(schedule: dict[str, Any], path: str) -> None:
    problems = _problems(_spec(schedule=schedule), _facts(train_rows=7))

    assert [problem.path for problem in problems] == [path]
    assert "of 7 training rows leaves stage layers-" in problems[0].message


def test_a_stage_larger_than_the_device_is_refused_with_the_numbers_and_a_cure() -> None:
    needed = _plan(_spec()).summary.peak_memory_bytes
    spec = _spec(training={"microBatchSize": 4})

    problems = _problems(spec, machine=Machine(memory_bytes=needed - 1))

    assert [(problem.path, problem.reason) for problem in problems] == [
        ("spec.training", ProblemReason.DOES_NOT_FIT)
    ]
    assert "stage layers-0-3 needs" in problems[0].message
    assert f"the device has {(needed - 1) / GIB:.1f} GiB" in problems[0].message
    assert "lower microBatchSize from 4" in problems[0].message
    assert "use method.type: LoRA" in problems[0].message


def test_a_batch_that_cannot_be_split_is_made_smaller_as_a_whole() -> None:
    whole = {"optimizerInBackward": True, "batchSize": 4, "microBatchSize": 4}

    problems = _problems(_spec(training=whole), machine=Machine(memory_bytes=1))

    assert "lower batchSize and microBatchSize from 4" in problems[0].message


def test_a_stage_exactly_as_large_as_the_device_fits() -> None:
    needed = _plan(_spec()).summary.peak_memory_bytes

    assert isinstance(make_plan(_spec(), _facts(), Machine(memory_bytes=needed)), Plan)


def test_every_problem_is_shown_at_once() -> None:
    spec = _spec(
        schedule={
            "layersPerStage": 13,
            "dataPartition": "Disjoint",
            "dataFraction": 1.0,
        },
        method={"type": "LoRA", "lora": {"targetModules": ["query"]}},
    )

    problems = _problems(spec, _facts(validation_rows=0))

    assert [problem.path for problem in problems] == [
        "spec.schedule.layersPerStage",
        "spec.method.lora.targetModules[0]",
        "spec.dataset.validation",
    ]


# What methods ask of a plan.


def _expand(size: int) -> dict[str, Any]:
    return {"type": "Expand", "expand": {"layersPerBlock": size}}


def test_expanded_model_is_summed_up_and_each_stage_trains_its_blocks() -> None:
    plan = _plan(_spec(method=_expand(2), schedule={"layersPerStage": 4}))

    layer = _model().layer.parameters
    assert plan.summary.added_layers == 6
    assert plan.summary.added_parameters == 6 * layer
    assert plan.summary.num_layers == 12
    assert [stage.estimate.trainable_parameters for stage in plan.stages] == [2 * layer] * 3
    # Layers are counted as in the base.
    assert _layers(plan) == [(0, 3), (4, 7), (8, 11)]


def test_other_methods_add_nothing() -> None:
    summary = _plan(_spec()).summary

    assert (summary.added_layers, summary.added_parameters) == (0, 0)


@pytest.mark.parametrize(
    ("size", "stages", "path"),
    [
        (4, {"schedule": {"layersPerStage": 2}}, "spec.schedule.layersPerStage"),
        (5, {"schedule": {"stageCount": 4}}, "spec.schedule.stageCount"),
        (4, {"schedule": {"layersPerStage": 5}}, None),
        (
            3,
            {
                "stages": [
                    {"name": "a", "layers": {"first": 0, "last": 2}},
                    {"name": "b", "layers": {"first": 3, "last": 4}},
                ]
            },
            "spec.stages[1].layers",
        ),
    ],
)
def test_stage_without_a_block_is_refused_with_the_layers_that_have_one(
    size: int, stages: dict[str, Any], path: str | None
) -> None:
    spec = _spec(method=_expand(size), **stages)
    if path is None:
        assert len(_plan(spec).stages) == 3
        return
    problems = _problems(spec)

    assert {problem.path for problem in problems} == {path}
    assert f"one is added behind every {size} layers" in problems[0].message


def test_blocks_behind_more_layers_than_there_are_are_refused() -> None:
    problems = _problems(_spec(method=_expand(13)))

    assert [problem.path for problem in problems] == ["spec.method.expand.layersPerBlock"]
    assert "use at most 12" in problems[0].message


def test_adapters_of_a_4_bit_base_cost_a_quarter_of_its_bytes() -> None:
    lora, qlora = (_plan(_spec(method={"type": kind})) for kind in ("LoRA", "QLoRA"))

    for plain, small in zip(lora.stages, qlora.stages, strict=True):
        assert small.estimate.trainable_parameters == plain.estimate.trainable_parameters
        assert small.estimate.step_flops == plain.estimate.step_flops
        assert small.estimate.weights_bytes < plain.estimate.weights_bytes


def test_adapters_of_every_stage_stay_where_a_layer_is_opened_again() -> None:
    names = ("once", "again", "more")
    stages = [{"name": name, "layers": {"first": 0, "last": 3}} for name in names]
    weights = {}
    for scope in ("Shared", "PerStage"):
        method = {"type": "LoRA", "lora": {"rank": 4, "adapters": scope}}
        plan = _plan(_spec(stages=stages, method=method))
        weights[scope] = [stage.estimate.weights_bytes for stage in plan.stages]

    assert {*weights["Shared"], weights["PerStage"][0]} == {weights["PerStage"][0]}
    trained = plan.stages[0].estimate.trainable_parameters
    idle = [weight - weights["PerStage"][0] for weight in weights["PerStage"]]
    assert idle == [0, 4 * trained, 2 * 4 * trained]
    flops = [stage.estimate.step_flops for stage in plan.stages]
    assert flops[2] - flops[1] == flops[1] - flops[0] > 0


def test_shared_adapter_cannot_get_another_rank() -> None:
    stages = [
        {"name": "first", "layers": {"first": 0, "last": 3}, "rank": 4},
        {"name": "second", "layers": {"first": 3, "last": 5}, "rank": 8},
        {"name": "third", "layers": {"first": 6, "last": 7}, "rank": 2},
        {"name": "fourth", "layers": {"first": 4, "last": 7}},
    ]
    found = {}
    for scope in ("Shared", "PerStage"):
        method = {"type": "LoRA", "lora": {"rank": 2, "adapters": scope}}
        spec = _spec(stages=stages, method=method)
        found[scope] = find_problems(spec, _facts(), draft_stages(spec, 12).stages)

    paths = [problem.path for problem in found["Shared"]]
    assert paths == ["spec.stages[1].rank", "spec.stages[3].rank"]
    assert "layer 3, which first made with rank 4" in found["Shared"][0].message
    assert "layer 4, which second made with rank 8" in found["Shared"][1].message
    assert found["PerStage"] == []
