"""What the staging benchmark makes of its measurements: ratios within rounds, marks, the page."""

from pathlib import Path
from typing import Any

import pytest

from stagetune_api.spec import StagedFineTune
from stagetune_api.training_spec import DEFAULT_EPOCHS
from stagetune_api.validation import parse_manifest
from staging import describe
from staging_arms import ARMS, manifest
from staging_page import BEGIN, END, write_page
from staging_process import FILL, READY, STEP, Mark, Measured, Seconds
from staging_results import summarise
from staging_stages import read_progress

PADDED = [400, 400, 400, 400]


def process(name: str, step: float, *, fill: float = 0.0, peak: int = 2**30) -> dict[str, Any]:
    """Return what two measured steps of `step` seconds each leave."""
    return {
        "name": name,
        "steps": {"wall": 2 * step, "processor": 4 * step},
        "numSteps": 2,
        "fill": {"wall": fill, "processor": 2 * fill},
        "startSeconds": 5.0,
        "total": {"wall": 30.0, "processor": 40.0},
        "peakMemoryBytes": peak,
        "othersShare": 0.01,
    }


def cells(slow: float = 1.0, number: int = 1) -> list[dict[str, Any]]:
    """Return a round on a machine that takes `slow` times as long."""
    measured = {
        "full": [process("all", 1.0 * slow, peak=4 * 2**30)],
        "lora16": [process("all", 0.7 * slow)],
        "stages-cached": [
            process("layers-0-9", 0.7 * slow),
            process("layers-10-19", 0.4 * slow, fill=0.4 * slow),
            process("layers-20-29", 0.2 * slow, fill=0.4 * slow),
        ],
        "top-cached": [process("below-top", 0.3 * slow), process("top", 0.1 * slow)],
        "default": [process("lower", 0.8 * slow), process("upper", 0.4 * slow, fill=0.4 * slow)],
    }
    return [{"arm": arm, "round": number, "processes": found} for arm, found in measured.items()]


def summary(measured: list[dict[str, Any]]) -> dict[str, Any]:
    return summarise(measured, {"paddedTokens": PADDED, "rows": 32, "numLayers": 30})


def test_ratios_are_made_within_a_round_whatever_the_machine_did_between_them() -> None:
    ratios = summary([*cells(), *cells(slow=3.0, number=2)])["ratios"]
    assert ratios["topStageSeconds"]["rounds"] == [0.1, 0.1]
    assert ratios["topStagePeakMemory"]["median"] == 0.25
    assert ratios["loraSecondsPerPass"]["median"] == pytest.approx(0.7)


def test_a_pass_over_all_stages_counts_what_fills_their_caches() -> None:
    found = summary(cells())
    # Four steps of 0.7 + 0.4 + 0.2 seconds and two fills, over three times four seconds.
    assert found["ratios"]["allStagesSecondsPerPass"]["median"] == pytest.approx(6 / 12)
    arm = next(arm for arm in found["arms"] if arm["name"] == "stages-cached")
    assert arm["passRatio"]["wall"]["median"] == pytest.approx(6 / 4)


def test_a_default_run_fills_its_cache_once_for_all_of_its_passes() -> None:
    ratio = summary(cells())["ratios"]["defaultRunOverLora"]["median"]
    assert ratio == pytest.approx(
        (DEFAULT_EPOCHS * 4 * (0.8 + 0.4) + 0.4) / (3 * 4 * 0.7), abs=1e-3
    )


def test_operations_are_compared_at_the_same_step() -> None:
    counted = {
        "full": [{"name": "all", "stepFlops": 1000}],
        "stages-cached": [
            {"name": str(place), "stepFlops": flops, "fillFlops": fill}
            for place, (flops, fill) in enumerate([(700, 0), (400, 400), (200, 400)])
        ],
    }
    inside = [{"arm": arm, "inside": found} for arm, found in counted.items()]
    ratios = summary([*cells(), *inside])["ratios"]
    assert ratios["allStagesFlopsPerPass"]["median"] == pytest.approx(6000 / 12000)
    assert "topStageFlops" not in ratios


def test_an_arm_that_failed_is_named_and_left_out() -> None:
    failed = {"arm": "swift-stages", "round": 1, "error": "exit code 1"}
    found = summary([*cells(), failed])
    assert found["errors"] == {"swift-stages": "exit code 1"}
    assert "msSwiftStagesSecondsPerPass" not in found["ratios"]


def test_start_up_ends_with_the_first_step_and_filling_a_cache_is_no_part_of_it() -> None:
    at = [(FILL, 4.0), (READY, 9.0), (STEP, 10.0), (STEP, 11.0), (STEP, 12.5)]
    marks = [Mark(name=name, at=Seconds(wall=wall, processor=wall)) for name, wall in at]
    total = Seconds(wall=14.0, processor=14.0)
    found = describe("top", Measured(marks=marks, total=total, peak_memory_bytes=1))
    assert found["fill"]["wall"] == 5.0
    assert found["startSeconds"] == 5.0
    assert found["steps"]["wall"] == 1.5
    assert found["numSteps"] == 1


@pytest.mark.parametrize(
    ("line", "mark"),
    [
        ('{"kind":"Step","task":"Train","name":"a","attempt":1,"time":"t","step":1}', STEP),
        (
            '{"kind":"Message","task":"Train","name":"a","attempt":1,"time":"t",'
            '"message":"/run/cache/prefix-10 is there, after 3.2 s"}',
            READY,
        ),
        ('{"kind":"Validation","task":"Train","name":"a","attempt":1,"time":"t"}', None),
        (
            '{"kind":"Message","task":"Train","name":"a","attempt":1,"time":"t",'
            '"message":"computing /run/cache/prefix-10"}',
            FILL,
        ),
        (
            '{"kind":"Message","task":"Train","name":"a","attempt":1,"time":"t",'
            '"message":"computing /run/cache/teacher-validation"}',
            None,
        ),
        ("warning: something", None),
    ],
)
def test_lines_of_a_trainer_set_marks(line: str, mark: str | None) -> None:
    assert read_progress(line) == mark


@pytest.mark.parametrize(
    "arm", [arm for arm in ARMS if arm.program == "stagetune"], ids=lambda arm: arm.name
)
def test_every_arm_of_ours_is_a_sound_manifest(arm: Any) -> None:
    assert isinstance(parse_manifest(manifest(arm, 30, "file://model")), StagedFineTune)


def test_the_page_shows_what_was_measured(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    names = ("staging-targets", "staging-arms", "staging-stages", "staging-profile")
    page.write_text("before\n" + "".join(f"{BEGIN.format(name)}\n{END}\n" for name in names))
    write_page(page, summary([*cells(), *cells(slow=1.1, number=2)]))
    text = page.read_text()
    assert text.startswith("before\n")
    assert "| step of the top stage, seconds | 0.100 | 0.100 | ≤ 0.20 |" in text
    assert "| 3 stages, cached | 1.50 | 1.50 |" in text
    assert (tmp_path / "staging.svg").read_text().count("<rect") == 11
