"""Stage files: from a run's plan to what each of its trainer processes is given.

The paths are those inside a pod (`names`), the same in every pod of a run, so a report's paths mean
the same to all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stagetune_api import names
from stagetune_api.facts import Facts
from stagetune_api.names import RunLayout
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.spec_checks import num_gpus
from stagetune_api.stage import (
    ParentRef,
    PlannedStage,
    StageConfig,
    Task,
    plan_engine,
    training_of_stage,
)
from stagetune_api.training_spec import ProtectionSpec
from stagetune_operator.ownership import Owner


@dataclass(frozen=True, kw_only=True)
class Step:
    """One task of a run, in the order in which they are done."""

    task: Task
    stage: PlannedStage | None = None

    @property
    def key(self) -> str:
        """The task's label: `prepare`, `01-layers-0-7`, `evaluate`, `export`."""
        return self.stage.directory if self.stage is not None else self.task.value.lower()

    @property
    def title(self) -> str:
        """The task as people call it."""
        return self.stage.name if self.stage is not None else self.task.value.lower()


PREPARE = Step(task=Task.PREPARE)


def steps_after_prepare(stages: Sequence[PlannedStage]) -> list[Step]:
    """Return what follows once the stages are known."""
    train = [Step(task=Task.TRAIN, stage=stage) for stage in stages]
    return [*train, Step(task=Task.EVALUATE), Step(task=Task.EXPORT)]


def run_layout(owner: Owner) -> RunLayout:
    """Return where the run's files lie in its pods."""
    return RunLayout(Path(names.VOLUME_MOUNT) / owner.directory)


def build_stage_file(
    owner: Owner,
    spec: StagedFineTuneSpec,
    step: Step,
    *,
    facts: Facts | None = None,
    stages: Sequence[PlannedStage] = (),
    digests: Sequence[str] = (),
    micro_batch_size: int | None = None,
    averaging_alpha: float | None = None,
) -> StageConfig:
    """Return the file for `step`, which goes on from the outputs with `digests`, oldest first."""
    layout = run_layout(owner)
    has_models_claim = spec.storage is not None and spec.storage.models_claim_name is not None
    training = training_of_stage(spec.training, step.stage)
    if micro_batch_size is not None:
        training = training.model_copy(update={"micro_batch_size": micro_batch_size})
    chain = [
        ParentRef(path=str(layout.stage(stage.directory).output), digest=digest)
        for stage, digest in zip(stages, digests, strict=False)
    ]
    values: dict[str, object] = {"retain": spec.storage.retain} if spec.storage else {}
    if facts is not None:
        values |= {
            "model_directory": facts.model_directory,
            "model_digest": facts.model.digest,
            "data_digest": facts.data.digest,
        }
    return StageConfig.model_validate(
        {
            "task": step.task,
            "run_name": owner.name,
            "run_directory": str(layout.root),
            "models_directory": (
                names.MODELS_MOUNT if has_models_claim else f"{names.VOLUME_MOUNT}/models"
            ),
            # There is no manifest beside a pod: file:// sources were refused before.
            "manifest_directory": "/",
            "claims_directory": names.CLAIMS_MOUNT,
            "model": spec.model,
            "dataset": spec.dataset,
            "method": spec.method,
            "training": training,
            "protection": spec.protection or ProtectionSpec(),
            "gradient_norm": spec.gradient_profile if step.task is Task.PREPARE else None,
            "evaluation": spec.evaluation,
            "export": spec.export,
            "stage": step.stage if step.task is Task.TRAIN else None,
            "engine": (
                plan_engine(spec.runtime, num_gpus=num_gpus(spec))
                if step.task is Task.TRAIN
                else None
            ),
            "chain": chain,
            "stages": list(stages) if step.task in (Task.EVALUATE, Task.EXPORT) else [],
            "averaging_alpha": averaging_alpha if step.task is Task.EXPORT else None,
            **values,
        }
    )
