"""The memory benchmark: its arms are manifests, and its rows the longest there are."""

from pathlib import Path

from memory import keep_longest
from memory_arms import ARMS, FULL
from stagetune_api.spec import StagedFineTune
from stagetune_api.validation import parse_manifest


def test_every_arm_is_a_manifest_and_full_fine_tuning_is_one() -> None:
    for arm in ARMS:
        assert isinstance(parse_manifest(arm.manifest()), StagedFineTune), arm.name
    assert FULL in {arm.name for arm in ARMS}


def test_the_longest_rows_are_kept_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("aaa\na\naaaa\naa\n")

    keep_longest(path, 2)

    assert path.read_text() == "aaa\naaaa\n"
