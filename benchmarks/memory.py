"""Peak memory of every stage, measured and as the plan estimates it, on the small real model.

    python benchmarks/memory.py [--work runs/memory] [--arms default,lora] [--output FILE]

Each arm is a manifest with a few of the quick start's rows, the longest ones: a stage's peak is
reached in its first steps. Every stage is a trainer's process of its own, as in any run, and what
its report says is compared with the plan. `full` is full fine-tuning, which the top stages are
compared with.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memory_arms import ARMS, FULL, Arm
from quality import write_inputs
from stagetune_api.facts import Facts
from stagetune_api.names import RunLayout
from stagetune_api.report import Outcome, StageReport
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.stage import ParentRef, StageConfig, Task
from stagetune_operator.estimate import Machine
from stagetune_operator.plan import Plan, make_plan
from trainer_tasks import spec_of, task_config

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
RESULT = ROOT / "benchmarks/results/memory.json"
PAGE = ROOT / "docs/performance.md"
BEGIN, END = "<!-- table: memory -->", "<!-- end of table -->"
ROWS = {"train": 16, "validation": 8}
"""Two steps' training rows: a stage takes three."""


def main() -> None:
    """Measure the wanted arms and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/memory")
    parser.add_argument("--arms", help="names of arms, commas between them; all if left out")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "model.gguf").exists():
        write_rows(work)
    wanted = options.arms.split(",") if options.arms else None
    # What was prepared by other code tells of that.
    shutil.rmtree(work / "runs", ignore_errors=True)
    results = []
    for arm in ARMS:
        if wanted is None or arm.name in wanted:
            results.append(measure(arm, work))
            for line in _lines(results[-1]):
                print(line, flush=True)
    if wanted is not None and options.output.exists():
        # What is not measured now stays.
        known = json.loads(options.output.read_text(encoding="utf-8"))["arms"]
        by_name = {arm["name"]: arm for arm in (*known, *results)}
        results = [by_name[arm.name] for arm in ARMS if arm.name in by_name]
    summary = _summary(results)
    options.output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if options.output == RESULT:
        write_table(PAGE, summary)


def write_rows(work: Path) -> None:
    """Put the model and the rows into `work`."""
    write_inputs(work)
    for name, count in ROWS.items():
        keep_longest(work / f"{name}.jsonl", count)


def keep_longest(path: Path, count: int) -> None:
    """Keep the longest rows of a JSONL file, as they are ordered there."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = set(sorted(lines, key=len)[-count:])
    path.write_text("".join(line for line in lines if line in kept), encoding="utf-8")


def prepare(arm: Arm, work: Path) -> tuple[RunLayout, Facts]:
    """Return the folder and the facts of model and rows, prepared once for each method.

    Rows are the same for all; what a process loads of code is not.
    """
    spec = spec_of(arm.manifest())
    layout = RunLayout(work / "runs" / f"prepared-{spec.method.type}")
    report = layout.task("prepare").report
    if not report.exists():
        _run(layout, _config(spec, layout, work, Task.PREPARE))
    facts = StageReport.model_validate_json(report.read_bytes()).facts
    if facts is None:
        raise SystemExit("prepare gave no facts")
    return layout, facts


def measure(arm: Arm, work: Path) -> dict[str, Any]:
    """Train all stages of `arm`, and return what each was to take and took."""
    spec = spec_of(arm.manifest())
    prepared, facts = prepare(arm, work)
    layout = RunLayout(work / "runs" / arm.name)
    shutil.rmtree(layout.root, ignore_errors=True)
    shutil.copytree(prepared.prepare, layout.prepare)
    plan = make_plan(spec, facts, Machine(is_gpu=False))
    if not isinstance(plan, Plan):
        raise SystemExit("\n".join(map(str, plan)))
    chain: list[ParentRef] = []
    stages = []
    for stage in plan.stages:
        config = _config(
            spec, layout, work, Task.TRAIN, facts=facts, stage=stage, chain=list(chain)
        )
        report = _run(layout, config)
        if report.output is None:
            raise SystemExit(f"{arm.name}: {stage.name} left no output")
        chain.append(ParentRef(path=report.output.path, digest=report.output.digest))
        estimated = stage.estimate.peak_bytes(report.device)
        stages.append(
            {
                "name": stage.name,
                "prefixCached": bool(stage.prefix_cache and stage.prefix_cache.used),
                "overheadBytes": stage.estimate.overhead_bytes,
                "weightsBytes": stage.estimate.weights_bytes,
                "trainingStateBytes": stage.estimate.training_state_bytes,
                "activationBytes": stage.estimate.activation_bytes,
                "estimatedBytes": estimated,
                "measuredBytes": report.peak_memory_bytes,
                "ratio": round(estimated / report.peak_memory_bytes, 3),
            }
        )
    shutil.rmtree(layout.root)
    return {"name": arm.name, "title": arm.title, "stages": stages}


def _config(
    spec: StagedFineTuneSpec, layout: RunLayout, work: Path, task: Task, **rest: Any
) -> StageConfig:
    return task_config(spec, task, name="memory", run_directory=layout.root, work=work, **rest)


def _run(layout: RunLayout, config: StageConfig) -> StageReport:
    """Run one task in a process of its own and return its report."""
    place = layout.stage(config.stage.directory) if config.stage else layout.task("prepare")
    place.root.mkdir(parents=True, exist_ok=True)
    place.config.write_text(config.model_dump_json(), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "stagetune_trainer", str(place.config)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    if not place.report.exists():
        raise SystemExit(done.stderr[-4000:])
    report = StageReport.model_validate_json(place.report.read_bytes())
    if report.outcome is not Outcome.SUCCEEDED:
        raise SystemExit(report.failure.message if report.failure else done.stderr[-4000:])
    return report


def _summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    full = [stage for arm in results if arm["name"] == FULL for stage in arm["stages"]]
    if full:
        for arm in results:
            for stage in arm["stages"]:
                stage["ofFull"] = round(stage["measuredBytes"] / full[0]["measuredBytes"], 3)
    return {
        "model": "SmolLM2-135M-Instruct",
        "machine": platform.machine(),
        "commands": ["make bench-memory"],
        "arms": results,
    }


def write_table(page: Path, summary: Mapping[str, Any]) -> None:
    """Write the stages of all arms between the page's two marks."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(summary)}\n{END}{after}", encoding="utf-8")


def table(summary: Mapping[str, Any]) -> str:
    """Return every stage's peaks, in MiB, as a table in Markdown."""
    lines = [
        "| arm | stage | by the plan, MiB | measured, MiB | plan / measured | of full |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm in summary["arms"]:
        for stage in arm["stages"]:
            cached = ", cached" if stage["prefixCached"] else ""
            lines.append(
                f"| {arm['title']} | {stage['name']}{cached} | "
                f"{stage['estimatedBytes'] / MIB:.0f} | {stage['measuredBytes'] / MIB:.0f} | "
                f"{stage['ratio']:.2f} | {stage['ofFull']:.2f} |"
            )
    return "\n".join(lines)


def _lines(arm: Mapping[str, Any]) -> Iterator[str]:
    for stage in arm["stages"]:
        parts = ("overhead", "weights", "trainingState", "activation", "estimated", "measured")
        sizes = "  ".join(f"{name} {stage[f'{name}Bytes'] / MIB:5.0f}" for name in parts)
        cached = "cached" if stage["prefixCached"] else ""
        yield f"{arm['name']:24} {stage['name']:16} {cached:6} {sizes}  ratio {stage['ratio']}"


if __name__ == "__main__":
    main()
