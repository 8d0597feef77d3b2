"""The micro-batches of the next step, made while the present one computes.

One thread, one step ahead: tokens are put together and hidden states are read from the volume in
the time that the device needs anyway. What a step is given is what it would be given without.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from stagetune_trainer.data.batch import Batch

THREAD_NAME = "batches"
Made = Sequence[Batch]


class BatchesAhead:
    """Makes the batches of steps in a thread of its own; the thread ends with the context."""

    def __init__(self, make: Callable[[int], Made], *, steps: int) -> None:
        """`make` returns the micro-batches of a step below `steps`; one call at a time is made."""
        self._make = make
        self._steps = steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD_NAME)
        self._next: tuple[int, Future[Made]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Wait for what is being made, and throw it away."""
        self._thread.shutdown(cancel_futures=True)

    def of(self, step: int) -> Made:
        """Return the micro-batches of step `step`, and begin with those of the step after it.

        Raises what making them raised: only now, also where it was raised before.
        """
        ahead, self._next = self._next, None
        if ahead is None or ahead[0] != step:
            ahead = step, self._thread.submit(self._make, step)
        batches = ahead[1].result()
        if step + 1 < self._steps:
            self._next = step + 1, self._thread.submit(self._make, step + 1)
        return batches
