"""What the tests of the API share: a manifest to edit and an API server's reading of it."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import celpy
import celpy.adapter
import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from manifest_cases import edited
from stagetune_api.schema import CRD_FILE
from stagetune_api.structural import INT_OR_STRING, Node


class ApiServer:
    """Reads manifests as kube-apiserver does, with strict field validation as kubectl asks for.

    In the server's order: nulls, defaults, types and ranges, lists' keys, rules. Written after
    k8s.io/apiextensions-apiserver 0.37.
    """

    def __init__(self, crd: Node) -> None:
        self.schema: Node = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        self._types = Draft202012Validator(to_json_schema(self.schema))
        self._programs = {
            entry["rule"]: _compile(entry["rule"])
            for node, _ in _walk(self.schema, None)
            for entry in node.get("x-kubernetes-validations", ())
        }

    def refusals(self, document: Node, old: Node | None = None) -> list[str]:
        """Return why the server refuses to create `document`, or to replace `old` by it."""
        document = self.read(document)
        errors = self._types.iter_errors(document)
        wrong = [f"{error.json_path}: {error.message}" for error in errors]
        wrong = wrong or list(_repeated_keys(self.schema, document))
        if wrong:
            return wrong
        scope = {} if old is None else {"oldSelf": celpy.adapter.json_to_cel(self.read(old))}
        return [
            entry["message"]
            for node, value in _walk(self.schema, document)
            for entry in node.get("x-kubernetes-validations", ())
            if value is not None and not self._holds(entry["rule"], value, scope)
        ]

    def read(self, document: Node) -> Node:
        """Return `document` as the server stores it: nulls taken away, defaults filled in."""
        return _read(copy.deepcopy(document), self.schema)

    def _holds(self, rule: str, value: Any, scope: Mapping[str, Any]) -> bool:
        if "oldSelf" in rule and "oldSelf" not in scope:
            return True
        return bool(
            self._programs[rule].evaluate({"self": celpy.adapter.json_to_cel(value), **scope})
        )


def to_json_schema(node: Node) -> Node:
    """Return a structural schema as JSON Schema that also refuses unknown fields."""
    result = {key: value for key, value in node.items() if not key.startswith("x-kubernetes")}
    if node.get(INT_OR_STRING):
        result["type"] = ["integer", "string"]
    for bound in ("minimum", "maximum"):
        if result.pop(f"exclusive{bound.capitalize()}", False):
            result[f"exclusive{bound.capitalize()}"] = result.pop(bound)
    if "pattern" in result:
        # In Go's expressions $ is the end of the text; in Python's also before a last line break.
        result["pattern"] = result["pattern"].replace("$", r"\Z")
    if "properties" in result:
        children = result["properties"].items()
        result["properties"] = {name: to_json_schema(child) for name, child in children}
        result["additionalProperties"] = False
    elif "additionalProperties" in result:
        result["additionalProperties"] = to_json_schema(result["additionalProperties"])
    if "items" in result:
        result["items"] = to_json_schema(result["items"])
    return result


def _compile(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def _walk(node: Node, value: Any) -> Iterator[tuple[Node, Any]]:
    """Yield every node of the schema with every value that stands there, None where none does."""
    yield node, value
    for name, child in node.get("properties", {}).items():
        yield from _walk(child, value.get(name) if isinstance(value, dict) else None)
    if "items" in node:
        for item in value if isinstance(value, list) and value else [None]:
            yield from _walk(node["items"], item)


def _repeated_keys(schema: Node, document: Node) -> Iterator[str]:
    for node, items in _walk(schema, document):
        for key in node.get("x-kubernetes-list-map-keys", ()):
            found = [item[key] for item in items or ()]
            if len(set(found)) < len(found):
                yield f"{key} is used twice in {found}"


def _read(value: Any, node: Node) -> Any:
    if node.get("type") == "number" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list) and "items" in node:
        return [_read(item, node["items"]) for item in value]
    if not isinstance(value, dict):
        return value
    if "additionalProperties" in node:
        values = node["additionalProperties"]
        return {key: _read(item, values) for key, item in value.items() if item is not None}
    known = node.get("properties", {})
    present = {key: item for key, item in value.items() if item is not None or key not in known}
    for name, child in known.items():
        if "default" in child and name not in present:
            present[name] = copy.deepcopy(child["default"])
    return {key: _read(item, known[key]) if key in known else item for key, item in present.items()}


@pytest.fixture(scope="session")
def crd() -> Node:
    """The CustomResourceDefinition as it stands in the file."""
    loaded: Node = YAML(typ="safe").load(CRD_FILE)
    return loaded


@pytest.fixture(scope="session")
def server(crd: Node) -> ApiServer:
    """An API server that knows the CustomResourceDefinition."""
    return ApiServer(crd)


@pytest.fixture(scope="session")
def manifest() -> Callable[..., Node]:
    """Return a function that gives a sound manifest with edits by path; None takes a field away."""
    return edited
