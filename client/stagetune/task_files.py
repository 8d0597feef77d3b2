"""What each trainer process of a run on this machine is given."""

from collections.abc import Sequence

from stagetune.manifest_file import ManifestFile
from stagetune.run_record import read_report
from stagetune_api import names
from stagetune_api.facts import Facts
from stagetune_api.names import RunLayout, StageLayout
from stagetune_api.report import Outcome
from stagetune_api.spec import RuntimeSpec, Standby
from stagetune_api.stage import (
    ParentRef,
    PlannedStage,
    StageConfig,
    Task,
    plan_engine,
    training_of_stage,
)
from stagetune_api.training_spec import ProtectionSpec
from stagetune_operator.plan import Plan

Foreseen = tuple[StageConfig, StageLayout]
"""A stage file as far as it is known before its task is due, and where the task's records lie."""


class TaskFiles:
    """Builds the files of one run."""

    def __init__(self, file: ManifestFile, layout: RunLayout) -> None:
        self._file = file
        self._spec = file.manifest.spec
        self._layout = layout

    def build(
        self,
        task: Task,
        layout: StageLayout,
        facts: Facts | None = None,
        *,
        stage: PlannedStage | None = None,
        chain: Sequence[ParentRef] = (),
        stages: Sequence[PlannedStage] = (),
        averaging_alpha: float | None = None,
    ) -> StageConfig:
        """Return the file that a trainer is given for its next attempt at `task`."""
        return StageConfig(
            task=task,
            run_name=self._file.manifest.metadata.name,
            attempt=names.newest_attempt(layout.fence) + 1,
            run_directory=str(self._layout.root),
            models_directory=str(self._layout.root.parent / "_models"),
            manifest_directory=str(self._file.directory),
            model=self._spec.model,
            dataset=self._spec.dataset,
            method=self._spec.method,
            training=training_of_stage(self._spec.training, stage),
            protection=self._spec.protection or ProtectionSpec(),
            gradient_norm=self._spec.gradient_profile if task is Task.PREPARE else None,
            evaluation=self._spec.evaluation,
            export=self._spec.export,
            model_directory=facts.model_directory if facts else None,
            model_digest=facts.model.digest if facts else None,
            data_digest=facts.data.digest if facts else None,
            stage=stage,
            engine=plan_engine(self._spec.runtime) if task is Task.TRAIN else None,
            chain=list(chain),
            stages=list(stages),
            averaging_alpha=averaging_alpha,
        )

    def after(
        self, stage: PlannedStage, plan: Plan, facts: Facts, chain: Sequence[ParentRef]
    ) -> Foreseen | None:
        """Return what the process after `stage` can be started with before `stage` is done.

        None where none is to stand by, or where its task is done already.
        """
        runtime = self._spec.runtime or RuntimeSpec()
        follower = next(iter(plan.stages[stage.index + 1 :]), None)
        is_shared = plan_engine(self._spec.runtime) is not None
        # The evaluation's file has to name a chain, and of one stage there is none yet.
        if runtime.standby is Standby.NEVER or is_shared or len(plan.stages) < 2:
            return None
        task = Task.TRAIN if follower is not None else Task.EVALUATE
        layout = self._layout.task(task.value.lower())
        if follower is not None:
            layout = self._layout.stage(follower.directory)
        report = read_report(layout)
        if report is not None and report.outcome is Outcome.SUCCEEDED:
            return None
        stages = plan.stages if follower is None else []
        return self.build(task, layout, facts, stage=follower, chain=chain, stages=stages), layout
