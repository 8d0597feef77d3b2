"""Processes that are known again by other programs, and ended for certain.

A process is its number and the time it began: the kernel gives a number to another process once
it is free, and what is to be ended here must be what was started here.
"""

import ctypes
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that the kernel sends to a process when its parent ends."""
_LIBC = ctypes.CDLL(None)


class ProcessEndedError(Exception):
    """A process ended that should have gone on; the text has the end of its log."""


class Process(NamedTuple):
    """A process that was started here."""

    name: str
    number: int
    began: int
    """Clock ticks from the machine's start to the process's."""
    log: str
    """The file with its output."""


def start_process(
    name: str,
    command: Sequence[str],
    log: Path,
    *,
    ends_with_parent: bool,
    environment: Mapping[str, str] | None = None,
) -> Process:
    """Start `command` in a session of its own, with its output in the file `log`.

    With `ends_with_parent` the kernel kills it when the calling thread ends, however that ends.
    """
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            # A Ctrl-C in the terminal is for the caller, who then ends its processes in order.
            start_new_session=True,
            preexec_fn=_end_with_parent if ends_with_parent else None,
        )
    # It may outlive this object, whose destructor would warn of that: `end_process` waits for the
    # child, or init does after this process.
    child.returncode = 0
    process = find_process(name, child.pid, log)
    if process is None:
        raise ProcessEndedError(f"{name} ended at once:\n{_tail(log)}")
    return process


def find_process(name: str, number: int, log: Path) -> Process | None:
    """Return the process that has this number now; None if none has it."""
    began = _began(number)
    return None if began is None else Process(name, number, began, str(log))


def this_process() -> Process:
    """Return the process that asks."""
    process = find_process("this", os.getpid(), Path(os.devnull))
    assert process is not None
    return process


def end_process(process: Process, *, patience_seconds: float) -> None:
    """End the process, by force after `patience_seconds`; one that has ended already is no error.

    Raises TimeoutError if the kernel does not end it either.
    """
    with _handle(process) as handle:
        if handle is None:
            return
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        if not _has_ended(handle, patience_seconds):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            if not _has_ended(handle, patience_seconds):
                raise TimeoutError(f"{process.name}, process {process.number}, does not end")
    # Where another process started it, there is nothing to wait for.
    with suppress(ChildProcessError):
        os.waitpid(process.number, os.WNOHANG)


def is_running(process: Process) -> bool:
    """Return whether the process that was started is still there."""
    with _handle(process) as handle:
        return handle is not None and not _has_ended(handle, 0)


def wait_until(
    holds: Callable[[], bool], *, what: str, seconds: float, processes: Sequence[Process] = ()
) -> None:
    """Return once `holds()`.

    Raises ProcessEndedError as soon as one of `processes` has ended, and TimeoutError after
    `seconds`; both show the end of a log.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        for process in processes:
            if not is_running(process):
                raise ProcessEndedError(f"{process.name} ended:\n{_tail(Path(process.log))}")
        if time.monotonic() > deadline:
            logs = [f"{process.name}:\n{_tail(Path(process.log))}" for process in processes[-1:]]
            raise TimeoutError("\n".join([f"no {what} within {seconds:g} s", *logs]))
        time.sleep(0.05)


@contextmanager
def _handle(process: Process) -> Iterator[int | None]:
    """Open a handle that stands for this very process; None if it has ended."""
    try:
        handle = os.pidfd_open(process.number)
    except ProcessLookupError:
        yield None
        return
    try:
        # After the handle is open: from here on the number cannot become another process's.
        yield handle if _began(process.number) == process.began else None
    finally:
        os.close(handle)


def _has_ended(handle: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _began(number: int) -> int | None:
    try:
        line = Path(f"/proc/{number}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # proc_pid_stat(5): field 22; the name in field 2 may hold blanks and brackets of its own.
    return int(line.rpartition(")")[2].split()[19])


def _end_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
