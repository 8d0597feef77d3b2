"""Batches made ahead: the same ones in the same order, one step ahead, and no thread left."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from stagetune_api.report import Outcome, StageReport
from stagetune_api.stage import StageConfig
from stagetune_trainer.data.ahead import THREAD_NAME, BatchesAhead
from stagetune_trainer.data.batch import Batch, collate
from stagetune_trainer.data.store import StoredRow
from stagetune_trainer.ranks import ALONE
from stagetune_trainer.run import run_task
from stagetune_trainer.stage_model import StageModel
from stagetune_trainer.tensor_file import RowTensors
from stagetune_trainer.train import _read_ahead
from stop_requests import AfterChecks

MakeConfig = Callable[..., StageConfig]
MakeStage = Callable[..., dict[str, Any]]
SECONDS = 30.0
"""Longest wait for another thread, which is there at once where nothing is wrong."""


def batches_of(step: int) -> list[Batch]:
    return [collate([StoredRow(input_ids=[step, step], labels=[step, step], file="", row=1)])]


def steps_of(batches: Any) -> list[int]:
    return [int(batch.input_ids[0, 0]) for batch in batches]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if THREAD_NAME in thread.name]


def test_the_next_step_is_made_while_this_one_computes() -> None:
    made, was_made = [], {step: threading.Event() for step in range(4)}

    def make(step: int) -> list[Batch]:
        made.append((step, threading.current_thread().name))
        was_made[step].set()
        return batches_of(step)

    with BatchesAhead(make, steps=3) as ahead:
        for step in range(3):
            assert steps_of(ahead.of(step)) == [step]
            if step < 2:
                assert was_made[step + 1].wait(SECONDS)
                assert [done for done, _ in made] == list(range(step + 2))
    assert [step for step, _ in made] == [0, 1, 2]
    assert all(name.startswith(THREAD_NAME) for _, name in made)
    assert threads() == []


def test_of_a_large_step_the_first_states_alone_are_read_before_it_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Model:
        def read_ahead(self, batch: Batch) -> Batch:
            return replace(batch, states=torch.zeros(1, 2, 100))

    monkeypatch.setattr("stagetune_trainer.train.READ_AHEAD_BYTES", 1500)
    batches = [batch for step in range(4) for batch in batches_of(step)]
    found = _read_ahead(batches, cast("StageModel", Model()), ALONE)
    assert [batch.states is not None for batch in found] == [True, True, False, False]
    assert steps_of(found) == [0, 1, 2, 3]


def test_any_step_may_be_asked_for() -> None:
    with BatchesAhead(batches_of, steps=100) as ahead:
        for step in (40, 41, 7, 7, 99, 0):
            assert steps_of(ahead.of(step)) == [step]


def test_an_error_is_raised_at_its_step_and_not_before() -> None:
    failed = threading.Event()

    def make(step: int) -> list[Batch]:
        if step == 1:
            failed.set()
            raise OSError("the volume is away")
        return batches_of(step)

    with BatchesAhead(make, steps=3) as ahead:
        assert steps_of(ahead.of(0)) == [0]
        assert failed.wait(SECONDS)
        with pytest.raises(OSError, match="the volume is away"):
            ahead.of(1)
        # A second try is made anew.
        with pytest.raises(OSError, match="the volume is away"):
            ahead.of(1)
    assert threads() == []


def test_the_thread_ends_when_the_loop_is_left_in_the_middle() -> None:
    def diverge() -> None:
        with BatchesAhead(batches_of, steps=9) as ahead:
            ahead.of(0)
            raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        diverge()
    assert threads() == []


def test_a_stage_reads_its_cache_ahead_and_leaves_no_thread(
    make_later_config: MakeConfig,
    make_stage: MakeStage,
    tmp_path: Path,
    never: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readers: list[str] = []
    rows = RowTensors.rows

    def spy(self: RowTensors, name: str, wanted: tuple[int, ...]) -> Any:
        if name == "hidden":
            readers.append(threading.current_thread().name)
        return rows(self, name, wanted)

    monkeypatch.setattr(RowTensors, "rows", spy)
    reports: list[StageReport] = []
    cached = {"prefixCache": {"used": True, "reason": "asked for"}}
    for index, (first, options) in enumerate([(0, {}), (2, cached)]):
        stage = make_stage(index, first, first + 1, **options)
        config = make_later_config(
            "Train", stage=stage, chain=reports, run_directory=str(tmp_path / "run")
        )
        stopped, _ = run_task(config, AfterChecks(60 if index else 15))
        assert stopped.outcome is Outcome.INTERRUPTED
        assert threads() == []
        report, _ = run_task(config, never)
        assert report.outcome is Outcome.SUCCEEDED, report.failure
        assert threads() == []
        reports.append(report)
    # Two micro-batches of eight steps; what validation looks at is read where it is needed.
    assert sum(name.startswith(THREAD_NAME) for name in readers) >= 16
