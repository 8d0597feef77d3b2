"""Several processes for one stage: how many there are, what they divide, what a cluster refuses."""

import json
from typing import Any

import pytest

from fake_cluster import FACTS
from manifest_cases import ROOT, edited
from stagetune_api.facts import DataFacts, Facts, ModelFacts
from stagetune_api.spec import RuntimeSpec, StagedFineTune, StagedFineTuneSpec
from stagetune_api.spec_checks import Runner, check_runner, check_spec
from stagetune_api.stage import EnginePlan, StageEstimate, plan_engine
from stagetune_api.training_spec import LayerRange, MethodSpec, TrainingSpec
from stagetune_api.validation import parse_manifest
from stagetune_operator.estimate import DEVICE_CONTEXT_BYTES, Machine, estimate_stage
from stagetune_operator.model_facts import model_facts_from_config
from stagetune_operator.ownership import Owner
from stagetune_operator.plan import Plan, make_plan
from stagetune_operator.stage_files import Step, build_stage_file, steps_after_prepare
from stagetune_operator.stage_scope import StageScope

OWNER = Owner(name="finance-qa", namespace="team-a", uid="0c4a3e62-5d8f-4c9a-9a52-0d8f7c1d9a11")
QWEN_CONFIG = ROOT / "examples" / "qwen2.5-7b-instruct.config.json"
BUCKETS = 2 * 200_000_000
FOUR_LAYERS = StageScope(LayerRange(first=8, last=11))


def gpus(count: int, **runtime: Any) -> dict[str, Any]:
    return {
        "spec.dataset.source": "hf://org/rows",
        "spec.storage": {"size": "10Gi"},
        "spec.schedule": {"layersPerStage": 2},
        "spec.runtime": {"resources": {"limits": {"nvidia.com/gpu": count}}, **runtime},
    }


def spec_of(edits: dict[str, Any]) -> StagedFineTuneSpec:
    manifest = parse_manifest(edited(edits))
    assert isinstance(manifest, StagedFineTune), manifest
    return manifest.spec


def paths_for_cluster(spec: StagedFineTuneSpec) -> list[str]:
    assert check_spec(spec) == []
    return [problem.path for problem in check_runner(spec, Runner.CLUSTER)]


@pytest.mark.parametrize(
    ("runtime", "num_gpus", "processes"),
    [
        (None, 0, None),
        ({}, 0, None),
        ({}, 1, None),
        ({}, 4, 4),
        ({"processesPerNode": 2}, 0, 2),
        ({"processesPerNode": 2}, 4, 2),
        ({"processesPerNode": 1}, 4, None),
        ({"engine": "Single"}, 4, None),
        ({"engine": "DeepSpeed"}, 0, 1),
        ({"deepspeed": {"offload": "Optimizer"}}, 1, 1),
    ],
)
def test_processes_follow_from_the_manifest_or_from_the_gpus(
    runtime: dict[str, Any] | None, num_gpus: int, processes: int | None
) -> None:
    spec = None if runtime is None else RuntimeSpec.model_validate(runtime)
    plan = plan_engine(spec, num_gpus=num_gpus)
    assert (plan and plan.num_processes) == processes


def test_several_gpus_are_refused_with_what_deepspeed_cannot_do() -> None:
    eight_bit = {"spec.training.optimizer": "AdamW8bit"}
    assert paths_for_cluster(spec_of({**gpus(1), **eight_bit})) == []
    assert paths_for_cluster(spec_of({**gpus(2), **eight_bit})) == ["spec.training.optimizer"]
    single = spec_of({**gpus(2, engine="Single"), **eight_bit})
    assert paths_for_cluster(single) == []


def test_a_process_without_a_gpu_of_its_own_is_refused() -> None:
    path = "spec.runtime.processesPerNode"
    assert paths_for_cluster(spec_of(gpus(2, processesPerNode=3))) == [path]
    assert paths_for_cluster(spec_of(gpus(2, processesPerNode=2))) == []
    assert paths_for_cluster(spec_of({**gpus(2), "spec.runtime": {"processesPerNode": 2}})) == []


def test_only_training_has_an_engine_in_its_stage_file() -> None:
    spec = spec_of(gpus(2, deepspeed={"zeroStage": 3}))
    plan = make_plan(spec, FACTS)
    assert isinstance(plan, Plan), plan

    def engine_of(step: Step) -> EnginePlan | None:
        digests = ["c" * 64] * len(plan.stages)
        stages = plan.stages
        return build_stage_file(
            OWNER, spec, step, facts=FACTS, stages=stages, digests=digests
        ).engine

    *train, evaluate, export = steps_after_prepare(plan.stages)
    wanted = EnginePlan(processes_per_node=2, zero_stage=3)
    assert [engine_of(step) for step in train] == [wanted] * len(train)
    assert [engine_of(step) for step in (evaluate, export)] == [None, None]


def estimate(engine: EnginePlan | None, **training: Any) -> StageEstimate:
    model = model_facts_from_config(json.loads(QWEN_CONFIG.read_text()))
    assert isinstance(model, ModelFacts)
    data = DataFacts(
        train_rows=1000,
        validation_rows=50,
        train_tokens=200_000,
        train_answer_tokens=80_000,
        max_row_tokens=1024,
    )
    spec = TrainingSpec.model_validate({"learningRate": 1e-4, **training})
    facts = Facts(model=model, data=data, model_directory="models/qwen")
    return estimate_stage(facts, MethodSpec(), spec, FOUR_LAYERS, Machine(engine=engine))


def shared(processes: int, zero_stage: int, offload: str = "None") -> EnginePlan:
    return EnginePlan.model_validate(
        {"processesPerNode": processes, "zeroStage": zero_stage, "offload": offload}
    )


def test_stage_2_divides_masters_gradients_and_moments() -> None:
    alone, four = estimate(None), estimate(shared(4, 2))
    count = alone.trainable_parameters
    assert four.training_state_bytes == 4 * count + 16 * count // 4 + BUCKETS
    assert four.weights_bytes == alone.weights_bytes
    assert four.activation_bytes == alone.activation_bytes
    assert four.disk_bytes == alone.disk_bytes
    offloaded = estimate(shared(4, 2, "Optimizer"))
    assert offloaded.training_state_bytes == 4 * count + BUCKETS


def test_stage_3_divides_the_layers_weights_too_but_not_while_they_are_loaded() -> None:
    alone, eight = estimate(None), estimate(shared(8, 3))
    count = alone.trainable_parameters
    assert eight.training_state_bytes == (4 + 16) * count // 8 + BUCKETS
    assert eight.weights_bytes < 0.4 * alone.weights_bytes
    loaded = alone.weights_bytes + 4 * count
    assert eight.memory_bytes == loaded + DEVICE_CONTEXT_BYTES
    on_host = estimate(shared(8, 3, "OptimizerAndParameters"))
    assert on_host.training_state_bytes == BUCKETS
    assert on_host.weights_bytes < eight.weights_bytes
