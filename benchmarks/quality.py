"""Which way of training learns most and forgets least, on the small real model.

    python benchmarks/quality.py [--arms lora,open-top] [--seeds 1,2,3] [--minutes 60]

Every cell (an arm at a rate, a number of passes and a seed) is trained in a process of its own with
one thread, as many at once as there are cores, and its line is added to
benchmarks/results/quality-cells.jsonl as soon as it is measured; the same command goes on with the
cells that are missing. Then benchmarks/results/quality.json and the tables of docs/quality.md are
made from all lines. docs/quality.md says what is compared.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quality_arms import ARMS, BASE_FILE, REFERENCE, SEEDS, Cell, cells, titles
from quality_fronts import summarise
from quality_page import write_tables

ROOT = Path(__file__).resolve().parents[1]
CELLS = ROOT / "benchmarks" / "results" / "quality-cells.jsonl"
RESULT = ROOT / "benchmarks" / "results" / "quality.json"
PAGE = ROOT / "docs" / "quality.md"
QUICKSTART = ROOT / "examples" / "quickstart"
FACTS_KEPT = 3
"""Every so manyth fact of the quick start's question set is used."""


def main() -> None:
    """Train what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", default="", help="only these, parted by commas")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--minutes", type=float, help="begin no cell after so many")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality")
    options = parser.parse_args()
    work = options.work.resolve()
    write_inputs(work)
    wanted = set(filter(None, options.arms.split(","))) or {arm.name for arm in ARMS}
    done = {result["id"] for result in read_results()}
    missing = [
        cell
        for cell in cells(tuple(map(int, options.seeds.split(","))))
        if cell.arm.name in wanted and not done.issuperset(cell.ids)
    ]
    ends = time.monotonic() + 60 * options.minutes if options.minutes else None
    sweep(missing, work, options.workers, ends)
    write_results(work)


def write_inputs(work: Path) -> None:
    """Put rows, general text and the model into `work`."""
    spec = importlib.util.spec_from_file_location("build_inputs", QUICKSTART / "build_inputs.py")
    if spec is None or spec.loader is None:
        raise SystemExit("the quick start's build_inputs.py is missing")
    inputs = importlib.util.module_from_spec(spec)
    sys.modules["build_inputs"] = inputs
    spec.loader.exec_module(inputs)
    training, validation = [], []
    for fact_type in inputs.FACT_TYPES:
        facts = inputs.build_facts(fact_type)[::FACTS_KEPT]
        training += inputs.build_training_rows(facts, fact_type.training_wordings)
        validation += inputs.build_validation_rows(facts, fact_type.held_out_wordings)
    inputs.write_rows(work / "train.jsonl", inputs.shuffle_rows(training, inputs.SEED))
    inputs.write_rows(work / "validation.jsonl", inputs.shuffle_rows(validation, inputs.SEED))
    inputs.place_model(inputs.find_model(), work / "model.gguf")
    (work / "general_text.jsonl").write_bytes((QUICKSTART / "general_text.jsonl").read_bytes())


def sweep(missing: Sequence[Cell], work: Path, workers: int, ends: float | None) -> None:
    """Train the missing cells, `workers` at once, until they are done or the time is up."""
    if not missing:
        return
    # The first one alone: it prepares the model and measures the base for all.
    has_base = (work / BASE_FILE).exists()
    first, rest = ([], missing) if has_base else (missing[:1], missing[1:])
    for cell in first:
        run_cell(cell, work)
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda cell: _unless_late(cell, work, ends), rest):
            pass


def _unless_late(cell: Cell, work: Path, ends: float | None) -> None:
    if ends is None or time.monotonic() < ends:
        run_cell(cell, work)


def run_cell(cell: Cell, work: Path) -> None:
    """Train one cell and add its lines to the file; what failed is named."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("quality_cell.py")), str(work), cell.id],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    known = {result["id"] for result in read_results()}
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for result in results:
        if result["id"] in known:
            continue
        with CELLS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(
            f"{result['id']:40} validation {result['validationLoss']:.4f}  general "
            f"{result['generalLoss']:.4f}  exact {result['exactMatch']:.3f}  "
            f"{result['seconds']:.0f} s  ({time.monotonic() - started:.0f} s in all)",
            flush=True,
        )
    if done.returncode != 0:
        tail = done.stderr.strip().splitlines()[-1:]
        print(f"{cell.id} is not complete: {' | '.join(tail)}", flush=True)


def read_results() -> list[dict[str, Any]]:
    """Return every measured line."""
    if not CELLS.exists():
        return []
    return [json.loads(line) for line in CELLS.read_text(encoding="utf-8").splitlines()]


def read_base(work: Path) -> dict[str, Any]:
    """Return the base model's scores: measured in `work`, or in an earlier sweep elsewhere."""
    path = work / BASE_FILE
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    earlier: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))["base"]
    return earlier


def write_results(work: Path) -> None:
    """Write the JSON file and the tables of the page from all lines."""
    base = read_base(work)
    results = read_results()
    summary = {
        "model": "SmolLM2-135M-Instruct",
        "trainRows": _count(work / "train.jsonl"),
        "validationRows": _count(work / "validation.jsonl"),
        "base": {name: base[name] for name in ("exactMatch", "validationLoss", "generalLoss")},
        "seconds": "of one processor core, training and saving, without imports and evaluation",
        "machine": platform.machine(),
        "commands": ["make bench-quality"],
        **summarise(results, base, titles(), REFERENCE),
    }
    RESULT.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    write_tables(PAGE, summary)
    for line in _lines(summary):
        print(line)


def _count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _lines(summary: dict[str, Any]) -> Iterator[str]:
    base = summary["base"]
    yield f"base: validation {base['validationLoss']:.4f}, general {base['generalLoss']:.4f}"
    for arm in summary["arms"]:
        yield (
            f"{arm['title']:44} rate {arm['rate']:g} x{arm['passes']:g}  validation "
            f"{arm['validationLoss']:.4f}  forgetting "
            f"{arm['generalLoss'] - base['generalLoss']:+.4f}  exact {arm['exactMatch']:.3f}  "
            f"{arm['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
