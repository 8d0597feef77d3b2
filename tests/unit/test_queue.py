"""The queue: each run by one worker at a time, nothing lost, failures later and later."""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from stagetune_operator.errors import UnavailableError
from stagetune_operator.keys import RunKey
from stagetune_operator.queue import RunQueue
from virtual_time import run_virtually

A, B = RunKey("team", "a"), RunKey("team", "b")


def now() -> float:
    return asyncio.get_running_loop().time()


class Looks:
    """A reconcile that notes when it was called, and takes, returns and raises what it is told."""

    def __init__(
        self,
        *,
        takes: float = 0.0,
        answer: Callable[[RunKey, int], float | None] = lambda key, number: None,
    ) -> None:
        self.begun: list[tuple[float, RunKey]] = []
        self.ended: list[RunKey] = []
        self.at_once = 0
        self.most_at_once = 0
        self._takes = takes
        self._answer = answer
        self._busy: Counter[RunKey] = Counter()

    async def __call__(self, key: RunKey) -> float | None:
        self.begun.append((now(), key))
        self._busy[key] += 1
        assert self._busy[key] == 1, f"{key} is with two workers"
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self._takes)
            number = sum(1 for _, other in self.begun if other == key)
            return self._answer(key, number)
        finally:
            self._busy[key] -= 1
            self.at_once -= 1
            self.ended.append(key)

    def times(self, key: RunKey) -> list[float]:
        return [time for time, other in self.begun if other == key]


@asynccontextmanager
async def running(
    reconcile: Callable[[RunKey], Awaitable[float | None]],
    keys: Iterable[RunKey] = (),
    *,
    workers: int = 8,
    on_done: Callable[[float, bool], None] = lambda seconds, failed: None,
):
    queue = RunQueue(
        reconcile,
        lambda: keys,
        workers=workers,
        on_done=on_done,
        jitter=random.Random(1),
    )
    queue.start()
    try:
        yield queue
    finally:
        await queue.stop()


def test_a_run_that_is_added_often_before_its_turn_is_looked_at_once() -> None:
    async def main():
        looks = Looks()
        async with running(looks) as queue:
            for _ in range(5):
                queue.add(A)
            queue.add(B)
            assert queue.depth == 2
            await asyncio.sleep(1)
            assert queue.depth == 0
        return looks

    assert [key for _, key in run_virtually(main()).begun] == [A, B]


def test_a_run_that_is_added_while_it_is_looked_at_is_looked_at_once_more() -> None:
    async def main():
        looks = Looks(takes=10)
        async with running(looks) as queue:
            queue.add(A)
            await asyncio.sleep(1)
            queue.add(A)
            queue.add(A)
            assert queue.depth == 1
            await asyncio.sleep(30)
        return looks

    assert run_virtually(main()).times(A) == [0, 10]


def test_as_many_runs_are_looked_at_side_by_side_as_there_are_workers() -> None:
    async def main():
        looks = Looks(takes=1)
        async with running(looks, workers=3) as queue:
            for number in range(9):
                queue.add(RunKey("team", str(number)))
            await asyncio.sleep(10)
        return looks

    looks = run_virtually(main())
    assert looks.most_at_once == 3
    assert [time for time, _ in looks.begun] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_returned_seconds_are_waited_unless_something_happens_before() -> None:
    async def main():
        looks = Looks(answer=lambda key, number: 20 if number == 1 else None)
        async with running(looks) as queue:
            queue.add(A)
            queue.add(B)
            await asyncio.sleep(5)
            queue.add(B)
            await asyncio.sleep(40)
        return looks

    looks = run_virtually(main())
    assert looks.times(A) == [0, 20]
    # The look at 5 s was the one that the 20 s were waited for.
    assert looks.times(B) == [0, 5]


def test_of_two_appointments_the_earlier_one_counts() -> None:
    async def main():
        looks = Looks()
        async with running(looks) as queue:
            queue.add_after(A, 20)
            queue.add_after(A, 5)
            queue.add_after(A, 10)
            await asyncio.sleep(50)
        return looks

    assert run_virtually(main()).times(A) == [5]


def test_failures_are_tried_again_later_and_later_and_a_success_begins_anew() -> None:
    def answer(key: RunKey, number: int) -> float | None:
        if number == 9:
            return 0
        if number < 12:
            raise RuntimeError("the volume is on fire")
        return None

    async def main():
        looks = Looks(answer=answer)
        results: list[bool] = []
        async with running(looks, on_done=lambda _, failed: results.append(failed)) as queue:
            queue.add(A)
            await asyncio.sleep(300)
        return looks.times(A), results

    times, results = run_virtually(main())
    waits = [later - earlier for earlier, later in pairwise(times)]
    for wait, base in zip(waits, [1, 2, 4, 8, 16, 24, 24, 24, 0, 1, 2], strict=True):
        assert base <= wait <= base * 1.25
    assert results == [True] * 8 + [False] + [True] * 2 + [False]


def test_a_run_that_fails_does_not_hold_up_another() -> None:
    def answer(key: RunKey, number: int) -> float | None:
        if key == A:
            raise RuntimeError
        return None

    async def main():
        looks = Looks(answer=answer)
        async with running(looks, workers=1) as queue:
            queue.add(A)
            queue.add(B)
            await asyncio.sleep(0.5)
        return looks

    assert run_virtually(main()).times(B) == [0]


def test_a_server_that_is_away_is_one_line_and_any_other_comes_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def answer(key: RunKey, number: int) -> float | None:
        raise UnavailableError("refused") if key == A else KeyError("stage")

    async def main():
        async with running(Looks(answer=answer)) as queue:
            queue.add(A)
            queue.add(B)
            await asyncio.sleep(0.5)

    with caplog.at_level(logging.WARNING):
        run_virtually(main())
    expected, unexpected = caplog.records
    assert "team/a: UnavailableError: refused; next try in 1." in expected.getMessage()
    assert expected.exc_info is None
    assert unexpected.exc_info is not None
    assert unexpected.exc_info[0] is KeyError


def test_what_the_server_asks_to_wait_is_waited() -> None:
    def answer(key: RunKey, number: int) -> float | None:
        if number == 1:
            raise UnavailableError("too many requests", retry_after=12)
        return None

    async def main():
        looks = Looks(answer=answer)
        async with running(looks) as queue:
            queue.add(A)
            await asyncio.sleep(60)
        return looks

    assert run_virtually(main()).times(A) == [0, 12]


def test_every_run_is_looked_at_in_every_resync_and_not_all_at_the_same_time() -> None:
    keys = [RunKey("team", str(number)) for number in range(200)]

    async def main():
        looks = Looks()
        async with running(looks, keys):
            await asyncio.sleep(600)
        return looks

    looks = run_virtually(main())
    for key in keys:
        times = [0.0, *looks.times(key), 600.0]
        assert max(later - earlier for earlier, later in pairwise(times)) < 100
    busiest = Counter(int(time) for time, _ in looks.begun).most_common(1)[0][1]
    assert busiest < 40


def test_stopping_waits_for_what_is_being_done_and_begins_nothing_more() -> None:
    async def main():
        looks = Looks(takes=5, answer=lambda key, number: 1)
        async with running(looks, workers=1) as queue:
            queue.add(A)
            queue.add(B)
            await asyncio.sleep(1)
        stopped = now()
        queue.add(A)
        await asyncio.sleep(100)
        return looks, stopped

    looks, stopped = run_virtually(main())
    assert stopped == 5
    assert looks.ended == [A]
    assert len(looks.begun) == 1


def test_what_does_not_end_in_time_is_cancelled() -> None:
    async def main():
        looks = Looks(takes=3600)
        async with running(looks) as queue:
            queue.add(A)
            await asyncio.sleep(1)
        return looks, now()

    looks, stopped = run_virtually(main())
    assert looks.ended == [A]
    assert stopped == 11


@pytest.mark.parametrize("seed", range(20))
def test_after_every_addition_there_is_a_look_that_began_later(seed: int) -> None:
    chance = random.Random(seed)
    keys = [RunKey("team", str(number)) for number in range(4)]
    additions: list[tuple[float, RunKey]] = []

    def answer(key: RunKey, number: int) -> float | None:
        if chance.random() < 0.2:
            raise RuntimeError
        return chance.choice([None, 0.1, 3.0])

    async def main():
        looks = Looks(takes=0.3, answer=answer)
        async with running(looks, workers=2) as queue:
            for _ in range(300):
                await asyncio.sleep(chance.choice([0, 0, 0.05, 0.2]))
                key = chance.choice(keys)
                additions.append((now(), key))
                if chance.random() < 0.3:
                    queue.add_after(key, chance.uniform(0, 1))
                else:
                    queue.add(key)
            await asyncio.sleep(60)
        return looks

    looks = run_virtually(main())
    for time, key in additions:
        assert any(begun >= time for begun in looks.times(key)), f"{key} at {time} was lost"
