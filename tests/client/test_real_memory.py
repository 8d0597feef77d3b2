"""The plan's memory beside what stages of the small real model take, each in its own process."""

from pathlib import Path
from typing import Any

import pytest

from memory import measure, write_rows
from memory_arms import ARMS, FULL

BAND = 0.15
"""By so much the plan may be off."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    write_rows(folder)
    return folder


@pytest.mark.real_model
def test_estimates_hold_and_a_cached_top_stage_takes_half_of_full_fine_tuning(work: Path) -> None:
    wanted = (FULL, "top", "lora")
    measured: dict[str, list[dict[str, Any]]] = {
        arm.name: measure(arm, work)["stages"] for arm in ARMS if arm.name in wanted
    }
    assert set(measured) == set(wanted)
    for name, stages in measured.items():
        for stage in stages:
            assert stage["ratio"] == pytest.approx(1, abs=BAND), (name, stage)
    top = measured["top"][-1]
    assert top["prefixCached"]
    assert top["measuredBytes"] <= 0.5 * measured[FULL][0]["measuredBytes"]
