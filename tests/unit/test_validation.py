"""The validator: everything that is wrong, at once, with its place and its cure."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from stagetune_api.problems import InvalidManifestError, Problem, ProblemReason
from stagetune_api.spec import StagedFineTune
from stagetune_api.spec_checks import Runner, check_runner
from stagetune_api.structural import Node
from stagetune_api.validation import parse_manifest


def problems_of(document: Node) -> list[Problem]:
    result = parse_manifest(document)
    assert isinstance(result, list), "the manifest was accepted"
    return result


def by_path(document: Node) -> dict[str, Problem]:
    return {problem.path: problem for problem in problems_of(document)}


def test_sound_manifest_is_returned(manifest: Callable[..., Node]) -> None:
    parsed = parse_manifest(manifest())
    assert isinstance(parsed, StagedFineTune)
    assert parsed.metadata.name == "finance-qa"
    assert parsed.spec.training.learning_rate == 1e-4


def test_live_object_is_read_as_its_manifest(manifest: Callable[..., Node]) -> None:
    live = {**manifest(), "status": {"state": "Training", "unknown": [1]}}
    live["metadata"] |= {"resourceVersion": "12", "managedFields": [{"manager": "kubectl"}]}
    assert parse_manifest(live) == parse_manifest(manifest())


def test_document_is_not_changed(manifest: Callable[..., Node]) -> None:
    document = manifest({"spec.training.batchSize": "16", "spec.colour": "red"})
    before = copy.deepcopy(document)
    problems_of(document)
    assert document == before


def test_conflicts_are_all_returned_at_once(manifest: Callable[..., Node]) -> None:
    document = manifest(
        {
            "spec.dataset.revision": "main",
            "spec.dataset.validation": {},
            "spec.schedule": {"layersPerStage": 4, "stageCount": 2, "head": "LastStage"},
            "spec.method": {"type": "LoRA", "expand": {}},
            "spec.training": {"batchSize": 10, "microBatchSize": 4},
            "spec.runtime": {
                "engine": "Single",
                "processesPerNode": 2,
                "tolerations": [{}, {"operator": "Exists"}],
            },
            "spec.storage": {"claimName": "runs", "storageClassName": "fast", "retain": "Nothing"},
            "spec.serve": {},
        }
    )
    assert [(problem.path, str(problem.reason)) for problem in problems_of(document)] == [
        ("spec.dataset.revision", "Conflict"),
        ("spec.dataset.validation", "Conflict"),
        ("spec.schedule.layersPerStage", "Conflict"),
        ("spec.method.expand", "Conflict"),
        ("spec.schedule.head", "Conflict"),
        ("spec.training.learningRate", "Required"),
        ("spec.training.microBatchSize", "Conflict"),
        ("spec.storage.storageClassName", "Conflict"),
        ("spec.storage.retain", "Conflict"),
        ("spec.runtime.tolerations[0].key", "Conflict"),
        ("spec.runtime.processesPerNode", "Conflict"),
        ("spec.serve", "NotYetSupported"),
    ]


def test_wrong_values_and_conflicts_elsewhere_are_returned_at_once(
    manifest: Callable[..., Node],
) -> None:
    document = manifest(
        {
            "spec.model.chatTemplate": 5,
            "spec.training.batchSize": 0,
            "spec.training.optimiser": "AdamW",
            "spec.dataset.revision": "main",
            "spec.serve": {},
        }
    )
    found = by_path(document)
    assert {path: str(problem.reason) for path, problem in found.items()} == {
        "spec.model.chatTemplate": "Invalid",
        "spec.training.batchSize": "Invalid",
        "spec.training.optimiser": "UnknownField",
        "spec.dataset.revision": "Conflict",
        "spec.serve": "NotYetSupported",
    }


def test_value_of_a_wrong_type_is_not_judged_by_what_stands_beside_it(
    manifest: Callable[..., Node],
) -> None:
    # 3 does not divide the default batch size, but the batch size was meant to be another.
    document = manifest({"spec.training.batchSize": "24", "spec.training.microBatchSize": 3})
    assert list(by_path(document)) == ["spec.training.batchSize"]


def test_empty_document_lacks_everything() -> None:
    assert list(by_path({})) == ["apiVersion", "kind", "metadata", "spec"]
    assert {problem.reason for problem in problems_of({})} == {ProblemReason.REQUIRED}


def test_path_leads_into_lists(manifest: Callable[..., Node]) -> None:
    stages = [
        {"name": "lower", "layers": {"first": 0, "last": 3}},
        {"name": "Upper", "layers": {"first": 4}},
    ]
    found = by_path(manifest({"spec.schedule": None, "spec.stages": stages}))
    assert list(found) == ["spec.stages[1].name", "spec.stages[1].layers.last"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.training.batchSize", "16"),
        ("spec.training.batchSize", True),
        ("spec.training.learningRate", "1e-4"),
        ("spec.suspend", "yes"),
        ("spec.suspend", 1),
        ("spec.model.revision", 20240101),
        ("spec.training.seed", 1.5),
        ("spec.training.learningRate", float("nan")),
        ("spec.training.maxGradNorm", float("inf")),
    ],
)
def test_value_of_another_type_is_refused(
    path: str, value: Any, manifest: Callable[..., Node]
) -> None:
    # What the API server would not take must not pass on one machine either.
    assert by_path(manifest({path: value}))[path].reason is ProblemReason.INVALID


def test_field_names_are_camel_case_only(manifest: Callable[..., Node]) -> None:
    found = by_path(manifest({"spec.dataset.max_length": 512}))
    assert found["spec.dataset.max_length"].reason is ProblemReason.UNKNOWN_FIELD


@pytest.mark.parametrize(
    ("edits", "path", "cure"),
    [
        ({"spec.model.source": "Qwen/Qwen2.5-7B"}, "spec.model.source", "write hf://org/name"),
        ({"spec.model.sauce": 1}, "spec.model.sauce", "check its spelling"),
        ({"spec.dataset": None}, "spec.dataset", "add it"),
        ({"spec.training.microBatchSize": 3}, "spec.training.microBatchSize", "use a divisor"),
        ({"spec.method.lora": {}}, "spec.method.lora", "set it to LoRA or remove lora"),
        ({"spec.export.format": "Adapter"}, "spec.export.format", "use Merged"),
        ({"spec.training": None}, "spec.training.learningRate", "2e-5 to 1e-4 is usual"),
        ({"spec.dataset.revision": "main"}, "spec.dataset.revision", "remove it"),
        ({"spec.model.source": "pvc://models/.."}, "spec.model.source", "without '..'"),
        ({"spec.storage": {}}, "spec.storage.size", "neither is given"),
        (
            {"spec.storage": {"size": "1Gi", "claimName": "runs"}},
            "spec.storage.size",
            "both are given",
        ),
        (
            {"spec.runtime": {"processesPerNode": 17}},
            "spec.training.microBatchSize",
            "take fewer processes",
        ),
    ],
)
def test_message_names_the_cure(
    edits: dict[str, Any], path: str, cure: str, manifest: Callable[..., Node]
) -> None:
    assert cure in by_path(manifest(edits))[path].message


@pytest.mark.parametrize("value", [7, "Lora"])
def test_message_shows_the_value_and_what_is_expected(
    value: object, manifest: Callable[..., Node]
) -> None:
    message = by_path(manifest({"spec.method.type": value}))["spec.method.type"].message
    assert repr(value) in message
    assert "'Full', 'LoRA', 'QLoRA' or 'Expand'" in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.serve", {"replicas": 1}),
        ("spec.model.source", "s3://bucket/model"),
        ("spec.dataset.source", "s3://bucket/rows.jsonl"),
        ("spec.dataset.validation", {"source": "s3://bucket/rows.jsonl"}),
        ("spec.evaluation.generalText", {"source": "s3://bucket/text.txt"}),
    ],
)
def test_part_without_a_program_behind_it_is_not_yet_supported(
    path: str, value: Any, manifest: Callable[..., Node], server: Any
) -> None:
    document = manifest({path: value})
    (problem,) = problems_of(document)
    assert problem.reason is ProblemReason.NOT_YET_SUPPORTED
    assert problem.path.startswith(path)
    assert "not yet supported" in problem.message
    # A matter of the program's version: a CRD that outlives it must not refuse it.
    assert server.refusals(document) == []


ON_A_CLUSTER = {
    "spec.model": {"source": "pvc://models/base", "secretName": "hub-token"},
    "spec.dataset": {
        "source": "pvc://rows/finance.jsonl",
        "secretName": "hub-token",
        "validation": {"source": "pvc://rows/held-out.jsonl"},
    },
    "spec.evaluation.generalText": {"source": "pvc://rows/text.txt"},
    "spec.protection.replay": {"ratio": 0.1, "source": "pvc://rows/other.txt"},
    "spec.runtime": {
        "resources": {
            "limits": {"nvidia.com/gpu": 1, "memory": "64Gi"},
            "requests": {"cpu": "500m"},
        },
        "queueName": "team-a",
        "priorityClassName": "low",
        "nodeSelector": {"nvidia.com/gpu.product": "A100"},
        "tolerations": [{"key": "gpu", "effect": "NoExecute", "tolerationSeconds": 60}],
        "maxRetries": 0,
        "gracePeriodSeconds": 300,
        "engine": "Single",
    },
    "spec.storage": {"size": "200Gi", "modelsClaimName": "models", "retain": "Nothing"},
    "spec.suspend": True,
    "spec.retry": {"number": 2, "fromStage": "layers-4-7"},
}
FILES = {
    "spec.model.source": "file://model",
    "spec.dataset.source": "file://rows.jsonl",
    "spec.dataset.validation": {"source": "file://held-out.jsonl"},
    "spec.evaluation.generalText": {"source": "file://text.txt"},
    "spec.protection.replay": {"ratio": 0.1, "source": "file://other.txt"},
}
SOURCE_PATHS = [
    "spec.model.source",
    "spec.dataset.source",
    "spec.dataset.validation.source",
    "spec.evaluation.generalText.source",
    "spec.protection.replay.source",
]


def problems_for(runner: Runner, document: Node) -> list[Problem]:
    parsed = parse_manifest(document)
    assert isinstance(parsed, StagedFineTune), parsed
    return check_runner(parsed.spec, runner)


def test_what_a_cluster_needs_is_a_valid_manifest(
    manifest: Callable[..., Node], server: Any
) -> None:
    document = manifest(ON_A_CLUSTER)
    assert server.refusals(document) == []
    assert problems_for(Runner.CLUSTER, document) == []


def test_cluster_refuses_files_of_one_machine_and_a_run_without_a_volume(
    manifest: Callable[..., Node],
) -> None:
    problems = problems_for(Runner.CLUSTER, manifest(FILES))
    assert [problem.path for problem in problems] == [*SOURCE_PATHS, "spec.storage"]
    assert all("pvc://claim/path" in problem.message for problem in problems[:-1])
    assert problems[0].message.startswith("file://model is a path on one machine")
    assert problems[-1].reason is ProblemReason.REQUIRED
    assert "storage.size" in problems[-1].message


def test_one_machine_refuses_claims_and_a_suspended_run(manifest: Callable[..., Node]) -> None:
    problems = problems_for(Runner.LOCAL, manifest(ON_A_CLUSTER))
    assert [problem.path for problem in problems] == [*SOURCE_PATHS, "spec.suspend"]
    assert {problem.reason for problem in problems} == {ProblemReason.CONFLICT}
    assert "use file://, hf:// or ms:// here" in problems[0].message
    assert "Ctrl-C" in problems[-1].message


def test_one_machine_takes_what_counts_on_clusters_only(manifest: Callable[..., Node]) -> None:
    sections = {path: ON_A_CLUSTER[path] for path in ("spec.runtime", "spec.storage", "spec.retry")}
    assert problems_for(Runner.LOCAL, manifest({**FILES, **sections})) == []


@pytest.mark.parametrize("runner", Runner)
def test_every_runner_takes_hubs_and_a_volume(
    runner: Runner, manifest: Callable[..., Node]
) -> None:
    edits = {
        "spec.dataset.source": "ms://org/rows",
        "spec.dataset.validation": {"source": "hf://org/held-out"},
        "spec.storage": {"claimName": "runs"},
        "spec.suspend": False,
    }
    assert problems_for(runner, manifest(edits)) == []


@pytest.mark.parametrize("runner", Runner)
def test_sound_manifest_lacks_for_a_runner_only_what_is_its_own(
    runner: Runner, manifest: Callable[..., Node]
) -> None:
    expected = {Runner.CLUSTER: ["spec.dataset.source", "spec.storage"], Runner.LOCAL: []}
    assert [problem.path for problem in problems_for(runner, manifest())] == expected[runner]


def test_refused_quantity_is_one_problem_beside_others(manifest: Callable[..., Node]) -> None:
    document = manifest(
        {
            "spec.runtime.resources.limits": {"nvidia.com/gpu": 1.5, "memory": "64Gi"},
            "spec.runtime.nodeSelector": {"": "yes"},
            "spec.runtime.maxRetries": -1,
            "spec.storage": {},
        }
    )
    assert [(problem.path, str(problem.reason)) for problem in problems_of(document)] == [
        ("spec.runtime.resources.limits.nvidia.com/gpu", "Invalid"),
        ("spec.runtime.nodeSelector.", "Invalid"),
        ("spec.runtime.maxRetries", "Invalid"),
        ("spec.storage.size", "Conflict"),
    ]


def test_error_shows_every_problem_with_its_path(manifest: Callable[..., Node]) -> None:
    problems = problems_of(manifest({"spec.training.seed": -1, "spec.dataset.maxLength": 4}))
    text = str(InvalidManifestError(problems))
    assert [line.split(":")[0] for line in text.splitlines()] == [
        "spec.dataset.maxLength",
        "spec.training.seed",
    ]
