"""The CustomResourceDefinition: up to date, sound for the API server, and true to the models."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import kubernetes_validate
import pytest
from pydantic import Field
from ruamel.yaml import YAML

from manifest_cases import EXAMPLES, SECTIONS_WITH_DEFAULTS
from stagetune_api import names
from stagetune_api.base import ApiModel
from stagetune_api.schema import CRD_FILE, build_crd, find_faults, main, render
from stagetune_api.spec import StagedFineTune
from stagetune_api.status import StagedFineTuneStatus
from stagetune_api.structural import INT_OR_STRING, Node, SchemaError, structural_schema
from stagetune_api.validation import parse_manifest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN_STATUS = ROOT / "tests" / "data" / "golden" / "status.yaml"


def load(path: Path) -> Node:
    loaded: Node = YAML(typ="safe").load(path)
    return loaded


def version_of(crd: Node) -> Node:
    version: Node = crd["spec"]["versions"][0]
    return version


def schema_of(crd: Node) -> Node:
    schema: Node = version_of(crd)["schema"]["openAPIV3Schema"]
    return schema


def test_file_is_what_the_models_say() -> None:
    assert main(["--check"]) == 0


def test_file_loads_as_what_was_built(crd: Node) -> None:
    assert crd == build_crd()


def test_check_names_the_cure_and_shows_the_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "crd.yaml"
    assert main(["--check"], file=file) == 1
    file.write_text(CRD_FILE.read_text().replace("maximum: 65536", "maximum: 7"))
    assert main(["--check"], file=file) == 1
    message = capsys.readouterr().err
    assert "make crds" in message
    assert "maximum: 65536" in message


def test_writing_brings_the_file_up_to_date(tmp_path: Path) -> None:
    file = tmp_path / "crd.yaml"
    assert main([], file=file) == 0
    assert main(["--check"], file=file) == 0
    assert file.read_text().startswith("# Generated from the models")


def test_file_has_no_blanks_at_line_ends() -> None:
    assert [line for line in render(build_crd()).splitlines() if line != line.rstrip()] == []


def test_kubernetes_accepts_the_crd(crd: Node) -> None:
    kubernetes_validate.validate(crd, "1.37", strict=True)


def test_crd_has_the_names_of_the_contract(crd: Node) -> None:
    spec = crd["spec"]
    assert crd["metadata"]["name"] == f"{names.PLURAL}.{names.GROUP}"
    assert (spec["group"], spec["scope"]) == ("stagetune.io", "Namespaced")
    assert f"{spec['group']}/{version_of(crd)['name']}" == names.API_VERSION
    assert spec["names"]["kind"] == names.KIND
    assert version_of(crd)["subresources"] == {"status": {}}


def test_columns_are_those_of_the_contract_and_lead_to_fields(crd: Node) -> None:
    columns = version_of(crd)["additionalPrinterColumns"]
    shown = [column["name"] for column in columns]
    assert shown == ["State", "Stage", "Progress", "Loss", "ETA", "Queue", "Age"]
    for column in columns[:-1]:
        node = schema_of(crd)
        for part in column["jsonPath"].strip(".").split("."):
            node = node["properties"][part]
        assert node["type"] == column["type"]


def test_crd_holds_nothing_that_the_server_drops(crd: Node) -> None:
    assert list(dropped_by_the_server(crd, "crd")) == []


def dropped_by_the_server(value: Any, path: str) -> Iterator[str]:
    """Yield what would make a GitOps tool see a difference for ever."""
    if value in ({}, []) and not path.endswith((".subresources.status", ".default")):
        yield f"{path} is empty"
    if value is None:
        yield f"{path} is null"
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from dropped_by_the_server(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if (key, item) in (("nullable", False), ("priority", 0)):
                yield f"{path}.{key} is what it is without being said"
            if f"{path}.{key}" in ("crd.status", "crd.spec.conversion"):
                yield f"{path}.{key} is the server's"
            yield from dropped_by_the_server(item, f"{path}.{key}")


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        ({"status": {"conditions": []}}, "crd.status is the server's"),
        ({"metadata": {"labels": {}}}, "crd.metadata.labels is empty"),
        ({"spec": {"columns": [{"priority": 0}]}}, "crd.spec.columns[0].priority"),
        ({"spec": {"nullable": False}}, "crd.spec.nullable"),
    ],
)
def test_check_for_dropped_things_sees_them(edit: Node, fault: str) -> None:
    assert any(found.startswith(fault) for found in dropped_by_the_server(edit, "crd"))


ALLOWED = {
    *("description", "type", "format", "default", "enum", "pattern", "required", "items"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength"),
    *("minItems", "maxItems", "maxProperties", "properties", "additionalProperties"),
    *("x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-validations"),
    INT_OR_STRING,
}
TYPES = ("object", "array", "string", "integer", "number", "boolean")


def structural_faults(node: Node, path: str = "") -> Iterator[str]:
    """Yield where `node` breaks the rules of structural schemas, or what we add to them."""
    yield from (f"{path}: {key} is not allowed" for key in sorted(node.keys() - ALLOWED))
    if INT_OR_STRING in node:
        if node[INT_OR_STRING] is not True or "type" in node or "format" in node:
            yield f"{path}: a number or text has no other type"
    elif node.get("type") not in TYPES:
        yield f"{path}: a type is missing"
    if "default" in node and node["default"] is None:
        yield f"{path}: the default is null"
    for bound in ("minimum", "maximum"):
        exclusive = node.get(f"exclusive{bound.capitalize()}", True)
        if exclusive is not True or (
            f"exclusive{bound.capitalize()}" in node and bound not in node
        ):
            yield f"{path}: {bound} is exclusive as in JSON Schema, not as in OpenAPI"
    yield from _object_faults(node, path)
    if node.get("type") == "array":
        yield from _array_faults(node, path)


def _object_faults(node: Node, path: str) -> Iterator[str]:
    children = node.get("properties", {})
    values = node.get("additionalProperties", {"type": "string"})
    if not isinstance(values, dict):
        yield f"{path}: additionalProperties is a boolean"
    elif "additionalProperties" in node:
        if children:
            yield f"{path}: additionalProperties stands beside properties"
        yield from structural_faults(values, f"{path}{{}}")
    if missing := set(node.get("required", ())) - children.keys():
        yield f"{path}: {sorted(missing)} are required and do not exist"
    for name, child in children.items():
        if name in node.get("required", ()) and "default" in child:
            yield f"{path}.{name}: is required and has a default"
        yield from structural_faults(child, f"{path}.{name}")


def _array_faults(node: Node, path: str) -> Iterator[str]:
    kind = node.get("x-kubernetes-list-type")
    keys = node.get("x-kubernetes-list-map-keys", [])
    if kind not in ("atomic", "map"):
        yield f"{path}: the kind of list is missing"
    if (kind == "map") != bool(keys) or not set(keys) <= set(node["items"].get("required", ())):
        yield f"{path}: keys of a list that is a map must be required in its items"
    if "items" not in node:
        yield f"{path}: items is missing"
    else:
        yield from structural_faults(node["items"], f"{path}[]")


def test_schema_is_structural(crd: Node) -> None:
    assert list(structural_faults(schema_of(crd))) == []


@pytest.mark.parametrize(
    ("place", "key", "value", "fault"),
    [
        ("model", "$ref", "#/$defs/ModelSpec", "$ref is not allowed"),
        ("model", "additionalProperties", False, "additionalProperties is a boolean"),
        ("model", "additionalProperties", {"type": "string"}, "stands beside properties"),
        ("model", "title", "Model", "title is not allowed"),
        ("serve", "nullable", False, "nullable is not allowed"),
        ("serve", "default", None, "the default is null"),
        ("serve", "anyOf", [{"type": "object"}, {"type": "null"}], "anyOf is not allowed"),
        ("suspend", "type", ["boolean", "null"], "a type is missing"),
        ("suspend", "const", True, "const is not allowed"),
        ("stages", "uniqueItems", True, "uniqueItems is not allowed"),
        ("stages", "x-kubernetes-list-type", "set", "the kind of list is missing"),
        ("stages", "x-kubernetes-list-map-keys", ["epochs"], "must be required"),
        ("stages", "prefixItems", [], "prefixItems is not allowed"),
        ("suspend", "exclusiveMinimum", 0, "exclusive as in JSON Schema"),
        ("suspend", INT_OR_STRING, True, "a number or text has no other type"),
        ("suspend", INT_OR_STRING, False, "a number or text has no other type"),
    ],
)
def test_structural_check_sees_every_trap(
    crd: Node, place: str, key: str, value: Any, fault: str
) -> None:
    schema = copy.deepcopy(schema_of(crd))
    schema["properties"]["spec"]["properties"][place][key] = value
    assert any(fault in found for found in structural_faults(schema))


def test_metadata_says_nothing_but_its_type(crd: Node) -> None:
    assert schema_of(crd)["properties"]["metadata"] == {"type": "object"}


def test_lists_of_named_things_are_merged_by_name(crd: Node) -> None:
    spec, status = (schema_of(crd)["properties"][part]["properties"] for part in ("spec", "status"))
    assert spec["stages"]["x-kubernetes-list-map-keys"] == ["name"]
    assert status["conditions"]["x-kubernetes-list-map-keys"] == ["type"]
    assert status["stages"]["x-kubernetes-list-map-keys"] == ["name"]
    assert status["tasks"]["x-kubernetes-list-map-keys"] == ["name"]


class Unbounded(ApiModel):
    """A model without maxima."""

    text: str
    """text without a maximum."""
    texts: list[Annotated[str, Field(max_length=8)]]
    """texts without a maximum."""
    labels: dict[str, Annotated[str, Field(max_length=8)]]
    """labels without a maximum."""


class Undescribed(ApiModel):
    """A model whose fields are not described as kubectl explain shows them."""

    batch_size: int
    """Rows in one step."""
    seed: int


class Quantities(ApiModel):
    """A model with the one union that the server knows."""

    size: Annotated[int, Field(ge=0, lt=9)] | Annotated[str, Field(max_length=8, pattern="^[0-9]$")]
    """size in either
    form."""
    rest: Annotated[int, Field(le=9)] | Annotated[str, Field(max_length=8)] | None = None
    """rest in either form, or none."""


class Union(ApiModel):
    """A model with a union."""

    size: int | bool
    """size in either form."""


class ThreeForms(ApiModel):
    """A model with a union of more than the server knows."""

    size: int | Annotated[str, Field(max_length=8)] | float
    """size in any form."""


class LongText(ApiModel):
    """A model with a union whose text has no maximum."""

    size: int | str
    """size in either form."""


class EvenNumber(ApiModel):
    """A model with a union whose number has a bound that the server does not know."""

    size: Annotated[int, Field(multiple_of=2)] | Annotated[str, Field(max_length=8)]
    """size in either form."""


class Pair(ApiModel):
    """A model with a tuple."""

    betas: tuple[float, float]
    """betas of the optimizer."""


class Distinct(ApiModel):
    """A model with a set."""

    tags: set[str]
    """tags of the run."""


class Anything(ApiModel):
    """A model with a map of anything."""

    options: dict[str, Any]
    """options of the run."""


class Section(ApiModel):
    """A section with a default inside."""

    rate: float = 0.5
    """rate of the section."""


class OtherDefault(ApiModel):
    """A model whose section's default differs from that of the section's fields."""

    section: Section = Section(rate=0.25)
    """section of the model."""


def test_missing_maxima_are_listed() -> None:
    assert find_faults(structural_schema(Unbounded)) == [
        "text: maxLength is missing",
        "texts: maxItems is missing",
        "labels: maxProperties is missing",
    ]


def test_descriptions_without_the_name_are_listed() -> None:
    assert find_faults(structural_schema(Undescribed)) == [
        "batchSize: its description must begin with 'batchSize'",
        "seed: its description must begin with 'seed'",
    ]


def test_number_or_text_keeps_the_bounds_of_both() -> None:
    schema = structural_schema(Quantities)
    assert schema["properties"] == {
        "size": {
            "description": "size in either form.",
            INT_OR_STRING: True,
            "minimum": 0,
            "maximum": 9,
            "exclusiveMaximum": True,
            "maxLength": 8,
            "pattern": "^[0-9]$",
        },
        "rest": {
            "description": "rest in either form, or none.",
            INT_OR_STRING: True,
            "maximum": 9,
            "maxLength": 8,
        },
    }
    assert schema["required"] == ["size"]
    assert find_faults(schema) == []


@pytest.mark.parametrize(
    "model",
    [Union, ThreeForms, LongText, EvenNumber, Pair, Distinct, Anything, OtherDefault],
)
def test_what_cannot_be_translated_is_refused(model: type[ApiModel]) -> None:
    with pytest.raises(SchemaError):
        structural_schema(model)


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_accepted_by_the_schema_and_by_the_models(path: Path, server: Any) -> None:
    document = load(path)
    assert server.refusals(document) == []
    assert isinstance(parse_manifest(document), StagedFineTune)


def test_server_fills_in_the_defaults_of_the_models(
    server: Any, manifest: Callable[..., Node]
) -> None:
    document = manifest(SECTIONS_WITH_DEFAULTS)
    parsed = parse_manifest(document)
    assert isinstance(parsed, StagedFineTune)
    of_models = parsed.spec.model_dump(mode="json", exclude_none=True)
    assert server.read(document)["spec"] == of_models


def test_status_is_accepted_by_the_model_and_by_the_schema(
    server: Any, manifest: Callable[..., Node]
) -> None:
    status = load(GOLDEN_STATUS)
    assert StagedFineTuneStatus.model_validate(status).model_dump(mode="json", exclude_none=True)
    assert server.refusals({**manifest(), "status": status}) == []


def test_status_goes_through_the_server_and_back_unchanged(
    server: Any, manifest: Callable[..., Node]
) -> None:
    status = StagedFineTuneStatus.model_validate(load(GOLDEN_STATUS))
    written = status.model_dump(mode="json")
    stored = server.read({**manifest(), "status": written})["status"]
    assert StagedFineTuneStatus.model_validate(stored) == status


def test_golden_status_has_every_field(crd: Node) -> None:
    absent = set(fields_of(schema_of(crd)["properties"]["status"], "status")) - set(
        fields_in(load(GOLDEN_STATUS), "status")
    )
    # The distance to the base is measured for the tuned model only.
    assert absent == {"status.evaluation.before.klToBase"}


def fields_of(node: Node, path: str) -> Iterator[str]:
    for name, child in node.get("properties", {}).items():
        yield f"{path}.{name}"
        yield from fields_of(child.get("items", child), f"{path}.{name}")


def fields_in(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from fields_in(item, path)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield f"{path}.{name}"
            yield from fields_in(item, f"{path}.{name}")


def test_status_of_a_newer_operator_is_not_refused(
    server: Any, manifest: Callable[..., Node]
) -> None:
    condition = {"type": "Served", "status": "True", "reason": "ServerIsUp"}
    condition["lastTransitionTime"] = "2026-01-01T00:00:00Z"
    status = {"state": "Serving", "conditions": [condition]}
    assert server.refusals({**manifest(), "status": status}) == []
