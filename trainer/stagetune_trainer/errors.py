"""How a trainer process says why it cannot go on; `__main__` turns each into an exit code."""

from collections.abc import Sequence

from stagetune_api.problems import Problem, ProblemReason


class UserError(Exception):
    """The run's author has to change something; no retry helps. Carries every problem found."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        if not problems:
            raise ValueError("a user error needs at least one problem")
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))

    @classmethod
    def at(
        cls, path: str, message: str, reason: ProblemReason = ProblemReason.INVALID
    ) -> "UserError":
        """Return the error of one problem at the manifest's `path`."""
        return cls([Problem(path=path, reason=reason, message=message)])


class FencedError(Exception):
    """A newer attempt at the same task has started, so this one may not publish."""


class DivergedError(Exception):
    """Loss or gradients are no longer finite; nothing of this step may be kept."""


class InterruptedRunError(Exception):
    """The process was asked to stop, has saved, and leaves; the same command goes on from there."""
