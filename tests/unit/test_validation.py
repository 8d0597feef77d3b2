"""The validator: everything that is wrong, at once, with its place and its cure."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from stagetune_api.problems import InvalidManifestError, Problem, ProblemReason
from stagetune_api.spec import StagedFineTune
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
            "spec.suspend": True,
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
        ("spec.suspend", "NotYetSupported"),
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
        ("spec.method.type", "QLoRA"),
        ("spec.method.type", "Expand"),
        ("spec.schedule.order", "GradientNorm"),
        ("spec.training.optimizer", "AdamW8bit"),
        ("spec.training.prefixCache", "Auto"),
        ("spec.protection", {"distillation": {"weight": 0.1}}),
        ("spec.runtime", {"queueName": "team-a"}),
        ("spec.storage", {"size": "100Gi"}),
        ("spec.serve", {"replicas": 1}),
        ("spec.model.secretName", "hub-token"),
        ("spec.dataset.secretName", "hub-token"),
        ("spec.suspend", True),
        ("spec.model.source", "s3://bucket/model"),
        ("spec.dataset.source", "pvc://claim/rows.jsonl"),
        ("spec.dataset.validation", {"source": "s3://bucket/rows.jsonl"}),
        ("spec.evaluation.generalText", {"source": "pvc://claim/text.txt"}),
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


def test_error_shows_every_problem_with_its_path(manifest: Callable[..., Node]) -> None:
    problems = problems_of(manifest({"spec.training.seed": -1, "spec.dataset.maxLength": 4}))
    text = str(InvalidManifestError(problems))
    assert [line.split(":")[0] for line in text.splitlines()] == [
        "spec.dataset.maxLength",
        "spec.training.seed",
    ]
