"""One process of benchmarks/staging.py, measured from outside.

A process says on its standard output how far it is. At each such line its processor time is read
from the kernel, so that every arm is measured in the same way, whoever wrote it.
"""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SCHEDULER_CLOCK = 2
_USER_TIME, _SYSTEM_TIME = 11, 12
"""Of /proc/PID/stat behind the command's name: see proc(5), fields 14 and 15."""

STEP, FILL, READY = "step", "fill", "ready"
"""A step is done; the hidden states below a stage begin to be computed; they are there."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Time that passed, and time that the processor worked for the process in all its threads."""

    wall: float
    processor: float

    def __sub__(self, other: "Seconds") -> "Seconds":
        return Seconds(wall=self.wall - other.wall, processor=self.processor - other.processor)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What a process said, and when after its start."""

    name: str
    at: Seconds


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A process that has ended well."""

    marks: list[Mark]
    total: Seconds
    peak_memory_bytes: int
    others_share: float = 0.0
    """Part of the machine's processor time that other processes took meanwhile."""

    def of(self, name: str) -> list[Seconds]:
        """Return when each mark of that name was set."""
        return [mark.at for mark in self.marks if mark.name == name]


class ProcessFailedError(Exception):
    """A process ended with an error; the text is the end of what it said."""


def environment(threads: int, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what every arm's process finds in its environment."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        # A thread that waits sleeps: processor seconds are then those of work.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
        **(extra or {}),
    }


def run_process(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    log: Path,
    read: Callable[[str], str | None],
    timeout_seconds: float = 1800,
) -> Measured:
    """Run `command` to its end; `read` gives the name of the mark that a line of it sets, or None.

    Peak memory is the largest resident set of the process and of what it waited for, as the kernel
    accounts for it. Raises ProcessFailedError.
    """
    marks = []
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as said:
        started, busy = time.monotonic(), _busy_seconds()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=said,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env=dict(env),
        )
        limit = threading.Timer(timeout_seconds, process.kill)
        limit.start()
        try:
            for line in process.stdout or ():
                name = read(line)
                if name is not None:
                    wall = time.monotonic() - started
                    worked = _processor_seconds(process.pid)
                    marks.append(Mark(name=name, at=Seconds(wall=wall, processor=worked)))
                said.write(line)
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            limit.cancel()
            if process.stdout is not None:
                process.stdout.close()
        process.returncode = os.waitstatus_to_exitcode(status)
        total = Seconds(wall=time.monotonic() - started, processor=usage.ru_utime + usage.ru_stime)
    if process.returncode != 0:
        end = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
        raise ProcessFailedError(f"exit code {process.returncode}: " + " | ".join(end)[-2000:])
    others = max(_busy_seconds() - busy - total.processor, 0.0)
    return Measured(
        marks=marks,
        total=total,
        peak_memory_bytes=usage.ru_maxrss * 1024,
        others_share=others / (total.wall * (os.cpu_count() or 1)),
    )


def _busy_seconds() -> float:
    """Return how long all processors together have worked since the machine began."""
    user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    return (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")


def _processor_seconds(pid: int) -> float:
    """Return the processor time of all threads of a process, to the nanosecond.

    By the clock that clock_getcpuclockid(3) gives, which Python has for threads alone; of a process
    that has ended and waits to be noticed, by /proc and in hundredths.
    """
    try:
        return time.clock_gettime((~pid << 3) | _SCHEDULER_CLOCK)
    except OSError:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return (int(stat[_USER_TIME]) + int(stat[_SYSTEM_TIME])) / os.sysconf("SC_CLK_TCK")
