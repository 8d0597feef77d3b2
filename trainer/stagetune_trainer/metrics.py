"""What a process says while it works: JSON lines on standard output and in `metrics.jsonl`."""

import contextlib
import os
import resource
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from stagetune_api.files import write_file_atomically
from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.stage import Task

_BYTES_PER_MAXRSS = 1024  # Linux reports ru_maxrss in KiB


class ProgressLog:
    """Writes progress lines of one task; messages go to standard output alone."""

    def __init__(self, *, task: Task, name: str, attempt: int, history: Path | None = None) -> None:
        """`history` is the file that steps, validations and checkpoints are appended to."""
        self._task = task
        self._name = name
        self._attempt = attempt
        self._history = history

    def message(self, text: str) -> None:
        """Say what is going on, in words."""
        _print(self._line(ProgressKind.MESSAGE, message=text))

    def write(self, kind: ProgressKind, **values: Any) -> None:
        """Write a line of numbers; `values` are fields of `Progress`."""
        line = self._line(kind, **values)
        if self._history is not None:
            with self._history.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        _print(line)

    def forget_after(self, step: int) -> None:
        """Drop lines beyond `step`, which a killed attempt wrote and this one will write again."""
        if self._history is None or not self._history.exists():
            return
        kept = []
        for line in self._history.read_text(encoding="utf-8", errors="replace").splitlines():
            # The last line of a killed process may be cut off anywhere.
            with contextlib.suppress(ValidationError):
                if (Progress.model_validate_json(line).step or 0) <= step:
                    kept.append(line + "\n")
        write_file_atomically(self._history, "".join(kept))

    def _line(self, kind: ProgressKind, **values: Any) -> str:
        progress = Progress(
            kind=kind,
            task=self._task,
            name=self._name,
            attempt=self._attempt,
            time=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            **values,
        )
        return progress.model_dump_json(exclude_none=True)


def _print(line: str) -> None:
    """Print a line, if anybody still reads: a gone reader must not keep a stage from saving."""
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _BYTES_PER_MAXRSS
