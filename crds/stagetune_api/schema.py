"""The models as a CustomResourceDefinition: `python -m stagetune_api.schema` writes it to crds/.

`structural` translates the models and `rules` holds what spans fields; here both are joined with
what only Kubernetes knows: names, columns, kinds of lists. Nothing is written that the server would
drop or spell out itself, for a GitOps tool would see that as a difference for ever.
"""

import argparse
import difflib
import inspect
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stagetune_api import names
from stagetune_api.rule import Rule
from stagetune_api.rules import RULES
from stagetune_api.spec import StagedFineTune, StagedFineTuneSpec
from stagetune_api.status import StagedFineTuneStatus
from stagetune_api.structural import Node, SchemaError, structural_schema

CRD_FILE = Path(__file__).resolve().parents[1] / f"{names.GROUP}_{names.PLURAL}.yaml"
HEADER = """\
# Generated from the models in stagetune_api and never edited; `make crds` writes it anew.
"""
LIST_MAP_KEYS = {
    "spec.stages": "name",
    "status.conditions": "type",
    "status.stages": "name",
    "status.tasks": "name",
}
"""Lists whose items have a name; every other list is replaced as a whole by who applies it."""
STATUS_WORD_MAX_LENGTH = 64

# What Kubernetes itself keeps at the top of every object.
_OBJECT_FIELDS = ("apiVersion", "kind", "metadata")


def build_crd() -> Node:
    """Return the CustomResourceDefinition as it is written to the file."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": names.SINGULAR,
                "shortNames": [names.SHORT_NAME],
                "categories": [names.CATEGORY],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": names.VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": _columns(),
                    "schema": {"openAPIV3Schema": build_schema()},
                }
            ],
        },
    }


def _columns() -> list[Node]:
    shown = {
        "State": ".status.state",
        "Stage": ".status.stage",
        "Progress": ".status.progress",
        "Loss": ".status.loss",
        "ETA": ".status.eta",
    }
    created = ".metadata.creationTimestamp"
    return [
        *({"name": name, "type": "string", "jsonPath": path} for name, path in shown.items()),
        # Only with `-o wide`.
        {"name": "Queue", "type": "string", "jsonPath": ".spec.runtime.queueName", "priority": 1},
        {"name": "Age", "type": "date", "jsonPath": created},
    ]


def build_schema() -> Node:
    """Return the structural schema of the whole object; raise SchemaError with every fault."""
    described = StagedFineTune.model_fields
    properties: Node = {
        "apiVersion": {"description": described["api_version"].description, "type": "string"},
        "kind": {"description": described["kind"].description, "type": "string"},
        # The server knows the metadata and allows no words about it here, not even a description.
        "metadata": {"type": "object"},
        "spec": {
            **structural_schema(StagedFineTuneSpec),
            "description": described["spec"].description,
        },
        "status": {
            **_open(structural_schema(StagedFineTuneStatus)),
            "description": "status is the run as it stands, written by Stagetune alone.",
        },
    }
    root: Node = {
        "description": inspect.getdoc(StagedFineTune),
        "type": "object",
        "properties": properties,
        "required": ["spec"],
    }
    _add_what_kubernetes_knows(root)
    if faults := find_faults(root):
        raise SchemaError(faults)
    return root


def _open(node: Node) -> Node:
    """Return `node` for the status, which programs write: without defaults and without enums.

    A default would state what nobody has reported. Enums would make the server refuse the whole
    status of an operator that is newer than its CRD, and Helm never updates a CRD.
    """
    if "enum" in node:
        node = {**node, "maxLength": STATUS_WORD_MAX_LENGTH}
    node = {key: value for key, value in node.items() if key not in ("default", "enum")}
    if "properties" in node:
        node["properties"] = {name: _open(child) for name, child in node["properties"].items()}
    if "items" in node:
        node["items"] = _open(node["items"])
    return node


def _walk(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """Yield every node with its path, such as `spec.stages[].layers`; a map's values have `{}`."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from _walk(child, f"{path}.{name}" if path else name)
    if "items" in node:
        yield from _walk(node["items"], f"{path}[]")
    if "additionalProperties" in node:
        yield from _walk(node["additionalProperties"], f"{path}{{}}")


def _add_what_kubernetes_knows(root: Node) -> None:
    nodes = dict(_walk(root))
    for path, node in nodes.items():
        if path in LIST_MAP_KEYS:
            node["x-kubernetes-list-type"] = "map"
            node["x-kubernetes-list-map-keys"] = [LIST_MAP_KEYS[path]]
        elif node.get("type") == "array":
            node["x-kubernetes-list-type"] = "atomic"
    for rule in RULES:
        nodes[rule.path].setdefault("x-kubernetes-validations", []).append(_rule_entry(rule))


def _rule_entry(rule: Rule) -> Node:
    entry = {"rule": rule.rule, "message": rule.message}
    return {**entry, "fieldPath": rule.field_path} if rule.field_path else entry


def find_faults(root: Node) -> list[str]:
    """Return where a description does not begin with the field's name or a maximum is missing.

    The maxima are what the server computes the cost of the rules from.
    """
    faults = []
    for path, node in _walk(root):
        if path in ("", *_OBJECT_FIELDS):
            continue
        name = path.rpartition(".")[2]
        words = node.get("description", "").replace(":", " ").replace(",", " ").split()
        if name[-1] not in "]}" and words[:1] != [name]:
            faults.append(f"{path}: its description must begin with {name!r}")
        faults += [f"{path}: {maximum} is missing" for maximum in _missing_maxima(node)]
    return faults


def _missing_maxima(node: Node) -> list[str]:
    needed = {
        "maxLength": node.get("type") == "string" and "enum" not in node,
        "maxItems": node.get("type") == "array",
        "maxProperties": "additionalProperties" in node,
    }
    return [maximum for maximum, is_needed in needed.items() if is_needed and maximum not in node]


def render(crd: Mapping[str, Any]) -> str:
    """Return `crd` as the text of its file."""
    yaml = YAML()
    yaml.width = 100
    yaml.indent(mapping=2, sequence=4, offset=2)
    text = io.StringIO()
    yaml.dump(crd, text)
    # ruamel leaves a blank at the end of a folded line; to a YAML reader it means nothing.
    return HEADER + "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def main(arguments: Sequence[str] | None = None, *, file: Path = CRD_FILE) -> int:
    """Write `file`, or with --check compare it; return the exit code."""
    parser = argparse.ArgumentParser(prog="stagetune_api.schema", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    wanted = render(build_crd())
    if not parser.parse_args(arguments).check:
        file.write_text(wanted, encoding="utf-8")
        return 0
    found = file.read_text(encoding="utf-8") if file.exists() else ""
    if found == wanted:
        return 0
    diff = difflib.unified_diff(found.splitlines(), wanted.splitlines(), "found", "wanted", n=1)
    hint = "\n".join(list(diff)[:20])
    sys.stderr.write(f"{file} is not what the models say; run `make crds`\n{hint}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
