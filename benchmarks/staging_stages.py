"""Our arms of benchmarks/staging.py: real trainer processes on real stage files.

Every stage sees the rows in the same order, that of the first one, and takes the steps of one pass,
whatever its plan says: so step n is the same rows in every stage and in every other arm.
"""

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stagetune_api.facts import Facts
from stagetune_api.files import write_file_atomically
from stagetune_api.names import RunLayout, newest_attempt
from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.report import StageReport
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.stage import ParentRef, PlannedStage, StageConfig, Task
from stagetune_operator.estimate import Machine
from stagetune_operator.plan import Plan, make_plan
from staging_arms import Arm, manifest
from staging_process import FILL, READY, STEP, Measured, run_process
from trainer_tasks import spec_of, task_config

TRAINER = (sys.executable, "-m", "stagetune_trainer")
_FILLING = re.compile(r"^computing .*\bprefix-\d+$")
_FILLED = re.compile(r"\bprefix-\d+ is there, after")


class Run:
    """The folder of the runs: prepared once, its stages made anew by each arm."""

    def __init__(self, work: Path, env: Mapping[str, str], model_source: str) -> None:
        self.work = work
        self.env = env
        self.model_source = model_source
        self.layout = RunLayout(work / "run")
        self._facts: Facts | None = None

    @property
    def facts(self) -> Facts:
        """What prepare measured; the Task is done the first time."""
        if self._facts is None:
            layout = self.layout.task("prepare")
            config = self._config(spec_of(manifest_of_none(self.model_source)), Task.PREPARE)
            report = self._task(config, layout.root, TRAINER)[1]
            if report.facts is None:
                raise RuntimeError("prepare left no facts")
            self._facts = report.facts
        return self._facts

    @property
    def model_directory(self) -> Path:
        """The base model as prepare left it: what every arm trains."""
        return Path(self.facts.model_directory)

    def stages(self, arm: Arm) -> tuple[StagedFineTuneSpec, list[PlannedStage]]:
        """Return the arm's spec and the stages of its plan, cut to one pass in one order.

        A cached arm has a cache below every stage, also where one pass alone is not worth it.
        """
        spec = spec_of(manifest(arm, self.facts.model.num_layers, self.model_source))
        plan = make_plan(spec, self.facts, Machine(is_gpu=False))
        if not isinstance(plan, Plan):
            raise SystemExit("\n".join(f"{problem.path}: {problem.message}" for problem in plan))
        steps = -(-self.facts.data.train_rows // spec.training.batch_size)
        same = {"index": 0, "steps": steps, "validation_interval": steps, "warmup_steps": 0}
        stages = [stage.model_copy(update=same) for stage in plan.stages]
        return spec, [with_cache(stage) if arm.cached else stage for stage in stages]

    def write_stage_file(self, arm: Arm, path: Path) -> None:
        """Write the file of the arm's first stage: from it `staging_rows` knows the batches."""
        spec, stages = self.stages(arm)
        config = self._config(spec, Task.TRAIN, stage=stages[0])
        write_file_atomically(path, config.model_dump_json(indent=2))

    def train(
        self, arm: Arm, program: Sequence[str] = TRAINER, *, steps: int | None = None
    ) -> list[tuple[PlannedStage, Measured, StageReport]]:
        """Train the arm's stages one after the other and return each with what was measured.

        `program` is given the stage's file; `steps` are fewer than those of a pass.
        """
        shutil.rmtree(self.layout.stages, ignore_errors=True)
        shutil.rmtree(self.layout.cache, ignore_errors=True)
        spec, stages = self.stages(arm)
        chain: list[ParentRef] = []
        found = []
        for planned in stages:
            stage = planned
            if steps is not None:
                stage = planned.model_copy(update={"steps": steps, "validation_interval": steps})
            config = self._config(spec, Task.TRAIN, stage=stage, chain=list(chain))
            layout = self.layout.stage(stage.directory)
            measured, report = self._task(config, layout.root, program)
            if report.output is None:
                raise RuntimeError(f"{stage.name} left no output")
            if _uses_cache(stage) and not (measured.of(FILL) and measured.of(READY)):
                raise RuntimeError(f"{stage.name} did not say when it computed hidden states")
            chain = [*chain, ParentRef(path=str(layout.output), digest=report.output.digest)]
            found.append((stage, measured, report))
        return found

    def _task(
        self, config: StageConfig, directory: Path, program: Sequence[str]
    ) -> tuple[Measured, StageReport]:
        directory.mkdir(parents=True, exist_ok=True)
        config = config.model_copy(update={"attempt": newest_attempt(directory / "fence") + 1})
        file = directory / "stage.json"
        write_file_atomically(file, config.model_dump_json(indent=2))
        measured = run_process(
            [*program, str(file)], env=self.env, log=directory / "log.txt", read=read_progress
        )
        report = StageReport.model_validate_json((directory / "report.json").read_bytes())
        return measured, report

    def _config(self, spec: StagedFineTuneSpec, task: Task, **rest: Any) -> StageConfig:
        return task_config(
            spec,
            task,
            name="staging",
            run_directory=self.layout.root,
            work=self.work,
            facts=self.facts if task is not Task.PREPARE else None,
            **rest,
        )


def with_cache(stage: PlannedStage) -> PlannedStage:
    planned = stage.prefix_cache
    if planned is None or planned.used:
        return stage
    used = planned.model_copy(update={"used": True, "reason": "asked for by the benchmark"})
    return stage.model_copy(update={"prefix_cache": used})


def _uses_cache(stage: PlannedStage) -> bool:
    return stage.prefix_cache is not None and stage.prefix_cache.used


def manifest_of_none(model_source: str) -> dict[str, Any]:
    """Return a manifest for prepare, which asks for nothing of the stages."""
    return manifest(Arm(name="prepare", title="", program="stagetune"), 1, model_source)


def read_progress(line: str) -> str | None:
    """Return the mark that a line of a trainer's progress sets."""
    try:
        progress = Progress.model_validate(json.loads(line))
    except ValueError:
        return None
    message = progress.message or ""
    if progress.kind is ProgressKind.STEP:
        return STEP
    if progress.kind is ProgressKind.MESSAGE and _FILLING.search(message):
        return FILL
    if progress.kind is ProgressKind.MESSAGE and _FILLED.search(message):
        return READY
    return None
