"""The quality benchmark compares what it says: fronts, equal loss, pairs, tables."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import quality_cell
from quality_arms import ARMS, REFERENCE, SEEDS, cells, titles
from quality_fronts import (
    beside_front,
    best,
    compare,
    equal_or_better,
    front,
    mcnemar,
    points_of,
    summarise,
)
from quality_page import BEGIN, END, write_tables
from stagetune_api.spec import StagedFineTune
from stagetune_api.validation import parse_manifest

BASE = {"exactMatch": 0.0, "validationLoss": 7.0, "generalLoss": 4.0}
PASSAGES = 8


def result(
    arm: str,
    rate: float,
    validation: float,
    general: float,
    *,
    seconds: float = 100.0,
    seed: int = 1,
    matches: tuple[int, ...] = (1, 0),
) -> dict[str, Any]:
    return {
        "id": f"{arm}_{rate:g}_1_{seed}",
        "arm": arm,
        "rate": rate,
        "passes": 1,
        "seed": seed,
        "exactMatch": sum(matches) / len(matches),
        "validationLoss": validation,
        "generalLoss": general,
        "klToBase": 1.0,
        "seconds": seconds,
        "peakMemoryBytes": 2**30,
        "matches": list(matches),
        "generalRows": [[general * 10, 10]] * PASSAGES,
    }


@pytest.mark.parametrize("cell", list(cells(SEEDS[:1])), ids=lambda cell: cell.id)
def test_every_cell_is_a_sound_manifest(cell: Any) -> None:
    documents = [cell.manifest(), *(cell.manifest(d.edits) for d in cell.arm.derived.values())]
    for document in documents:
        manifest = parse_manifest(document)
        assert isinstance(manifest, StagedFineTune), manifest
        assert manifest.spec.training.learning_rate == cell.rate


def test_cells_are_told_apart_by_their_ids() -> None:
    ids = [name for cell in cells() for name in cell.ids]
    assert len(ids) == len(set(ids))
    assert {name.split("_")[0] for name in ids} == set(titles())


def test_cell_of_any_seed_is_found_by_its_id(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `--seeds` may name others than the usual ones."""
    training = SimpleNamespace(run=lambda cell, work: [{"id": cell.id, "seed": cell.seed}])
    monkeypatch.setitem(sys.modules, "quality_training", training)  # type: ignore[arg-type]
    monkeypatch.setattr(quality_cell, "hide_large_packages", lambda: None)
    other = next(iter(cells((17,))))
    monkeypatch.setattr(sys, "argv", ["quality_cell.py", str(tmp_path), other.id])
    quality_cell.main()
    assert json.loads(capsys.readouterr().out) == {"id": other.id, "seed": 17}


def test_reference_has_its_rates_and_passes_swept() -> None:
    (reference,) = [arm for arm in ARMS if arm.name == REFERENCE]
    assert len(reference.rates) >= 3
    assert len(reference.passes) >= 2


def test_other_seeds_repeat_settings_of_the_sweep() -> None:
    for arm in ARMS:
        assert set(arm.repeated) <= {(rate, passes) for rate in arm.rates for passes in arm.passes}
    first, second = (list(cells((seed,))) for seed in SEEDS[:2])
    assert len(second) < len(first)
    assert {cell.arm.name for cell in second} == {arm.name for arm in ARMS}


def test_points_of_one_seed_are_kept_and_compared_with_nothing() -> None:
    results = [
        result("lora", 1e-3, 0.3, 4.1, seed=1),
        result("lora", 1e-3, 0.3, 4.1, seed=2),
        result("lora", 2e-3, 0.1, 4.2, seed=1),
    ]
    summary = summarise(results, BASE, {"lora": "LoRA"}, "lora")
    (arm,) = summary["arms"]
    assert (arm["rate"], len(arm["points"])) == (1e-3, 2)
    assert [point["rate"] for point in summary["fronts"]["lora"]] == [1e-3]


def test_front_leaves_out_what_another_point_beats_on_both() -> None:
    points = points_of(
        [
            result("a", 1e-4, 0.5, 4.01),
            result("a", 2e-4, 0.3, 4.02),
            result("a", 3e-4, 0.4, 4.03),
        ]
    )["a"]
    assert [point.rate for point in front(points)] == [2e-4, 1e-4]
    assert best(points).rate == 2e-4


def test_points_join_the_seeds_of_equal_settings() -> None:
    (point,) = points_of(
        [result("a", 1e-4, 0.3, 4.1, seed=2), result("a", 1e-4, 0.5, 4.3, seed=1)]
    )["a"]
    assert [seed["seed"] for seed in point.seeds] == [1, 2]
    assert point.mean("validationLoss") == pytest.approx(0.4)


def test_equal_loss_means_no_worse_and_equal_time_no_longer() -> None:
    (reference,) = points_of([result("lora", 1e-3, 0.3, 4.1, seconds=100)])["lora"]
    points = points_of(
        [
            result("a", 1e-4, 0.4, 4.00, seconds=50),
            result("a", 2e-4, 0.2, 4.05, seconds=90),
            result("a", 3e-4, 0.2, 4.03, seconds=110),
        ]
    )["a"]
    found = equal_or_better(points, reference)
    assert found is not None
    assert found.rate == 2e-4
    found = equal_or_better(points, reference, in_time=False)
    assert found is not None
    assert found.rate == 3e-4
    assert equal_or_better(points[:1], reference) is None


def test_comparison_pairs_seeds_and_counts_forgetting_over_the_base() -> None:
    mine = points_of(
        [
            result("a", 1e-4, 0.2, 4.02, seed=1, matches=(1, 1)),
            result("a", 1e-4, 0.2, 4.02, seed=2, matches=(1, 1)),
        ]
    )["a"][0]
    other = points_of([result("lora", 1e-3, 0.3, 4.1, seed=1, matches=(1, 0))])["lora"][0]
    found = compare(mine, other, BASE["generalLoss"])
    assert found["seeds"] == 1
    assert found["forgettingRatio"] == pytest.approx(0.2, abs=1e-3)
    assert found["exactMatchWonLost"] == [1, 0]
    low, high = found["forgettingDifferenceInterval95"]
    assert low == pytest.approx(-0.08, abs=1e-3)
    assert high == pytest.approx(-0.08, abs=1e-3)


def test_front_of_the_reference_is_interpolated_at_equal_loss_seed_by_seed() -> None:
    """Half way between losses of 0.1 and 0.4 on a logarithmic scale is 0.2."""
    reference = points_of(
        [
            result("lora", 2e-3, 0.1, 4.4, seconds=100, seed=1),
            result("lora", 1e-3, 0.4, 4.2, seconds=60, seed=1),
            result("lora", 2e-3, 0.1, 4.8, seconds=100, seed=2),
        ]
    )["lora"]
    (point,) = points_of(
        [
            result("a", 1e-4, 0.2, 4.1, seconds=40, seed=1),
            result("a", 1e-4, 0.2, 4.9, seconds=40, seed=2),
        ]
    )["a"]
    found = beside_front(point, reference, BASE["generalLoss"])
    assert found is not None
    assert found["seeds"] == 1  # seed 2 has no front, only a point
    assert found["referenceForgetting"] == pytest.approx(0.3)
    assert found["forgettingRatio"] == pytest.approx(1 / 3, abs=1e-3)
    assert found["secondsRatio"] == pytest.approx(0.5)
    (outside,) = points_of([result("a", 1e-4, 0.05, 4.1)])["a"]
    assert beside_front(outside, reference, BASE["generalLoss"]) is None


@pytest.mark.parametrize(
    ("won", "lost", "expected"), [(0, 0, 1.0), (5, 5, 1.0), (10, 0, 2 / 2**10), (8, 1, 20 / 2**9)]
)
def test_mcnemar_is_the_exact_binomial(won: int, lost: int, expected: float) -> None:
    assert mcnemar(won, lost) == pytest.approx(expected)


def test_summary_has_what_the_page_and_readers_of_the_file_need(tmp_path: Path) -> None:
    results = [
        result("lora", 1e-3, 0.3, 4.1),
        result("lora", 5e-4, 0.3 * 4, 4.02, seconds=50),
        result("open-top", 1e-4, 0.6, 4.03, seconds=90),
        result("full", 1e-4, 0.9, 4.01),
    ]
    summary = {"base": BASE, **summarise(results, BASE, titles(), REFERENCE)}
    arms = {arm["name"]: arm for arm in summary["arms"]}
    assert list(arms) == ["lora", "full", "open-top"]
    needed = {"exactMatch", "validationLoss", "generalLoss", "klToBase", "seconds"}
    assert needed | {"peakMemoryBytes"} <= arms["lora"].keys()
    assert needed | {"peakMemoryBytes", "seed"} <= arms["lora"]["seeds"][0].keys()
    assert set(summary["fronts"]) == set(arms)
    (row,) = summary["againstLora"]["open-top"]["alongFront"]
    assert row["forgettingRatio"] == pytest.approx(0.5)
    assert summary["againstLora"]["full"]["anyTime"] is None

    page = tmp_path / "quality.md"
    marks = [f"{BEGIN.format(name)}\nold\n{END}" for name in ("arms", "against", "fronts")]
    page.write_text("# Quality\n\n" + "\n\nWords.\n\n".join(marks) + "\n")
    write_tables(page, summary)
    text = page.read_text()
    assert "old" not in text
    assert text.count("Words.") == 2
    assert "| 0.50 |" in text
    write_tables(page, summary)
    assert page.read_text() == text
