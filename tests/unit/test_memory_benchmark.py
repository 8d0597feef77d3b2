"""The memory benchmark: its arms are manifests, and its rows the longest there are."""

import json
from pathlib import Path
from typing import Any

from memory import BEGIN, END, PAGE, RESULT, keep_longest, table
from memory_arms import ARMS, FULL
from stagetune_api.spec import StagedFineTune
from stagetune_api.validation import parse_manifest


def test_every_arm_is_a_manifest_and_full_fine_tuning_is_one() -> None:
    for arm in ARMS:
        assert isinstance(parse_manifest(arm.manifest()), StagedFineTune), arm.name
    assert FULL in {arm.name for arm in ARMS}


def kept() -> dict[str, Any]:
    """What the benchmark measured and the repository keeps."""
    result: dict[str, Any] = json.loads(RESULT.read_text())
    return result


def test_kept_result_has_every_arm_within_the_band_that_the_plan_promises() -> None:
    arms = kept()["arms"]
    assert [arm["name"] for arm in arms] == [arm.name for arm in ARMS]
    outside = {
        f"{arm['name']}/{stage['name']}": stage["ratio"]
        for arm in arms
        for stage in arm["stages"]
        if not 0.85 <= stage["ratio"] <= 1.15
    }
    assert outside == {}


def test_page_shows_the_kept_result() -> None:
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == table(kept())


def test_the_longest_rows_are_kept_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("aaa\na\naaaa\naa\n")

    keep_longest(path, 2)

    assert path.read_text() == "aaa\naaaa\n"
