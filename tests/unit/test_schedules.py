"""Every way of cutting a decoder into stages: which layers, names, rows, rates and passes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagetune_api import names
from stagetune_api.facts import DataFacts, Facts, GradientFacts, ModelFacts
from stagetune_api.problems import Problem
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.stage import PlannedStage
from stagetune_api.training_spec import GradientNormSpec, LayerRange
from stagetune_operator.gradient_groups import (
    GradientDecision,
    decide_groups,
    describe_gradients,
    flat_profile,
)
from stagetune_operator.layer_groups import stage_name
from stagetune_operator.model_facts import model_facts_from_config
from stagetune_operator.plan import Plan, make_plan

Stages = list[dict[str, Any]]


def facts(num_layers: int = 12, signals: list[float] | None = None) -> Facts:
    model = model_facts_from_config(
        {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "vocab_size": 500,
            "tie_word_embeddings": False,
        }
    )
    assert isinstance(model, ModelFacts)
    data = DataFacts(
        train_rows=1000,
        validation_rows=50,
        train_tokens=200_000,
        train_answer_tokens=60_000,
        max_row_tokens=512,
    )
    profile = GradientFacts(relative_norms=signals, rows=16, tokens=99) if signals else None
    return Facts(model=model, data=data, model_directory="models/base", gradients=profile)


def result(
    schedule: dict[str, Any] | None = None,
    *,
    stages: Stages | None = None,
    given: Facts | None = None,
    **sections: Any,
) -> Plan | list[Problem]:
    body: dict[str, Any] = {
        "model": {"source": "hf://org/model"},
        "dataset": {"source": "hf://org/rows", "validation": {"fraction": 0.05}},
        "training": {"learningRate": 1e-4},
        **({"schedule": schedule} if stages is None else {"stages": stages}),
        **sections,
    }
    return make_plan(StagedFineTuneSpec.model_validate(body), given or facts())


def plan(schedule: dict[str, Any] | None = None, **given: Any) -> Plan:
    found = result(schedule, **given)
    assert isinstance(found, Plan), found
    return found


def problems(schedule: dict[str, Any] | None = None, **given: Any) -> dict[str, str]:
    found = result(schedule, **given)
    assert isinstance(found, list), found
    return {problem.path: problem.message for problem in found}


def opened(stage: PlannedStage) -> list[tuple[int, int]]:
    return [(layers.first, layers.last) for layers in stage.layer_ranges]


def layers_of(found: Plan) -> list[list[tuple[int, int]]]:
    return [opened(stage) for stage in found.stages]


def names_of(found: Plan) -> list[str]:
    return [stage.name for stage in found.stages]


# What a schedule leaves out.


@pytest.mark.parametrize("schedule", [None, {}, {"order": "TopDown"}])
def test_without_a_word_there_are_two_stages_of_one_and_a_quarter_passes(
    schedule: dict[str, Any] | None,
) -> None:
    found = plan(schedule, given=facts(30))

    assert sorted(layers_of(found)) == [[(0, 14)], [(15, 29)]]
    assert {stage.epochs for stage in found.stages} == {1.25}


@pytest.mark.parametrize(
    ("schedule", "epochs"),
    [
        ({"stageCount": 2}, 1.0),
        ({"layersPerStage": 6}, 1.0),
        ({"epochsPerStage": 3}, 3.0),
    ],
)
def test_who_cuts_the_decoder_says_how_long_a_stage_takes(
    schedule: dict[str, Any], epochs: float
) -> None:
    found = plan(schedule)

    assert {stage.epochs for stage in found.stages} == {epochs}


def test_a_model_of_one_layer_is_too_small_for_two_stages() -> None:
    found = problems(None, given=facts(1))

    assert "2 is too many: the model has 1 layers" in found["spec.schedule.stageCount"]


# Open top.


def test_groups_are_cut_below_the_open_top_and_the_last_one_grows_into_it() -> None:
    found = plan({"layersPerStage": 4, "openTop": 2})

    assert layers_of(found) == [[(0, 3), (10, 11)], [(4, 7), (10, 11)], [(8, 11)]]
    assert names_of(found) == ["layers-0-3", "layers-4-7", "layers-8-11"]
    assert [stage.num_layers for stage in found.stages] == [6, 6, 4]


def test_the_open_top_stays_open_from_the_top_down_too() -> None:
    found = plan({"stageCount": 2, "openTop": 2, "order": "TopDown"})

    assert layers_of(found) == [[(5, 11)], [(0, 4), (10, 11)]]


def test_head_trains_with_the_topmost_group_only_and_rates_follow_the_group() -> None:
    found = plan(
        {"stageCount": 2, "openTop": 2, "head": "LastStage"},
        training={"learningRateByDepth": {"bottom": 1e-5, "top": 1e-4}},
    )

    assert [stage.head for stage in found.stages] == [False, True]
    assert [stage.learning_rate for stage in found.stages] == [1e-5, 1e-4]


def test_an_explicit_stage_with_an_open_top_may_train_the_head() -> None:
    lower = {"name": "lower", "layers": {"first": 2, "last": 3}, "openTop": 1, "head": True}

    (stage,) = plan(stages=[lower]).stages

    assert opened(stage) == [(2, 3), (11, 11)]
    assert stage.head


@pytest.mark.parametrize(
    ("layers", "open_top", "expected"),
    [
        ((0, 3), 8, [(0, 11)]),
        ((0, 3), 7, [(0, 3), (5, 11)]),
        ((4, 11), 2, [(4, 11)]),
        ((8, 9), 6, [(6, 11)]),
    ],
)
def test_top_layers_never_touch_the_layers_below(
    layers: tuple[int, int], open_top: int, expected: list[tuple[int, int]]
) -> None:
    one = {"name": "one", "layers": {"first": layers[0], "last": layers[1]}, "openTop": open_top}

    assert layers_of(plan(stages=[one])) == [expected]


@pytest.mark.parametrize("path", ["spec.schedule.openTop", "spec.stages[0].openTop"])
def test_an_open_top_of_all_layers_is_refused(path: str) -> None:
    one = {"name": "one", "layers": {"first": 0, "last": 3}, "openTop": 12}
    stages = [one] if "stages" in path else None

    found = problems({"layersPerStage": 4, "openTop": 12}, stages=stages)

    assert list(found) == [path]
    assert "use at most 11" in found[path]


def test_more_stages_than_there_are_layers_below_the_open_top_are_refused() -> None:
    found = problems({"stageCount": 11, "openTop": 2})

    assert "10 of them below the open top; use at most 10" in found["spec.schedule.stageCount"]


# Cumulative and overlapping groups.


def test_cumulative_stages_keep_what_was_opened_before() -> None:
    upwards = plan({"layersPerStage": 5, "cumulative": True})
    downwards = plan({"layersPerStage": 5, "cumulative": True, "order": "TopDown"})

    assert layers_of(upwards) == [[(0, 4)], [(0, 9)], [(0, 11)]]
    assert layers_of(downwards) == [[(10, 11)], [(5, 11)], [(0, 11)]]
    assert names_of(downwards) == ["layers-10-11", "layers-5-11", "layers-0-11"]


def test_cumulative_stages_keep_head_and_embeddings_open_too() -> None:
    options = {"layersPerStage": 6, "cumulative": True, "head": "LastStage"}
    downwards = plan({**options, "order": "TopDown"})
    upwards = plan({**options, "embeddings": "FirstStage"})

    assert [stage.head for stage in downwards.stages] == [True, True]
    assert [(stage.embeddings, stage.head) for stage in upwards.stages] == [
        (True, False),
        (True, True),
    ]


def test_rates_by_depth_follow_a_cumulative_stages_new_group() -> None:
    found = plan(
        {"layersPerStage": 4, "cumulative": True},
        training={"learningRateByDepth": {"bottom": 1e-5, "top": 3e-5, "interpolation": "Linear"}},
    )

    assert [stage.learning_rate for stage in found.stages] == pytest.approx([1e-5, 2e-5, 3e-5])


def test_cumulative_stages_with_an_open_top_grow_towards_it() -> None:
    found = plan({"stageCount": 2, "cumulative": True, "openTop": 2})

    assert layers_of(found) == [[(0, 4), (10, 11)], [(0, 11)]]


@pytest.mark.parametrize("order", ["BottomUp", "TopDown"])
def test_an_overlapping_group_opens_layers_of_the_one_below(order: str) -> None:
    found = plan({"layersPerStage": 5, "overlap": 2, "order": order})

    expected = [[(0, 4)], [(3, 9)], [(8, 11)]]
    assert layers_of(found) == (expected if order == "BottomUp" else expected[::-1])


def test_an_overlap_that_reaches_through_a_group_is_refused() -> None:
    found = problems({"stageCount": 5, "overlap": 2})

    assert "use at most 1" in found["spec.schedule.overlap"]
    assert isinstance(result({"stageCount": 4, "overlap": 2}), Plan)


# Passes.


def test_passes_repeat_the_whole_sequence_under_names_of_their_own() -> None:
    found = plan({"layersPerStage": 6, "passes": 2, "order": "TopDown"})

    assert layers_of(found) == [[(6, 11)], [(0, 5)], [(6, 11)], [(0, 5)]]
    assert [stage.directory for stage in found.stages] == [
        "01-layers-6-11",
        "02-layers-0-5",
        "03-layers-6-11-p2",
        "04-layers-0-5-p2",
    ]


@given(
    first=st.integers(0, 1023), count=st.integers(1, 1024), passes=st.integers(1, names.MAX_STAGES)
)
@settings(deadline=None)
def test_names_fit_and_tell_layers_and_pass(first: int, count: int, passes: int) -> None:
    last = min(first + count - 1, 1023)
    name = stage_name(LayerRange(first=first, last=last), passes)

    assert len(name) <= names.STAGE_NAME_MAX_LENGTH
    numbers = [int(part) for part in name.lstrip("layers-").replace("p", "").split("-")]
    assert numbers == [first, *([last] if last > first else []), *([passes] if passes > 1 else [])]


def test_disjoint_stages_have_rows_of_their_own_in_every_pass() -> None:
    found = plan({"layersPerStage": 6, "passes": 2, "dataPartition": "Disjoint"})

    assert [(stage.rows.start, stage.rows.end) for stage in found.stages] == [
        (0, 250),
        (250, 500),
        (500, 750),
        (750, 1000),
    ]


def test_shared_stages_see_the_same_rows_in_every_pass() -> None:
    found = plan({"layersPerStage": 6, "passes": 2, "dataFraction": 0.5})

    assert {(stage.rows.start, stage.rows.end) for stage in found.stages} == {(0, 500)}


def test_all_passes_together_have_128_stages_at_most() -> None:
    found = problems({"layersPerStage": 1, "passes": 4}, given=facts(40))

    assert "160 stages of 40 layers in 4 passes" in found["spec.schedule.layersPerStage"]
    assert "use at least 2" in found["spec.schedule.layersPerStage"]
    assert len(plan({"layersPerStage": 2, "passes": 4}, given=facts(40)).stages) == 80


# Options of explicit stages.


def test_explicit_stages_take_rows_from_their_offset() -> None:
    layers = {"first": 0, "last": 3}
    stages: Stages = [
        {"name": "first", "layers": layers, "dataFraction": 0.4},
        {"name": "rest", "layers": layers, "dataFraction": 0.6, "dataOffset": 0.4},
        {"name": "third", "layers": layers, "dataFraction": 1 / 3, "dataOffset": 2 / 3},
    ]

    found = plan(stages=stages)

    assert [(stage.rows.start, stage.rows.end) for stage in found.stages] == [
        (0, 400),
        (400, 1000),
        (667, 1000),
    ]


def test_a_stages_own_batch_decides_its_steps_and_its_memory() -> None:
    layers = {"first": 0, "last": 3}
    stages: Stages = [
        {"name": "usual", "layers": layers},
        {"name": "own", "layers": layers, "batchSize": 8, "microBatchSize": 4},
    ]

    usual, own = plan(stages=stages).stages

    assert (usual.steps, own.steps) == (63, 125)
    assert (usual.batch_size, own.batch_size, own.micro_batch_size) == (None, 8, 4)
    assert own.estimate.activation_bytes > usual.estimate.activation_bytes
    assert own.estimate.step_flops == pytest.approx(usual.estimate.step_flops / 2, rel=1e-6)


LORA = {"type": "LoRA", "lora": {"rank": 4}}


def test_a_stages_own_rank_decides_what_trains() -> None:
    stages: Stages = [
        {"name": "lower", "layers": {"first": 0, "last": 3}},
        {"name": "upper", "layers": {"first": 4, "last": 7}, "rank": 8},
        {"name": "top", "layers": {"first": 8, "last": 11}},
    ]

    lower, upper, top = plan(stages=stages, method=LORA).stages

    size = lower.estimate.trainable_parameters
    assert upper.estimate.trainable_parameters == 2 * size
    idle = [stage.estimate.weights_bytes - lower.estimate.weights_bytes for stage in (upper, top)]
    assert idle == [4 * size, 4 * 3 * size]


def test_a_shared_adapter_keeps_its_rank() -> None:
    stages: Stages = [
        {"name": "lower", "layers": {"first": 0, "last": 3}, "openTop": 1},
        {"name": "upper", "layers": {"first": 4, "last": 7}, "openTop": 1, "rank": 8},
    ]

    found = problems(stages=stages, method=LORA)

    assert list(found) == ["spec.stages[1].rank"]
    assert "layer 11, which lower made with rank 4" in found["spec.stages[1].rank"]
    stages[0]["rank"] = 8
    assert isinstance(result(stages=stages, method=LORA), Plan)


# Gradient norms.

BY_GRADIENT = {"layersPerStage": 3, "order": "GradientNorm", "epochsPerStage": 2}
SIGNALS = [0.1] * 3 + [3.0] * 3 + [0.8] * 3 + [0.7] * 3
"""Mean 1.15: shares 0.087, 2.609, 0.696 and 0.609."""


def test_groups_are_skipped_merged_ordered_and_given_passes_by_their_share() -> None:
    found = plan(BY_GRADIENT, given=facts(12, SIGNALS))

    assert names_of(found) == ["layers-3-5", "layers-6-11"]
    assert [stage.epochs for stage in found.stages] == pytest.approx([4.0, 1.30435])
    assert found.gradients is not None
    decisions = [group.decision for group in found.gradients.groups]
    assert decisions == ["Skipped", "Trained", "Merged", "Merged"]
    assert [group.epochs for group in found.gradients.groups] == pytest.approx(
        [0.0, 4.0, 1.30435, 1.30435]
    )
    assert found.gradients.profile.relative_norms == SIGNALS
    assert Plan.model_validate_json(found.model_dump_json()) == found


def test_options_move_what_is_skipped_and_merged_and_bound_the_passes() -> None:
    options = {"skipBelow": 0.05, "mergeBelow": 0, "floor": 1, "cap": 1.5}

    found = plan({**BY_GRADIENT, "gradientNorm": options}, given=facts(12, SIGNALS))

    assert names_of(found) == ["layers-3-5", "layers-6-8", "layers-9-11", "layers-0-2"]
    assert [stage.epochs for stage in found.stages] == [3.0, 2.0, 2.0, 2.0]


def test_a_skipped_group_keeps_its_neighbours_apart() -> None:
    signals = [0.5] * 3 + [0.1] * 3 + [0.5] * 3 + [2.9] * 3

    found = plan(BY_GRADIENT, given=facts(12, signals))

    assert names_of(found) == ["layers-9-11", "layers-0-2", "layers-6-8"]


def test_a_flat_profile_trains_everything_once_from_the_bottom_up() -> None:
    flat = facts().model_copy(update={"gradients": flat_profile(12)})

    found = plan(BY_GRADIENT, given=flat)

    assert layers_of(found) == layers_of(plan({"layersPerStage": 3, "epochsPerStage": 2}))
    assert {stage.epochs for stage in found.stages} == {2.0}


def test_gradient_norms_with_an_open_top_order_the_groups_below_it() -> None:
    signals = [0.1] * 5 + [1.0] * 5 + [0.4] * 2

    found = plan({"stageCount": 2, "order": "GradientNorm", "openTop": 2}, given=facts(12, signals))

    assert layers_of(found) == [[(5, 11)]]


@given(
    signals=st.lists(st.floats(0, 1e6), min_size=12, max_size=12),
    skip=st.floats(0, 1),
    merge=st.floats(0, 10),
)
@settings(deadline=None)
def test_decisions_hold_for_every_profile(signals: list[float], skip: float, merge: float) -> None:
    options = GradientNormSpec(skip_below=skip, merge_below=merge)
    groups = [LayerRange(first=first, last=first + 2) for first in range(0, 12, 3)]
    profile = GradientFacts(relative_norms=signals, rows=1, tokens=1)

    stages, decided = decide_groups(options, 1.0, groups, profile)

    assert [group.layers for group in decided.groups] == groups
    assert stages, "the largest share is always trained"
    assert [stage.share for stage in stages] == sorted(
        (stage.share for stage in stages), reverse=True
    )
    assert all(0.5 <= stage.epochs <= 2.0 for stage in stages)
    trained = {
        group.layers.first
        for group in decided.groups
        if group.decision is not GradientDecision.SKIPPED
    }
    covered = [
        layer for stage in stages for layer in range(stage.layers.first, stage.layers.last + 1)
    ]
    assert sorted(covered) == sorted(first + step for first in trained for step in range(3))
    assert max(decided.groups, key=lambda group: group.share).layers.first in trained


@pytest.mark.parametrize("signals", [None, [1.0] * 11])
def test_gradient_norms_without_a_profile_of_this_model_are_refused(
    signals: list[float] | None,
) -> None:
    found = problems(BY_GRADIENT, given=facts(12, signals))

    assert "needs a profile of the model's 12 layers" in found["spec.schedule.order"]


def test_the_decision_is_told_in_one_line() -> None:
    found = plan(BY_GRADIENT, given=facts(12, SIGNALS))
    assert found.gradients is not None

    assert describe_gradients(found.gradients) == (
        "gradient norms, measured on 16 rows: layers 0-2 skipped (share 0.09, 0 epochs); "
        "layers 3-5 trained (share 2.61, 4 epochs); layers 6-8 merged (share 0.70, 1.3 epochs); "
        "layers 9-11 merged (share 0.61, 1.3 epochs)"
    )
