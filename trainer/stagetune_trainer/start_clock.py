"""When the process began, and what it spent before its first step."""

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.report import Timings
from stagetune_trainer.metrics import ProgressSink, rfc3339

_START_TIME_FIELD = 19
"""Of /proc/self/stat behind the command's name: see proc(5), field 22."""


def seconds_since_process_start() -> float:
    """Return how long ago the kernel started this process; 0 where it does not say.

    The interpreter's own start lies before any clock that a program can start itself.
    """
    try:
        stat = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
        ticks = int(stat.rpartition(")")[2].split()[_START_TIME_FIELD])
    except (OSError, ValueError, IndexError):
        return 0.0
    started = ticks / os.sysconf("SC_CLK_TCK")
    return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)


class StartClock(ProgressSink):
    """Marks how far a process has come; a sink, for the first step is a line of progress."""

    def __init__(self, age_seconds: float = 0.0) -> None:
        """`age_seconds` is how long ago the process began."""
        self.started = time.monotonic() - age_seconds
        """Monotonic time at which the process began."""
        self._start_time = rfc3339(datetime.now(UTC) - timedelta(seconds=age_seconds))
        self._imported: float | None = None
        self._loaded: float | None = None
        self._first_step_time: str | None = None

    def imported(self) -> None:
        """Mark that all of the task's code is there."""
        self._imported = time.monotonic()

    def loaded(self) -> None:
        """Mark that model, data and checkpoint are in place."""
        self._loaded = time.monotonic()

    def write(self, progress: Progress) -> None:
        """Mark the first step."""
        if progress.kind is ProgressKind.STEP and self._first_step_time is None:
            self._first_step_time = progress.time

    def timings(self) -> Timings:
        """Return what is known by now."""
        imported, loaded = self._imported, self._loaded
        return Timings(
            start_time=self._start_time,
            imports_seconds=None if imported is None else round(imported - self.started, 3),
            load_seconds=None
            if imported is None or loaded is None
            else round(loaded - imported, 3),
            first_step_time=self._first_step_time,
        )
