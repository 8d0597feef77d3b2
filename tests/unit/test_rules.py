"""The CRD's rules: each one refuses what it is for, and agrees with the operator's validator."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from manifest_cases import CASES, CHANGES, LOWER, PREPARED, UPPER, Case, in_stages
from stagetune_api.problems import Problem, ProblemReason
from stagetune_api.rules import FROZEN_RULES, NAME_RULE, SPEC_RULES
from stagetune_api.schema import CRD_FILE
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.structural import Node
from stagetune_api.validation import parse_manifest


def blocking_problems(document: Node) -> list[Problem]:
    """What the validator refuses for good, whatever a later version will support."""
    result = parse_manifest(document)
    if not isinstance(result, list):
        return []
    return [problem for problem in result if problem.reason is not ProblemReason.NOT_YET_SUPPORTED]


@pytest.mark.parametrize(
    ("message", "case"),
    [
        pytest.param(message, case, id=f"{message}-{number}")
        for message, cases in CASES.items()
        for number, case in enumerate(cases)
    ],
)
def test_rule_refuses_with_its_message_as_the_validator_does(
    message: str, case: Case, server: Any, manifest: Callable[..., Node]
) -> None:
    document = manifest(case.refused)
    (refusal,) = server.refusals(document)
    assert message in refusal
    assert case.path in [problem.path for problem in blocking_problems(document)]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{message}-{number}")
        for message, cases in CASES.items()
        for number, case in enumerate(cases)
    ],
)
def test_rule_accepts_what_the_validator_accepts(
    case: Case, server: Any, manifest: Callable[..., Node]
) -> None:
    document = manifest(case.accepted)
    assert server.refusals(document) == []
    assert blocking_problems(document) == []


def test_every_rule_has_a_case() -> None:
    shown = {rule.message for rule in (NAME_RULE, *SPEC_RULES)}
    assert [message for message in CASES if not any(message in text for text in shown)] == []
    assert [text for text in shown if not any(message in text for message in CASES)] == []


def test_stage_names_differ_by_the_kind_of_list(server: Any, manifest: Callable[..., Node]) -> None:
    document = manifest(in_stages(LOWER, {**UPPER, "name": "lower"}))
    assert server.refusals(document) == ["name is used twice in ['lower', 'lower']"]
    assert [problem.path for problem in blocking_problems(document)] == ["spec.stages[1].name"]


def with_conditions(document: Node, *conditions: Node) -> Node:
    return {**document, "status": {"conditions": list(conditions)}}


def test_every_field_but_suspend_has_a_change_to_test() -> None:
    fields = {info.alias for info in StagedFineTuneSpec.model_fields.values()}
    assert CHANGES.keys() == fields - {"suspend"}
    assert len(FROZEN_RULES) == len(CHANGES)


@pytest.mark.parametrize("field", CHANGES)
def test_started_run_refuses_a_change(
    field: str, server: Any, manifest: Callable[..., Node]
) -> None:
    old = with_conditions(manifest(), PREPARED)
    new = manifest({f"spec.{field}": CHANGES[field]})
    message = f"spec.{field} cannot change once the run has started"
    assert any(message in refusal for refusal in server.refusals(new, old))


@pytest.mark.parametrize("field", ["protection", "runtime", "storage", "evaluation", "serve"])
def test_started_run_refuses_that_a_section_is_removed(
    field: str, server: Any, manifest: Callable[..., Node]
) -> None:
    old = with_conditions(manifest({f"spec.{field}": CHANGES[field]}), PREPARED)
    (refusal,) = server.refusals(manifest(), old)
    assert f"spec.{field} cannot change" in refusal


@pytest.mark.parametrize(
    "conditions",
    [[], [{**PREPARED, "status": "False"}], [{**PREPARED, "type": "Validated"}]],
    ids=["none", "preparing", "validated"],
)
def test_run_that_has_not_started_may_change(
    conditions: list[Node], server: Any, manifest: Callable[..., Node]
) -> None:
    new = manifest({"spec.training.batchSize": 32, "spec.storage.size": "1Gi"})
    assert server.refusals(new, with_conditions(manifest(), *conditions)) == []


def test_started_run_may_be_suspended_and_let_go_on(
    server: Any, manifest: Callable[..., Node]
) -> None:
    running = with_conditions(manifest(), PREPARED)
    suspended = with_conditions(manifest({"spec.suspend": True}), PREPARED)
    assert server.refusals(suspended, running) == []
    assert server.refusals(running, suspended) == []


def test_started_run_takes_the_same_manifest_again(
    server: Any, manifest: Callable[..., Node]
) -> None:
    spelled_out = {"spec.training.batchSize": 16, "spec.method.type": "Full", "spec.export": {}}
    old = with_conditions(manifest(), PREPARED)
    assert server.refusals(manifest(spelled_out), old) == []


SCHEMA: Node = YAML(typ="safe").load(CRD_FILE)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def fields_of(node: Node, path: str) -> dict[str, Node]:
    """Every field of objects below `node` with its schema; what is inside lists is left out."""
    found = {}
    for name, child in node.get("properties", {}).items():
        found[f"{path}.{name}"] = child
        found |= fields_of(child, f"{path}.{name}")
    return found


def values_around(node: Node) -> st.SearchStrategy[Any]:
    """Values on both sides of what `node` allows. Whole numbers are given as integers only:
    2.0 is an integer to the server and a mistake to the validator."""
    wrong_types: list[Any] = ["", "2", True, -1, 0.5, [], {}, {"colour": "red"}, [1], ["x"]]
    match node["type"]:
        case "integer" | "number":
            edges = [node.get("minimum", 0), node.get("maximum", 1), 0]
            near = [edge + step for edge in edges for step in (-1, 0, 1)]
            numbers = [*near, *(edge + step for edge in edges for step in (-0.25, 0.25))]
            return st.sampled_from([*numbers, *wrong_types])
        case "string":
            limit = node.get("maxLength", 8)
            texts = ["x" * limit, "x" * (limit + 1), "hf://a", "hf://", "hf://a\n", "a\n", "10Gi"]
            return st.sampled_from([*node.get("enum", ()), *texts, *wrong_types])
        case "array" if "properties" in node["items"]:
            return st.lists(items_of(node["items"]), max_size=3)
        case _:
            return st.sampled_from(wrong_types)


def items_of(node: Node) -> st.SearchStrategy[Any]:
    """Stages, some of them faulty."""
    names = st.sampled_from(["lower", "upper", "Upper", "a" * 17, 3])
    ends = st.sampled_from([0, 1, 5, 1023, 1024, -1, "1"])
    layers = st.fixed_dictionaries({"first": ends, "last": ends})
    optional = {
        name: values_around(child)
        for name, child in node["properties"].items()
        if name not in node["required"]
    }
    return st.fixed_dictionaries({"name": names, "layers": layers}, optional=optional)


FIELDS = fields_of(SCHEMA["properties"]["spec"], "spec")
EDITS = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda path: st.tuples(st.just(path), st.one_of(st.none(), values_around(FIELDS[path])))
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(edits=st.lists(EDITS, min_size=1, max_size=3, unique_by=lambda edit: edit[0]))
def test_validator_and_schema_refuse_the_same_manifests(
    edits: list[tuple[str, Any]], server: Any, manifest: Callable[..., Node]
) -> None:
    paths = [path for path, _ in edits]
    assume(not any(path.startswith(f"{other}.") for path in paths for other in paths))
    document = manifest(dict(edits))
    refusals, problems = server.refusals(document), blocking_problems(document)
    assert bool(refusals) == bool(problems), (document["spec"], refusals, problems)
