"""From a pydantic model to a structural schema, the API server's dialect of OpenAPI v3.

pydantic gives JSON Schema, with references, unions and nulls; of those the server refuses one half
and silently drops the other. Whatever cannot be translated faithfully is an error here.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

Node = dict[str, Any]

INT_OR_STRING = "x-kubernetes-int-or-string"
"""The one union that the server knows; it stands in the place of a type."""

_COPIED = (
    *("description", "type", "format", "enum", "minLength", "maxLength", "pattern"),
    *("minItems", "maxItems", "maxProperties", INT_OR_STRING),
)
# `title` repeats the name. `propertyNames` has no place in a structural schema; `rules` has it.
_DROPPED = ("title", "propertyNames")
_TRANSLATED = (
    *("const", "default", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("properties", "required", "items", "additionalProperties"),
)


class SchemaError(Exception):
    """The models say something that a CustomResourceDefinition cannot; lists every place."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))


def structural_schema(model: type[BaseModel]) -> Node:
    """Return the structural schema of `model`, every reference replaced by what it names."""
    schema = model.model_json_schema()
    return _translate(schema, schema.get("$defs", {}))


def _translate(raw: Node, definitions: Node) -> Node:
    raw = _resolve(raw, definitions)
    if unknown := raw.keys() - {*_COPIED, *_DROPPED, *_TRANSLATED, "$defs"}:
        raise SchemaError([f"{raw.get('description')!r}: {sorted(unknown)} cannot be translated"])
    node: Node = {key: raw[key] for key in _COPIED if key in raw}
    if "description" in node:
        node["description"] = " ".join(node["description"].split())
    if node.get("type") == "integer":
        node["format"] = "int64"
    if "const" in raw:
        node["enum"] = [raw["const"]]
    node |= _bounds(raw)
    if "properties" in raw:
        node["properties"] = {
            name: _translate(child, definitions) for name, child in raw["properties"].items()
        }
        required = [
            name for name in raw.get("required", ()) if not _is_optional(raw["properties"][name])
        ]
        node |= {"required": required} if required else {}
    elif values := raw.get("additionalProperties"):
        if values is True:
            raise SchemaError([f"{raw.get('description')!r}: a map needs a type for its values"])
        node["additionalProperties"] = _translate(values, definitions)
    if "items" in raw:
        node["items"] = _translate(raw["items"], definitions)
    return _with_default(node, raw.get("default"))


def _resolve(raw: Node, definitions: Node) -> Node:
    """Return `raw` with its reference inlined and, for `X | None`, as X; what stands beside wins.

    None needs no `nullable`: the server takes a null away before it looks at the value.
    """
    if "anyOf" in raw:
        options = [option for option in raw["anyOf"] if option != {"type": "null"}]
        if sorted(option.get("type", "") for option in options) == ["integer", "string"]:
            options = [_int_or_string(options, raw)]
        if len(options) != 1:
            raise SchemaError([f"{raw.get('description')!r}: a union cannot be translated"])
        beside = {key: value for key, value in raw.items() if key != "anyOf"}
        return _resolve({**options[0], **beside}, definitions)
    if "$ref" in raw:
        target = definitions[raw["$ref"].rpartition("/")[2]]
        beside = {key: value for key, value in raw.items() if key != "$ref"}
        return _resolve({**target, **beside}, definitions)
    return raw


def _int_or_string(options: Sequence[Node], raw: Node) -> Node:
    """Return both options as one: bounds count for numbers, length and pattern for texts.

    The text needs a maximum here, for by its missing type nothing would see later that it has none.
    """
    number, text = sorted(options, key=lambda option: str(option["type"]))
    bounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    unknown = (number.keys() - bounds) | (text.keys() - {"minLength", "maxLength", "pattern"})
    if unknown - {"type"} or "maxLength" not in text:
        raise SchemaError([f"{raw.get('description')!r}: a union cannot be translated"])
    return {key: value for key, value in (number | text).items() if key != "type"} | {
        INT_OR_STRING: True
    }


def _is_optional(raw: Node) -> bool:
    return {"type": "null"} in raw.get("anyOf", ())


def _bounds(raw: Node) -> Node:
    """Return minimum and maximum; that a bound is exclusive is a boolean in OpenAPI v3."""
    bounds: Node = {}
    for bound in ("minimum", "maximum"):
        exclusive = f"exclusive{bound.capitalize()}"
        if exclusive in raw:
            bounds |= {bound: _number(raw[exclusive]), exclusive: True}
        elif bound in raw:
            bounds[bound] = _number(raw[bound])
    return bounds


def _number(value: Any) -> Any:
    """Return 1 for 1.0, as the server stores it; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _with_default(node: Node, default: Any) -> Node:
    """Return `node` with its default first among the details; None stands for "left out".

    A section that may be left out as a whole gets `{}`: the server fills defaults from the top
    down, so it then fills the section from the defaults of its fields, and these stand in the file
    only once. Without it those fields would stay unset, for the server does not enter what is not
    there.
    """
    if default is None:
        return node
    if node.get("type") == "object":
        given = {key: value for key, value in default.items() if value is not None}
        if given != defaults_within(node):
            raise SchemaError([f"{node['description']!r}: default is not that of its fields"])
        default = {}
    head: Node = {key: node.pop(key) for key in ("description", "type") if key in node}
    return {**head, "default": _number(default), **node}


def defaults_within(node: Node) -> Node:
    """Return what the server makes of `{}` for `node`."""
    return {
        name: defaults_within(child) if child.get("type") == "object" else child["default"]
        for name, child in node.get("properties", {}).items()
        if "default" in child
    }
