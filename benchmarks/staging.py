"""What a stage costs beside full fine-tuning, LoRA and ms-swift: seconds, operations, memory.

    python benchmarks/staging.py [--rounds 3] [--arms full,stages-cached] [--resume]
    python benchmarks/staging.py --device cuda

Every arm trains the small real model on the same rows in the same order, each process on its own
and with the same number of threads. A round runs every arm once; ratios are made within a round,
and the median and the spread of all rounds are written to benchmarks/results/staging.json and into
docs/performance.md, which says what is compared. On a GPU the memory of a model of 7 billion random
weights is measured instead (`staging_gpu`).
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import staging_gpu
import staging_swift
from stagetune_api.report import StageReport
from staging_arms import ARMS, Arm
from staging_inputs import write_inputs
from staging_page import write_page
from staging_process import (
    FILL,
    READY,
    STEP,
    Measured,
    ProcessFailedError,
    Seconds,
    environment,
    run_process,
)
from staging_results import WARM_STEPS, summarise
from staging_stages import Run

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "staging.json"
PAGE = ROOT / "docs" / "performance.md"
PROFILED_STEPS = 4


def main() -> None:
    """Measure what is asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", default="", help="only these, parted by commas")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--model", type=Path, help="another model: a folder or a GGUF file")
    parser.add_argument("--data", type=Path, help="other rows: messages as JSON lines")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "staging")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--resume", action="store_true", help="keep what was measured before")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    if options.device == "cuda":
        staging_gpu.measure_all(options.output.with_name("staging-gpu.json"))
        return
    bench = Bench(options)
    for number in range(1, options.rounds + 1):
        for arm in bench.arms:
            bench.measure(arm, number)
    for arm in bench.arms:
        bench.look_inside(arm)
    summary = summarise(bench.cells(), bench.settings())
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    write_page(options.page, summary)
    for name, ratio in summary["ratios"].items():
        print(f"{name:32} {ratio['median']:.3f}  ({ratio['min']:.3f} to {ratio['max']:.3f})")


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The rows of every step, as all arms see them."""

    path: Path
    rows: Path
    """The rows as text, in the order in which they are seen."""
    steps: list[dict[str, Any]]


class Bench:
    """The inputs, the arms, and the file in which each measurement is kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self._cells = self.work / "cells.jsonl"
        if not options.resume:
            self._cells.unlink(missing_ok=True)
        self.env = environment(options.threads)
        wanted = set(filter(None, options.arms.split(","))) or {arm.name for arm in ARMS}
        unknown = wanted - {arm.name for arm in ARMS}
        if unknown:
            raise SystemExit(f"there is no arm {', '.join(sorted(unknown))}")
        self.arms = [arm for arm in ARMS if arm.name in wanted]
        self.run = Run(
            self.work, self.env, write_inputs(self.work, options.rows, options.model, options.data)
        )
        self.batches = self._write_batches()
        self.swift_problem = self._make_swift()

    def cells(self) -> list[dict[str, Any]]:
        """Return every measurement so far."""
        if not self._cells.exists():
            return []
        return [json.loads(line) for line in self._cells.read_text("utf-8").splitlines()]

    def settings(self) -> dict[str, Any]:
        """Return what was measured and on what."""
        steps = self.batches.steps
        facts = self.run.facts
        found = {
            "model": self.options.model.name if self.options.model else "SmolLM2-135M-Instruct",
            "numLayers": facts.model.num_layers,
            "rows": facts.data.train_rows,
            "tokens": sum(step["tokens"] for step in steps),
            "answerTokens": sum(step["answerTokens"] for step in steps),
            "paddedTokens": [step["paddedTokens"] for step in steps],
            "threads": self.options.threads,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "versions": {
                name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")
            },
        }
        swift = any(arm.program == "ms-swift" for arm in self.arms)
        if swift:
            found["msSwift"] = self.swift_problem or staging_swift.versions()
        return found

    def measure(self, arm: Arm, number: int) -> None:
        """Run the arm's processes for round `number` and keep what was measured."""
        if any(cell["arm"] == arm.name and cell.get("round") == number for cell in self.cells()):
            return
        if arm.program == "ms-swift" and self.swift_problem is not None:
            return
        cell: dict[str, Any] = {"arm": arm.name, "round": number}
        try:
            cell["processes"] = list(self._processes(arm))
        except ProcessFailedError as error:
            if arm.program != "ms-swift":
                raise
            cell["error"] = str(error)
        self._keep(cell)
        said = cell.get("error") or "  ".join(
            f"{process['name']} {process['steps']['wall']:.1f} s, "
            f"{process['peakMemoryBytes'] / 2**30:.2f} GiB, start {process['startSeconds']:.1f} s"
            for process in cell["processes"]
        )
        print(f"round {number}  {arm.name}: {said}", flush=True)

    def look_inside(self, arm: Arm) -> None:
        """Count the operations of the arm, and profile its stages."""
        if any(cell["arm"] == arm.name and cell.get("inside") for cell in self.cells()):
            return
        found: list[dict[str, Any]] = []
        if arm.program == "plain":
            output = self.work / "flops.json"
            self._run_plain(arm, "--flops", str(output))
            found = [{"name": "all", **json.loads(output.read_text(encoding="utf-8"))}]
        elif arm.program == "stagetune":
            program = (sys.executable, str(HERE / "staging_inside.py"))
            steps = 1 + WARM_STEPS + PROFILED_STEPS
            for stage, _, _ in self.run.train(arm, program, steps=steps):
                path = self.run.layout.stage(stage.directory).root / "inside.json"
                found.append({"name": stage.name, **json.loads(path.read_text(encoding="utf-8"))})
        if found:
            self._keep({"arm": arm.name, "inside": found})
            print(f"inside {arm.name}", flush=True)

    def _processes(self, arm: Arm) -> Iterator[dict[str, Any]]:
        if arm.program == "plain":
            yield describe("all", self._run_plain(arm))
        elif arm.program == "stagetune":
            for stage, measured, report in self.run.train(arm):
                yield describe(stage.name, measured, report)
        else:
            layers = [stage.layers for stage in self.run.stages(arm)[1]] if arm.stages else []
            for name, measured, tokens in staging_swift.train(
                arm,
                [range(group.first, group.last + 1) for group in layers],
                model=self.run.model_directory,
                rows=self.batches.rows,
                steps=len(self.batches.steps),
                work=self.work,
                env=self.env,
            ):
                yield {**describe(name, measured), "tokensPerRow": tokens}

    def _run_plain(self, arm: Arm, *more: str) -> Measured:
        command = [sys.executable, str(HERE / "staging_plain.py")]
        command += [str(self.run.model_directory), str(self.batches.path)]
        command += ["--positions", arm.positions, *more]
        if arm.rank is not None:
            command += ["--rank", str(arm.rank)]
        return run_process(
            command,
            env=self.env,
            log=self.work / "logs" / f"{arm.name}.txt",
            read=lambda line: STEP if line.startswith('{"kind": "Step"') else None,
        )

    def _write_batches(self) -> Batches:
        """Write the rows of each step; they follow from any arm's first stage."""
        arm = next(arm for arm in ARMS if arm.stages == "thirds")
        stage, output = self.work / "rows-stage.json", self.work / "batches.json"
        self.run.write_stage_file(arm, stage)
        command = [sys.executable, str(HERE / "staging_rows.py"), str(stage), str(output)]
        run_process(command, env=self.env, log=self.work / "logs" / "rows.txt", read=lambda _: None)
        steps = json.loads(output.read_text(encoding="utf-8"))["steps"]
        lines = (self.work / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        rows = self.work / "ordered.jsonl"
        ordered = [lines[number - 1] for step in steps for number in step["lines"]]
        rows.write_text("".join(ordered), encoding="utf-8")
        return Batches(path=output, rows=rows, steps=steps)

    def _make_swift(self) -> str | None:
        """Make ms-swift's environment where an arm wants it, and return what failed."""
        if not any(arm.program == "ms-swift" for arm in self.arms):
            return None
        try:
            staging_swift.python()
        except staging_swift.NoSwiftError as error:
            print(f"without ms-swift: {error}", flush=True)
            return str(error)
        return None

    def _keep(self, cell: dict[str, Any]) -> None:
        with self._cells.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")


def describe(name: str, measured: Measured, report: StageReport | None = None) -> dict[str, Any]:
    """Return what a process took, by its marks.

    `steps` are those after the warm-up; `startSeconds` end with the first step, without what
    filling a cache took: that is work on the rows, and counted with it.
    """
    steps = measured.of(STEP)
    taken = steps[-1] - steps[WARM_STEPS - 1]
    fills = measured.of(FILL)
    fill = Seconds(wall=0.0, processor=0.0)
    if fills:
        fill = measured.of(READY)[0] - fills[0]
    found = {
        "name": name,
        "steps": _rounded(taken),
        "numSteps": len(steps) - WARM_STEPS,
        "fill": _rounded(fill),
        "startSeconds": round(steps[0].wall - fill.wall, 2),
        "total": _rounded(measured.total),
        "peakMemoryBytes": measured.peak_memory_bytes,
        "othersShare": round(measured.others_share, 3),
    }
    if report is not None and report.timings is not None:
        found["importsSeconds"] = report.timings.imports_seconds
    return found


def _rounded(seconds: Seconds) -> dict[str, float]:
    return {"wall": round(seconds.wall, 4), "processor": round(seconds.processor, 4)}


if __name__ == "__main__":
    main()
