"""From a parsed YAML document to a manifest, or to everything that is wrong with it."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, to_json

from stagetune_api.problems import Problem, ProblemReason, format_path
from stagetune_api.spec import StagedFineTune
from stagetune_api.spec_checks import check_spec

_RESOURCES = ("spec", "runtime", "resources")
"""Where the manifest has quantities: below `limits` and `requests`, by name."""


def parse_manifest(document: Mapping[str, Any]) -> StagedFineTune | list[Problem]:
    """Return the manifest, or every problem that it has; `status` of a live object is left out."""
    body = {key: value for key, value in document.items() if key != "status"}
    try:
        manifest = _parse_strictly(body)
    except ValidationError as error:
        errors = _with_whole_quantities(error.errors())
        problems = [_schema_problem(details) for details in errors]
        return [*problems, *_problems_beside(body, errors, problems)]
    return check_spec(manifest.spec) or manifest


def _parse_strictly(body: Mapping[str, Any]) -> StagedFineTune:
    """Return the manifest with the names and the types that the API server takes.

    pydantic reads Python values leniently ("16" as a number, 1 as true) and has no way to be strict
    about them and yet take an enum's value for the enum; about JSON it has.
    """
    text = to_json(body, inf_nan_mode="constants", fallback=str)
    return StagedFineTune.model_validate_json(text, strict=True, by_name=False)


def _with_whole_quantities(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Return `errors` with one for each quantity instead of one for each form that it has not."""
    joined: dict[tuple[str | int, ...], ErrorDetails] = {}
    for details in errors:
        place = details["loc"]
        if place[:3] == _RESOURCES and place[5:] in (("constrained-int",), ("constrained-str",)):
            details = ErrorDetails(
                type="quantity",
                loc=place[:5],
                msg="should be an amount as Kubernetes writes it: 1, '500m', '48Gi'",
                input=details["input"],
            )
        joined.setdefault(details["loc"], details)
    return list(joined.values())


def _problems_beside(
    body: Mapping[str, Any], errors: Sequence[ErrorDetails], known: Sequence[Problem]
) -> list[Problem]:
    """Return what is wrong apart from values of a wrong type, so that one round shows everything.

    The refused values are taken out and the rest is checked. What that check says of the places
    where something was taken out is left away: it may be true of the rest only.
    """
    rest = copy.deepcopy(dict(body))
    for details in errors:
        _remove(rest, [part for part in details["loc"] if part != "[key]"])
    try:
        manifest = _parse_strictly(rest)
    except ValidationError:
        return []
    touched = {
        problem.path.rpartition(".")[0]
        for problem in known
        if problem.reason is not ProblemReason.UNKNOWN_FIELD
    }
    return [
        problem
        for problem in check_spec(manifest.spec)
        if problem.path not in touched and problem.path.rpartition(".")[0] not in touched
    ]


def _remove(value: Any, location: Sequence[str | int]) -> None:
    """Take what stands at `location` out of `value`, a tree of dicts and lists."""
    for part in location[:-1]:
        if not isinstance(value, (dict, list)):
            return
        try:
            value = value[part]  # type: ignore[index]  # the parts come from the tree itself
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(value, dict):
        value.pop(location[-1], None)


def _schema_problem(details: ErrorDetails) -> Problem:
    """Return pydantic's error in our words: the path, the value, and what is expected."""
    path = format_path([part for part in details["loc"] if not _is_model_tag(part)])
    match details["type"]:
        case "extra_forbidden":
            return Problem(
                path=path,
                reason=ProblemReason.UNKNOWN_FIELD,
                message="there is no such field; check its spelling and its place",
            )
        case "missing":
            return Problem(
                path=path, reason=ProblemReason.REQUIRED, message="this field is required; add it"
            )
        case "string_pattern_mismatch" if path.endswith("source"):
            message = (
                f"{_shown(details['input'])} is not a source; write hf://org/name, "
                "ms://org/name, pvc://claim/path or file://path"
            )
            return Problem(path=path, reason=ProblemReason.INVALID, message=message)
        case _:
            expected = re.sub(r"^(Value error, |Input |String )", "", details["msg"])
            message = f"{_shown(details['input'])} is refused: it {expected}"
            return Problem(path=path, reason=ProblemReason.INVALID, message=message)


def _is_model_tag(part: str | int) -> bool:
    """Whether pydantic put `part` into a path to name a type rather than a place."""
    return isinstance(part, str) and ("[" in part or "(" in part)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
