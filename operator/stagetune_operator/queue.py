"""Which run is looked at when: each by one worker at a time, failures later and later.

Watch events, progress and time put keys in; `reconcile` is called with them. The queue holds keys
alone, so two events of a run before its turn are one look. What is in it when the process ends is
not lost: every run is listed, and queued, at the next start.

Time is the event loop's own.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable

from stagetune_operator.errors import ClusterError, UnavailableError
from stagetune_operator.keys import RunKey

Reconcile = Callable[[RunKey], Awaitable[float | None]]
"""Does what is to be done for a run; returns the seconds until the next look, None for no look."""

BACKOFF_CAP_SECONDS = 30.0
_BACKOFF_JITTER = 0.25
_BACKOFF_BASE_CAP = BACKOFF_CAP_SECONDS / (1 + _BACKOFF_JITTER)
_RESYNC_SPREAD = 0.5
"""The share of the resync interval over which the looks are spread."""

logger = logging.getLogger(__name__)


class RunQueue:
    """Runs in a queue and the workers that take them; to be stopped before the loop ends."""

    def __init__(
        self,
        reconcile: Reconcile,
        keys: Callable[[], Iterable[RunKey]],
        *,
        workers: int = 8,
        resync_seconds: float = 60.0,
        on_done: Callable[[float, bool], None] = lambda seconds, failed: None,
        jitter: random.Random | None = None,
    ) -> None:
        """`keys()` are the runs that are looked at again every `resync_seconds`.

        `on_done(seconds, failed)` is told of every call of `reconcile`.
        """
        self._reconcile = reconcile
        self._keys = keys
        self._num_workers = workers
        self._resync_seconds = resync_seconds
        self._on_done = on_done
        self._jitter = jitter or random.Random()
        self._ready: asyncio.Queue[RunKey | None] = asyncio.Queue()
        self._waiting: set[RunKey] = set()
        """Keys in `_ready`."""
        self._running: set[RunKey] = set()
        self._again: set[RunKey] = set()
        """Keys that were added while their run was being reconciled."""
        self._timers: dict[RunKey, asyncio.TimerHandle] = {}
        self._failures: dict[RunKey, int] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    @property
    def depth(self) -> int:
        """How many runs wait for a worker."""
        return len(self._waiting) + len(self._again)

    def add(self, key: RunKey) -> None:
        """Have the run looked at as soon as a worker is free; once more if one is at it now."""
        if key in self._running:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.put_nowait(key)

    def add_after(self, key: RunKey, seconds: float) -> None:
        """Have the run looked at in `seconds`, unless that is to happen earlier anyhow."""
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        timer = self._timers.get(key)
        if self._stopping or (timer is not None and timer.when() <= due):
            return
        self._cancel_timer(key)
        self._timers[key] = loop.call_at(due, self._time_has_come, key)

    def start(self) -> None:
        """Start the workers and the resync. Call it once, in the loop that they run in."""
        for number in range(self._num_workers):
            task = asyncio.create_task(self._work(), name=f"reconcile worker {number}")
            self._tasks.append(task)
        self._tasks.append(asyncio.create_task(self._resync(), name="resync"))

    async def stop(self, patience_seconds: float = 10.0) -> None:
        """Begin nothing any more, and wait for what has begun; cancel it after the patience."""
        self._stopping = True
        for key in list(self._timers):
            self._cancel_timer(key)
        if not self._tasks:
            return
        *workers, resync = self._tasks
        resync.cancel()
        for _ in workers:
            self._ready.put_nowait(None)
        _, late = await asyncio.wait(self._tasks, timeout=patience_seconds)
        for task in late:
            logger.warning("%s did not finish in time", task.get_name())
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def _work(self) -> None:
        while True:
            key = await self._ready.get()
            if key is None or self._stopping:
                return
            self._waiting.discard(key)
            self._running.add(key)
            # The look that it was to bring is this one.
            self._cancel_timer(key)
            try:
                await self._look(key)
            finally:
                self._running.discard(key)
            if key in self._again:
                self._again.discard(key)
                self.add(key)

    async def _look(self, key: RunKey) -> None:
        """Reconcile once and arrange the next look."""
        begun = time.perf_counter()
        error: Exception | None = None
        try:
            seconds = await self._reconcile(key)
        except Exception as caught:
            error = caught
            seconds = max(self._backoff(key), _asked_wait(caught))
            text = f"{type(caught).__name__}: {caught}"
            # A server that is away is no news of this program, and a thousand runs notice it.
            trace = None if isinstance(caught, ClusterError) else caught
            logger.warning("%s: %s; next try in %.1f s", key, text, seconds, exc_info=trace)
        else:
            self._failures.pop(key, None)
        self._on_done(time.perf_counter() - begun, error is not None)
        if seconds is not None:
            self.add_after(key, seconds)

    def _backoff(self, key: RunKey) -> float:
        """Count a failure and return the seconds until the next try: 1, 2, 4 and so on to 30."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        base = min(2.0 ** min(failures - 1, 10), _BACKOFF_BASE_CAP)
        return base * self._jitter.uniform(1, 1 + _BACKOFF_JITTER)

    async def _resync(self) -> None:
        """Have every run looked at in turn: what only time changes brings no event."""
        while True:
            await asyncio.sleep(self._resync_seconds * self._jitter.uniform(0.9, 1.1))
            spread = self._resync_seconds * _RESYNC_SPREAD
            for key in list(self._keys()):
                self.add_after(key, self._jitter.uniform(0, spread))

    def _time_has_come(self, key: RunKey) -> None:
        self._timers.pop(key, None)
        self.add(key)

    def _cancel_timer(self, key: RunKey) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()


def _asked_wait(error: Exception) -> float:
    """Return how long the server asks to wait, within what a run can wait."""
    asked = error.retry_after if isinstance(error, UnavailableError) else None
    return min(asked or 0.0, BACKOFF_CAP_SECONDS)
