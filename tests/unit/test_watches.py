"""The probes: a stuck watch is noticed, and a gap in one is made up for."""

import asyncio

from aiohttp.test_utils import TestClient, TestServer

from stagetune_operator.watches import STALE_SECONDS, HealthEndpoint, Watches

RUNS, JOBS = "/apis/stagetune.io/v1alpha1/stagedfinetunes", "/apis/batch/v1/jobs"


class Bench:
    """Two watches and a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.gaps = 0
        self.watches = Watches([RUNS, JOBS], on_gap=self.count_gap, clock=lambda: self.now)

    def count_gap(self) -> None:
        self.gaps += 1

    def probe(self, *, reachable: bool) -> tuple[int, int]:
        """Return what the liveness and the readiness probe get."""

        async def is_reachable() -> bool:
            return reachable

        async def main() -> tuple[int, int]:
            app = HealthEndpoint(self.watches, is_reachable).application()
            async with TestClient(TestServer(app)) as client:
                return (await client.get("/healthz")).status, (await client.get("/readyz")).status

        return asyncio.run(main())


def test_the_operator_is_ready_once_every_watch_is_open() -> None:
    bench = Bench()
    assert bench.probe(reachable=True) == (200, 503)
    bench.watches.note_list(RUNS)
    bench.watches.note_watch(RUNS)
    assert bench.probe(reachable=True) == (200, 503)
    bench.watches.note_watch(JOBS)
    assert bench.probe(reachable=True) == (200, 200)
    assert bench.gaps == 0


def test_one_stuck_watch_is_enough_to_be_restarted() -> None:
    bench = Bench()
    bench.watches.note_watch(RUNS)
    bench.watches.note_watch(JOBS)
    bench.now = STALE_SECONDS
    bench.watches.note_watch(RUNS)
    bench.watches.note_watch("/some/other/path")
    assert bench.watches.stale == []
    bench.now += 1
    assert bench.watches.stale == [JOBS]
    assert bench.probe(reachable=True) == (503, 200)
    bench.watches.note_watch(JOBS)
    assert bench.probe(reachable=True) == (200, 200)


def test_while_the_server_is_away_nothing_is_won_by_a_restart() -> None:
    bench = Bench()
    bench.now = 10 * STALE_SECONDS
    assert bench.probe(reachable=False) == (200, 503)
    assert bench.probe(reachable=True) == (503, 503)


def test_a_watch_that_is_refused_is_not_ready_and_no_reason_to_be_restarted() -> None:
    bench = Bench()
    bench.watches.note_watch(RUNS)
    bench.now = STALE_SECONDS + 1
    bench.watches.note_watch(RUNS)
    bench.watches.note_refusal(JOBS)
    assert bench.probe(reachable=True) == (200, 503)
    bench.now += STALE_SECONDS + 1
    assert bench.watches.stale == [JOBS, RUNS]


def test_a_server_that_hangs_counts_as_away() -> None:
    watches = Watches([RUNS], on_gap=lambda: None, clock=iter([0.0, STALE_SECONDS + 1]).__next__)

    async def hangs() -> bool:
        await asyncio.Event().wait()
        return True

    async def main() -> int:
        app = HealthEndpoint(watches, hangs).application()
        async with TestClient(TestServer(app)) as client:
            return (await client.get("/healthz")).status

    assert asyncio.run(main()) == 200


def test_a_watch_that_had_to_list_again_had_a_gap_once_it_watches_again() -> None:
    bench = Bench()
    for path in (RUNS, JOBS):
        bench.watches.note_list(path)
        bench.watches.note_watch(path)
    bench.watches.note_watch(RUNS)
    assert bench.gaps == 0
    bench.watches.note_list(JOBS)
    bench.watches.note_list(JOBS)
    assert bench.gaps == 0
    bench.watches.note_watch(JOBS)
    assert bench.gaps == 1
    bench.watches.note_watch(JOBS)
    assert bench.gaps == 1
