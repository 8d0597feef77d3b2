"""Reading a manifest as kubectl does, with the lines of what is wrong in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from stagetune_api.names import KIND
from stagetune_api.problems import InvalidManifestError, Problem, ProblemReason
from stagetune_api.spec import StagedFineTune
from stagetune_api.validation import parse_manifest


@dataclass(frozen=True, kw_only=True)
class ManifestFile:
    """A manifest and where it was read."""

    path: Path
    """The YAML file."""
    manifest: StagedFineTune
    """What it says."""
    positions: Any = field(default=None, repr=False, compare=False)
    """The same document as ruamel.yaml reads it to keep its lines; None where it was no text."""

    @property
    def directory(self) -> Path:
        """The folder that relative file:// sources count from."""
        return self.path.resolve().parent

    def with_lines(self, problems: Sequence[Problem]) -> list[Problem]:
        """Return `problems` with the lines of the fields that they are about."""
        return [_with_line(problem, self.positions) for problem in problems]


def read_manifest_file(path: Path) -> ManifestFile:
    """Return the manifest in the YAML file at `path`; raise InvalidManifestError with all problems.

    YAML 1.2: `1e-4` is a number, as it is for kubectl. Of several documents the one of our kind
    counts.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, f"cannot be read: {error}", ProblemReason.NOT_FOUND) from None
    try:
        documents = list(YAML(typ="safe", pure=True).load_all(text))
        positions = list(YAML(typ="rt").load_all(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise _unreadable(path, f"is not YAML{where}: {error.problem}") from None
    found = [
        (document, position)
        for document, position in zip(documents, positions, strict=True)
        if isinstance(document, Mapping) and document.get("kind") == KIND
    ]
    if len(found) != 1:
        raise _unreadable(path, f"holds {len(found)} documents of kind {KIND}; one is needed")
    document, position = found[0]
    result = parse_manifest(document)
    if isinstance(result, list):
        raise InvalidManifestError([_with_line(problem, position) for problem in result])
    return ManifestFile(path=path, manifest=result, positions=position)


def _unreadable(
    path: Path, message: str, reason: ProblemReason = ProblemReason.INVALID
) -> InvalidManifestError:
    return InvalidManifestError([Problem(path=str(path), reason=reason, message=message)])


def _with_line(problem: Problem, root: Any) -> Problem:
    """Return `problem` with the line of its field, or of the nearest part above it."""
    line = None
    node = root
    for part in problem.path.replace("[", ".[").split("."):
        key: str | int = int(part[1:-1]) if part.startswith("[") else part
        try:
            place = node.lc.item(key) if isinstance(key, int) else node.lc.key(key)
            line, node = place[0] + 1, node[key]
        except (KeyError, IndexError, TypeError, AttributeError):
            break
    if line is None:
        return problem
    return problem.model_copy(update={"path": f"{problem.path} (line {line})"})
