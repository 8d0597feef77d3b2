"""One `stagetune run` at a time in a run's folder."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_PAUSE_SECONDS = 0.5


class RunIsBusyError(Exception):
    """Another process works on the run and did not leave in time."""


@contextlib.contextmanager
def locked(
    path: Path,
    *,
    wait_seconds: float,
    on_wait: Callable[[str], None],
    gives_up: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Hold the lock file at `path`, waiting up to `wait_seconds` for whoever has it to leave.

    A killed command leaves a trainer behind that is still saving; it has inherited the lock and
    gives it up when it exits. Yields the descriptor, which a child has to inherit for that. Raises
    RunIsBusyError in the end, or as soon as `gives_up` says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + wait_seconds
        told = False
        while not _try_lock(descriptor):
            if time.monotonic() >= deadline or gives_up():
                raise RunIsBusyError(
                    f"another process works in {path.parent}; wait for it, or end it and try again"
                )
            if not told:
                on_wait(f"waiting for another process to leave {path.parent}")
                told = True
            time.sleep(_PAUSE_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
