"""What batches of like length, packing, and batches made ahead save of a stage's steps.

    python benchmarks/batching.py [--rounds 3] [--output FILE]

Rows are conversations of one to eight turns of the quick start's questions, most of them short, as
in data that people collect. Each arm is the same stage on the same rows: the ten layers at the top
of the small real model, with a prefix cache below. A round has each arm once, in a process of its
own, and ratios are made within a round, of seconds for a token.
"""

import argparse
import json
import os
import platform
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_arms import CHAT_TEMPLATE
from stagetune_api.facts import Facts
from stagetune_api.names import RunLayout
from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.report import StageReport
from stagetune_api.stage import StageConfig, Task
from stagetune_operator.estimate import Machine
from stagetune_operator.plan import Plan, make_plan
from staging_inputs import place_model, quickstart_rows
from staging_process import STEP, environment, run_process
from staging_results import CLOCK, spread
from staging_stages import TRAINER, read_progress, with_cache
from trainer_tasks import edited, spec_of, task_config

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "batching.json"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- table: batching -->", "<!-- end of table -->"
NUM_ROWS, NUM_VALIDATION = 160, 8
TURN_WEIGHTS = (30, 22, 15, 11, 8, 6, 5, 3)
"""How often a conversation has one turn, two, and so on."""
SEED = 5
WARM_STEPS = 2
"""The first steps of a process, which are not measured."""
REFERENCE = "plain"
IN_TURN = (sys.executable, str(Path(__file__).with_name("batching_in_turn.py")))

MANIFEST: dict[str, Any] = {
    "apiVersion": "stagetune.io/v1alpha1",
    "kind": "StagedFineTune",
    "metadata": {"name": "batching"},
    "spec": {
        "model": {"source": "file://model.gguf", "chatTemplate": CHAT_TEMPLATE},
        "dataset": {
            "source": "file://train.jsonl",
            "validation": {"source": "file://validation.jsonl"},
            "maxLength": 512,
        },
        "stages": [{"name": "top", "layers": {"first": 20, "last": 29}}],
        "training": {
            "learningRate": 1e-4,
            "batchSize": 8,
            "microBatchSize": 8,
            "gradientCheckpointing": "Never",
            "precision": "FP32",
        },
    },
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A way of making batches."""

    name: str
    title: str
    edits: Mapping[str, Any]
    program: Sequence[str] = TRAINER


ARMS = (
    Arm(name=REFERENCE, title="as by default", edits={}),
    Arm(name="grouped", title="`groupByLength`", edits={"training.groupByLength": True}),
    Arm(name="packed", title="`packing`", edits={"training.packing": True}),
    Arm(name="in-turn", title="batches made when they are needed", edits={}, program=IN_TURN),
)


def main() -> None:
    """Measure every arm in rounds and write the file and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "batching")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_rows(work)
    facts = prepare(work)
    rounds = []
    for number in range(1, options.rounds + 1):
        rounds.append({arm.name: measure(arm, facts, work) for arm in ARMS})
        for name, found in rounds[-1].items():
            print(f"round {number}  {name:16} {found}", flush=True)
    summary = summarise(rounds, facts)
    options.output.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if options.output == RESULT:
        write_page(PAGE, summary)


def write_rows(work: Path) -> None:
    """Put the model and conversations of different length into `work`."""
    place_model(work)
    chosen = random.Random(SEED)
    turns = chosen.choices(range(1, len(TURN_WEIGHTS) + 1), TURN_WEIGHTS, k=NUM_ROWS)
    wanted = sum(turns)
    rows = quickstart_rows(wanted, NUM_VALIDATION)
    # The quick start has fewer rows than are wanted: the same question may come twice.
    training, validation = rows[:-NUM_VALIDATION], rows[-NUM_VALIDATION:]
    asked = iter(chosen.choices(training, k=wanted))
    conversations = [
        {"messages": [line for _ in range(count) for line in next(asked)["messages"]]}
        for count in turns
    ]
    for name, part in (("train", conversations), ("validation", validation)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (work / f"{name}.jsonl").write_text(text, encoding="utf-8")


def prepare(work: Path) -> Facts:
    """Fetch and tokenise, and return what was measured."""
    layout = RunLayout(work / "run")
    report = _run(work, layout.task("prepare").root, _config(work, {}, Task.PREPARE), TRAINER)[1]
    if report.facts is None:
        raise SystemExit("prepare left no facts")
    return report.facts


def measure(arm: Arm, facts: Facts, work: Path) -> dict[str, float]:
    """Train the arm's stage and return seconds for a thousand tokens, and how much was padding.

    The prefix cache of an earlier arm is used again: it holds the same rows.
    """
    layout = RunLayout(work / "run")
    shutil.rmtree(layout.stages, ignore_errors=True)
    plan = make_plan(spec_of(edited(MANIFEST, arm.edits)), facts, Machine(is_gpu=False))
    if not isinstance(plan, Plan):
        raise SystemExit("\n".join(f"{problem.path}: {problem.message}" for problem in plan))
    stage = with_cache(plan.stages[0])
    config = _config(work, arm.edits, Task.TRAIN, facts=facts, stage=stage)
    place = layout.stage(stage.directory)
    measured, report = _run(work, place.root, config, arm.program)
    if report.train is None or report.train.padding_fraction is None:
        raise SystemExit(f"{arm.name} left no result")
    lines = place.metrics.read_text(encoding="utf-8").splitlines()
    steps = [Progress.model_validate_json(line) for line in lines]
    tokens = [line.tokens or 0 for line in steps if line.kind is ProgressKind.STEP]
    thousands = (tokens[-1] - tokens[WARM_STEPS - 1]) / 1000
    taken = measured.of(STEP)[-1] - measured.of(STEP)[WARM_STEPS - 1]
    return {
        "processor": round(taken.processor / thousands, 4),
        "wall": round(taken.wall / thousands, 4),
        "paddingFraction": round(report.train.padding_fraction, 4),
        "othersShare": round(measured.others_share, 3),
    }


def _config(work: Path, edits: Mapping[str, Any], task: Task, **rest: Any) -> StageConfig:
    spec = spec_of(edited(MANIFEST, edits))
    return task_config(spec, task, name="batching", run_directory=work / "run", work=work, **rest)


def _run(work: Path, folder: Path, config: StageConfig, program: Sequence[str]) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "stage.json"
    file.write_text(config.model_dump_json(indent=2), encoding="utf-8")
    env = environment(min(2, os.cpu_count() or 1))
    log = work / "log.txt"
    measured = run_process([*program, str(file)], env=env, log=log, read=read_progress)
    return measured, StageReport.model_validate_json((folder / "report.json").read_bytes())


def summarise(rounds: Sequence[Mapping[str, Any]], facts: Facts) -> dict[str, Any]:
    """Return ratios to the reference, each within its round, and their spread."""
    arms = []
    for arm in ARMS:
        ratios = {
            clock: spread(found[arm.name][clock] / found[REFERENCE][clock] for found in rounds)
            for clock in (CLOCK, "wall")
        }
        first = rounds[0][arm.name]
        arms.append(
            {
                "name": arm.name,
                "title": arm.title,
                "paddingFraction": first["paddingFraction"],
                "secondsRatio": ratios[CLOCK],
                "wallRatio": ratios["wall"],
            }
        )
    return {
        "model": "SmolLM2-135M-Instruct",
        "machine": platform.machine(),
        "commands": ["make bench-batching"],
        "rows": facts.data.train_rows,
        "tokens": facts.data.train_tokens,
        "longest": facts.data.max_row_tokens,
        "arms": arms,
        "othersShare": spread(cell["othersShare"] for found in rounds for cell in found.values()),
    }


def write_page(page: Path, summary: Mapping[str, Any]) -> None:
    """Write the arms between the page's two marks."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table(summary)}\n{END}{after}", encoding="utf-8")


def table(summary: Mapping[str, Any]) -> str:
    """Return the arms as a table in Markdown."""
    lines = [
        "| batches | padding | seconds for a token | wall |",
        "| --- | --- | --- | --- |",
    ]
    for arm in summary["arms"]:
        seconds, wall = (
            f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"
            for ratio in (arm["secondsRatio"], arm["wallRatio"])
        )
        lines.append(f"| {arm['title']} | {arm['paddingFraction']:.0%} | {seconds} | {wall} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
