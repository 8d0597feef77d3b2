"""What is wrong with a manifest, said so that its author can mend it.

Validators return every problem they find; nothing is raised at the first one and nothing is created
while the list is not empty.
"""

from collections.abc import Sequence
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

PathPart = str | int


class ProblemReason(StrEnum):
    """Why a value is refused."""

    INVALID = "Invalid"
    REQUIRED = "Required"
    UNKNOWN_FIELD = "UnknownField"
    CONFLICT = "Conflict"
    NOT_YET_SUPPORTED = "NotYetSupported"
    DOES_NOT_FIT = "DoesNotFit"
    NOT_FOUND = "NotFound"


class Problem(BaseModel):
    """One mistake: where it stands, what it is, and what to do about it."""

    model_config = ConfigDict(frozen=True)

    path: str
    """Where the value stands, as a YAML path such as `spec.schedule.layersPerStage`."""
    reason: ProblemReason
    message: str
    """The value, what is wrong with it, and the cure."""

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class InvalidManifestError(Exception):
    """The manifest cannot be run as it is written; carries every problem found."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        if not problems:
            raise ValueError("an invalid manifest needs at least one problem")
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


def format_path(parts: Sequence[PathPart]) -> str:
    """Return `parts` as a YAML path: names joined by dots, list positions in brackets."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if path else part
    return path


def conflict(path: str, message: str) -> Problem:
    """Return the problem that what stands at `path` does not go with something else."""
    return Problem(path=path, reason=ProblemReason.CONFLICT, message=message)


def not_yet(path: str, what: str, cure: str) -> Problem:
    """Return the problem that the API names `what` and no program does it yet."""
    return Problem(
        path=path,
        reason=ProblemReason.NOT_YET_SUPPORTED,
        message=f"{what} are not yet supported in this version; {cure}",
    )
