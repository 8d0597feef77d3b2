"""What a process says while it works, and who is told: each line goes to every sink."""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stagetune_api.files import write_file_atomically
from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.report import StageReport
from stagetune_api.stage import Task


class ProgressSink:
    """Somebody who is told every line of progress; this one does nothing with it.

    A sink that is there for onlookers must not raise: it would end the task.
    """

    def write(self, progress: Progress) -> None:
        """Take over a line."""

    def forget_after(self, step: int, validated_step: int) -> None:
        """Drop lines beyond `step`, which a killed attempt wrote and this one will write again.

        Of validations those beyond `validated_step`: a checkpoint is often written before the one
        of its own step.
        """

    def close(self, report: StageReport) -> None:
        """Take notice of how the task ended; nothing follows."""


class StandardOutput(ProgressSink):
    """Prints each line as JSON, for whoever started the process."""

    def write(self, progress: Progress) -> None:
        """Print a line, if anybody still reads: a gone reader must not keep a stage from saving."""
        try:
            sys.stdout.write(_json_of(progress))
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class HistoryFile(ProgressSink):
    """The file `metrics.jsonl` of a stage: each step, validation and checkpoint once."""

    def __init__(self, path: Path, *, before_write: Callable[[], None]) -> None:
        """`before_write` may raise to forbid a line: two attempts must not mix theirs."""
        self._path = path
        self._before_write = before_write

    def write(self, progress: Progress) -> None:
        """Append a line of numbers; raises OSError as the file system does."""
        if progress.kind is ProgressKind.MESSAGE:
            return
        self._before_write()
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_json_of(progress))

    def forget_after(self, step: int, validated_step: int) -> None:
        """Drop what will be written again."""
        self._before_write()
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
            # The last line of a killed process may be cut off anywhere.
            with contextlib.suppress(ValidationError):
                progress = Progress.model_validate_json(line)
                last = step
                if progress.kind is ProgressKind.METERS:
                    # They are no part of a checkpoint: those of this step will be read again.
                    last = step - 1
                elif progress.kind is ProgressKind.VALIDATION:
                    last = validated_step
                if (progress.step or 0) <= last:
                    kept.append(line + "\n")
        write_file_atomically(self._path, "".join(kept))


class ProgressLog:
    """Makes the progress lines of one attempt at a task and hands each to every sink, in order."""

    def __init__(
        self,
        *,
        task: Task,
        name: str,
        attempt: int,
        sinks: Sequence[ProgressSink] = (StandardOutput(),),
    ) -> None:
        self._task = task
        self._name = name
        self._attempt = attempt
        self._sinks = tuple(sinks)

    def message(self, text: str, **values: Any) -> None:
        """Say what is going on, in words; `values` are fields of `Progress`."""
        self.write(ProgressKind.MESSAGE, message=text, **values)

    def write(self, kind: ProgressKind, **values: Any) -> None:
        """Write a line of numbers; `values` are fields of `Progress`."""
        progress = Progress(
            kind=kind,
            task=self._task,
            name=self._name,
            attempt=self._attempt,
            time=rfc3339(datetime.now(UTC)),
            **values,
        )
        for sink in self._sinks:
            sink.write(progress)

    def forget_after(self, step: int, validated_step: int) -> None:
        """Drop lines of a killed attempt that this one will write again."""
        for sink in self._sinks:
            sink.forget_after(step, validated_step)

    def close(self, report: StageReport) -> None:
        """Tell every sink how the task ended."""
        for sink in self._sinks:
            sink.close(report)


def rfc3339(time: datetime) -> str:
    """Return a time in UTC as RFC 3339 with milliseconds."""
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _json_of(progress: Progress) -> str:
    return progress.model_dump_json(exclude_none=True) + "\n"
