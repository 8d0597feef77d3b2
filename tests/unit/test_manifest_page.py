"""docs/manifest.md: its tables name every field of the manifest with its default, and no other."""

import re
import types
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from stagetune_api.spec import StagedFineTuneSpec

PAGE = Path(__file__).resolve().parents[2] / "docs" / "manifest.md"
NOT_YET = {"serve.replicas"}
"""Fields that have a row in the table of what no program does yet, and no other."""


def fields_of(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every field that holds no others, by its path: `method.lora.rank`, `stages[].name`."""
    for field in model.model_fields.values():
        name = f"{path}.{field.alias}" if path else str(field.alias)
        inner, is_list = model_in(field.annotation)
        if inner is None:
            yield name, field
        else:
            yield from fields_of(inner, f"{name}[]" if is_list else name)


def model_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Return the model that a type holds, if any, and whether it holds a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    if get_origin(annotation) in (Union, types.UnionType, list):
        for part in get_args(annotation):
            found, is_list = model_in(get_args(part)[0] if hasattr(part, "__metadata__") else part)
            if found is not None:
                return found, is_list or get_origin(annotation) is list
    return None, False


FIELDS = dict(fields_of(StagedFineTuneSpec))


def rows() -> Iterator[tuple[str, str]]:
    """Yield the path of each field in the tables, and what the table says of its default."""
    section = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            section = line.removeprefix("## ") if line.startswith("## spec.") else ""
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not section or not line.startswith("| `"):
            continue
        named = list(names_in(cells[0]))
        defaults = cells[1].split(", ") if cells[1].count(",") == len(named) - 1 else [cells[1]]
        for name, default in zip(named, defaults * (len(named) // len(defaults)), strict=True):
            yield f"{prefix(section)}{name}", default


def prefix(section: str) -> str:
    if section == "spec.suspend and spec.retry":
        return ""
    name = section.removeprefix("spec.")
    return f"{name}[]." if name == "stages" else f"{name}."


def names_in(cell: str) -> Iterator[str]:
    """Yield the fields of a first cell: `` `a.b`, `.c` `` are a.b and a.c, `a.{b,c}` too."""
    parent = ""
    for word in re.findall(r"`([^`]+)`", cell):
        name = f"{parent}{word}" if word.startswith(".") else word
        parent = name.rpartition(".")[0]
        start, brace, rest = name.partition("{")
        for end in rest.rstrip("}").split(","):
            yield f"{start}{end}" if brace else name


def test_tables_name_every_field_and_no_other() -> None:
    named = [name for name, _ in rows()]
    assert sorted(named) == sorted(set(named))
    assert set(FIELDS) - set(named) == NOT_YET
    assert set(named) - set(FIELDS) == set()


@pytest.mark.parametrize(("name", "shown"), list(rows()))
def test_tables_show_the_defaults(name: str, shown: str) -> None:
    field = FIELDS[name]
    default = field.get_default(call_default_factory=True)
    if field.is_required():
        # A section that may be left out has fields that are required inside it.
        assert shown in ("required", "–"), name
    elif default is None or default == {}:
        assert not re.match(r"^`?\d|^`|^true|^false|^required", shown), name
    elif isinstance(default, bool):
        assert shown == str(default).lower(), name
    elif isinstance(default, Enum):
        assert shown == f"`{default.value}`", name
    else:
        assert float(shown) == default, name
