"""The CRD's rules: each one refuses what it is for, and agrees with the operator's validator."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from manifest_cases import (
    CASES,
    FREE_CHANGES,
    FROZEN_CHANGES,
    LOWER,
    PLANNED,
    QUANTITIES,
    STAGE_EDITS,
    THREE_STAGES,
    UPPER,
    Case,
    in_stages,
    stage_edits,
    stages_in,
)
from stagetune_api.problems import Problem, ProblemReason
from stagetune_api.rules import CLAIM_RULES, FROZEN_RULES, NAME_RULE, SPEC_RULES, STAGES_RULE
from stagetune_api.schema import CRD_FILE
from stagetune_api.spec import StagedFineTune, StagedFineTuneSpec
from stagetune_api.status import StageState
from stagetune_api.structural import INT_OR_STRING, Node
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
    rules = (NAME_RULE, *SPEC_RULES, *CLAIM_RULES)
    shown = {rule.message for rule in rules}
    assert [message for message in CASES if not any(message in text for text in shown)] == []
    # Rules may share a message, so each needs a case at its own place.
    tested = [
        (message, re.sub(r"\[\d+\]", "[]", case.path))
        for message, cases in CASES.items()
        for case in cases
    ]
    assert [
        rule
        for rule in rules
        if not any(text in rule.message and at.startswith(rule.path) for text, at in tested)
    ] == []


def test_stage_names_differ_by_the_kind_of_list(server: Any, manifest: Callable[..., Node]) -> None:
    document = manifest(in_stages(LOWER, {**UPPER, "name": "lower"}))
    assert server.refusals(document) == ["name is used twice in ['lower', 'lower']"]
    assert [problem.path for problem in blocking_problems(document)] == ["spec.stages[1].name"]


@pytest.mark.parametrize("field", ["limits", "requests"])
@pytest.mark.parametrize("amount", QUANTITIES["accepted"])
def test_quantity_is_a_number_or_a_text(
    field: str, amount: Any, server: Any, manifest: Callable[..., Node]
) -> None:
    document = manifest({f"spec.runtime.resources.{field}": {"memory": amount}})
    assert server.refusals(document) == []
    parsed = parse_manifest(document)
    assert isinstance(parsed, StagedFineTune)
    assert parsed.spec.runtime is not None
    assert parsed.spec.runtime.resources is not None
    assert getattr(parsed.spec.runtime.resources, field) == {"memory": amount}


@pytest.mark.parametrize("field", ["limits", "requests"])
@pytest.mark.parametrize("amount", QUANTITIES["refused"], ids=repr)
def test_anything_else_is_no_quantity(
    field: str, amount: Any, server: Any, manifest: Callable[..., Node]
) -> None:
    document = manifest({f"spec.runtime.resources.{field}": {"memory": amount}})
    assert server.refusals(document)
    (problem,) = blocking_problems(document)
    assert problem.path == f"spec.runtime.resources.{field}.memory"
    assert "it should be an amount as Kubernetes writes it: 1, '500m', '48Gi'" in problem.message


def test_amount_that_is_taken_away_by_null_is_a_mistake_to_the_validator_only(
    server: Any, manifest: Callable[..., Node]
) -> None:
    # The server stores what is left, so the operator never sees the null.
    document = manifest({"spec.runtime.resources.limits": {"nvidia.com/gpu": None}})
    assert server.refusals(document) == []
    assert server.read(document)["spec"]["runtime"]["resources"]["limits"] == {}
    (problem,) = blocking_problems(document)
    assert problem.path == "spec.runtime.resources.limits.nvidia.com/gpu"


def with_conditions(document: Node, *conditions: Node) -> Node:
    return {**document, "status": {"conditions": list(conditions)}}


def test_every_field_of_the_spec_is_kept_or_free_and_has_a_change_to_test() -> None:
    fields = [info.alias for info in StagedFineTuneSpec.model_fields.values()]
    assert sorted([*FROZEN_CHANGES, *FREE_CHANGES, "stages"]) == sorted(fields)
    assert len(FROZEN_RULES) == len(FROZEN_CHANGES)


@pytest.mark.parametrize("field", FROZEN_CHANGES)
def test_started_run_refuses_a_change(
    field: str, server: Any, manifest: Callable[..., Node]
) -> None:
    old = with_conditions(manifest(), PLANNED)
    new = manifest({f"spec.{field}": FROZEN_CHANGES[field]})
    message = f"spec.{field} cannot change once the run has started"
    assert any(message in refusal for refusal in server.refusals(new, old))


@pytest.mark.parametrize("field", ["protection", "storage", "evaluation", "serve"])
def test_started_run_refuses_that_a_section_is_removed(
    field: str, server: Any, manifest: Callable[..., Node]
) -> None:
    old = with_conditions(manifest({f"spec.{field}": FROZEN_CHANGES[field]}), PLANNED)
    (refusal,) = server.refusals(manifest(), old)
    assert f"spec.{field} cannot change" in refusal


@pytest.mark.parametrize("field", FREE_CHANGES)
def test_started_run_lets_a_free_field_come_and_go(
    field: str, server: Any, manifest: Callable[..., Node]
) -> None:
    without = with_conditions(manifest(), PLANNED)
    with_it = with_conditions(manifest({f"spec.{field}": FREE_CHANGES[field]}), PLANNED)
    assert server.refusals(with_it, without) == []
    assert server.refusals(without, with_it) == []


@pytest.mark.parametrize(
    ("stages", "states"), stage_edits("refused").values(), ids=stage_edits("refused").keys()
)
def test_stage_that_has_started_keeps_its_fields_and_its_place(
    stages: tuple[Node, ...], states: str, server: Any, manifest: Callable[..., Node]
) -> None:
    old = {**manifest(in_stages(*THREE_STAGES)), "status": stages_in(states)}
    (refusal,) = server.refusals(manifest(in_stages(*stages)), old)
    assert refusal == STAGES_RULE.message


@pytest.mark.parametrize(
    ("stages", "states"), stage_edits("accepted").values(), ids=stage_edits("accepted").keys()
)
def test_stage_that_is_pending_may_change(
    stages: tuple[Node, ...], states: str, server: Any, manifest: Callable[..., Node]
) -> None:
    old = {**manifest(in_stages(*THREE_STAGES)), "status": stages_in(states)}
    assert server.refusals(manifest(in_stages(*stages)), old) == []


def test_every_state_but_pending_is_shown_to_freeze_a_stage() -> None:
    shown = {states.split()[1] for states in STAGE_EDITS["second-changed"].refused}
    assert shown == set(StageState) - {StageState.PENDING}


def test_stage_without_a_state_counts_as_pending(
    server: Any, manifest: Callable[..., Node]
) -> None:
    status = stages_in("Succeeded Pending Pending")
    del status["stages"][1]["state"]
    old = {**manifest(in_stages(*THREE_STAGES)), "status": status}
    assert server.refusals(manifest(in_stages(LOWER, UPPER)), old) == []


@pytest.mark.parametrize("status", [{}, {"stages": []}], ids=["none", "empty"])
def test_stages_may_change_where_no_stage_is_reported(
    status: Node, server: Any, manifest: Callable[..., Node]
) -> None:
    status = {"conditions": [PLANNED], **status}
    old = {**manifest(in_stages(*THREE_STAGES)), "status": status}
    assert server.refusals(manifest(in_stages(UPPER)), old) == []


@pytest.mark.parametrize("states", ["Pending Pending Pending", "Running Pending Pending"])
def test_started_run_keeps_its_way_of_being_cut_into_stages(
    states: str, server: Any, manifest: Callable[..., Node]
) -> None:
    by_rule, by_list = manifest(), manifest(in_stages(*THREE_STAGES))
    for old, new in ((by_rule, by_list), (by_list, by_rule)):
        refusals = server.refusals(new, {**old, "status": stages_in(states)})
        assert STAGES_RULE.message in refusals


@pytest.mark.parametrize(
    "conditions",
    [[], [{**PLANNED, "status": "False"}], [{**PLANNED, "type": "Validated"}]],
    ids=["none", "preparing", "validated"],
)
def test_run_that_has_not_started_may_change(
    conditions: list[Node], server: Any, manifest: Callable[..., Node]
) -> None:
    new = manifest({"spec.training.batchSize": 32, "spec.storage.size": "1Gi"})
    assert server.refusals(new, with_conditions(manifest(), *conditions)) == []


def test_started_run_takes_the_same_manifest_again(
    server: Any, manifest: Callable[..., Node]
) -> None:
    spelled_out = {"spec.training.batchSize": 16, "spec.method.type": "Full", "spec.export": {}}
    old = with_conditions(manifest(), PLANNED)
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
    if node.get(INT_OR_STRING):
        return st.sampled_from([0, 1, "1", "500m", "1.5Gi", "1.5GiB", "-1", *wrong_types])
    match node["type"]:
        case "integer" | "number":
            edges = [node.get("minimum", 0), node.get("maximum", 1), 0]
            near = [edge + step for edge in edges for step in (-1, 0, 1)]
            numbers = [*near, *(edge + step for edge in edges for step in (-0.25, 0.25))]
            return st.sampled_from([*numbers, *wrong_types])
        case "string":
            limit = node.get("maxLength", 8)
            texts = ["x" * limit, "x" * (limit + 1), "hf://a", "hf://", "hf://a\n", "a\n", "10Gi"]
            texts += ["pvc://a/b", "pvc://a", "pvc://a/../b", "s3://a"]
            return st.sampled_from([*node.get("enum", ()), *texts, *wrong_types])
        case "array" if "properties" in node["items"]:
            return st.lists(items_of(node["items"]), max_size=3)
        case "object" if "additionalProperties" in node:
            keys = st.sampled_from(["", "nvidia.com/gpu", "cpu", *("n" * n for n in EDGES)])
            return st.dictionaries(keys, values_around(node["additionalProperties"]), max_size=3)
        case _:
            return st.sampled_from(wrong_types)


EDGES = (128, 129, 317, 318)
"""Lengths of names in maps around the ones that are allowed."""


def items_of(node: Node) -> st.SearchStrategy[Any]:
    """Stages and tolerations, some of them faulty."""
    ends = st.sampled_from([0, 1, 5, 1023, 1024, -1, "1"])
    known = {
        "name": st.sampled_from(["lower", "upper", "Upper", "a" * 17, 3]),
        "layers": st.fixed_dictionaries({"first": ends, "last": ends}),
    }
    values: dict[str, st.SearchStrategy[Any]] = {
        name: known[name] if name in known else values_around(child)
        for name, child in node["properties"].items()
    }
    required = {name: values.pop(name) for name in node.get("required", ())}
    return st.fixed_dictionaries(required, optional=values)


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
