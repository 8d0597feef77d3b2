"""The run's report: what every task measured, put together into one file and one table.

No number is made here: each comes from a report that a trainer process wrote, or from the plan.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from stagetune_api.base import ApiModel
from stagetune_api.files import write_file_atomically
from stagetune_api.names import RunLayout
from stagetune_api.report import (
    AveragingResult,
    ModelScores,
    SampleAnswer,
    StageReport,
    StopReason,
)
from stagetune_api.spec import StagedFineTune
from stagetune_api.stage import StageEstimate
from stagetune_api.status import StageState
from stagetune_api.training_spec import LayerRange
from stagetune_operator.plan import Plan


class StageSummary(ApiModel):
    """One stage of a finished run."""

    name: str
    """name of the stage."""
    layers: LayerRange
    """layers that it opened."""
    top_layers: LayerRange | None = None
    """topLayers that it opened too, where some stayed frozen between them and `layers`."""
    state: StageState
    """state of the stage."""
    steps: int
    """steps that were taken."""
    best_step: int
    """bestStep whose weights were handed on."""
    stopped_by: StopReason | None = None
    """stoppedBy says what of earlyStopping ended the stage, where it ended before its last step."""
    learning_rate: float
    """learningRate at its highest."""
    trainable_parameters: int
    """trainableParameters of the stage."""
    seconds: float
    """seconds of its processes, imports and loading included."""
    train_seconds: float
    """trainSeconds in training steps."""
    tokens_per_second: float
    """tokensPerSecond in training steps."""
    padding_fraction: float | None = None
    """paddingFraction of the positions computed in training steps."""
    peak_memory_bytes: int
    """peakMemoryBytes of the process, or of the GPU where there is one."""
    estimated_peak_memory_bytes: int | None = None
    """estimatedPeakMemoryBytes by the plan: what of the estimate's memoryBytes peakMemoryBytes
    measures, which on a GPU leaves the device's context out."""
    peak_memory_ratio: float | None = None
    """peakMemoryRatio is estimatedPeakMemoryBytes over peakMemoryBytes: above 1, the plan takes the
    stage for larger than it was."""
    initial_validation_loss: float
    """initialValidationLoss before the stage's first step."""
    validation_loss: float
    """validationLoss of what it handed on."""
    general_loss: float | None = None
    """generalLoss of what it handed on, on text that was not trained on."""
    kl_to_base: float | None = None
    """klToBase of what it handed on: a lower bound of that over the whole vocabulary."""
    digest: str
    """digest of its output."""
    estimate: StageEstimate
    """estimate of the plan."""


class RunReport(ApiModel):
    """All that a finished run measured; the file report.json."""

    name: str
    """name of the run."""
    device: str
    """device that trained."""
    before: ModelScores
    """before is the base model."""
    after: ModelScores
    """after is the finished model."""
    exact_match_rows: int
    """exactMatchRows that were answered."""
    samples: list[SampleAnswer]
    """samples of answers before and after."""
    averaging: AveragingResult | None = None
    """averaging of base and tuned weights, where its share was left to the validation rows."""
    stages: Annotated[list[StageSummary], Field(max_length=128)]
    """stages in running order."""
    prepare_seconds: float
    """prepareSeconds of fetching and tokenising."""
    evaluation_seconds: float
    """evaluationSeconds of measuring both models."""
    export_seconds: float
    """exportSeconds of writing the result."""
    total_seconds: float
    """totalSeconds of all processes of the run; waiting between them is not in it."""
    export: str
    """export is the path of the exported folder."""
    plan_digest: str
    """planDigest of the plan."""
    model_digest: str | None
    """modelDigest of the base model."""
    data_digest: str | None
    """dataDigest of the tokenised rows."""


def write_run_report(layout: RunLayout, manifest: StagedFineTune, plan: Plan) -> Path:
    """Write report.json of a finished run from its tasks' reports and return its path."""
    prepare = _read(layout.task("prepare").report)
    evaluate = _read(layout.task("evaluate").report)
    export = _read(layout.task("export").report)
    if prepare.facts is None or evaluate.evaluation is None:
        raise ValueError(f"the reports in {layout.root} are not those of a finished run")
    stage_reports = [_read(layout.stage(stage.directory).report) for stage in plan.stages]
    stages = [_summarise(plan, index, report) for index, report in enumerate(stage_reports)]
    all_reports = [prepare, *stage_reports, evaluate, export]
    report = RunReport(
        name=manifest.metadata.name,
        device=stage_reports[-1].device,
        before=evaluate.evaluation.before,
        after=evaluate.evaluation.after,
        exact_match_rows=evaluate.evaluation.exact_match_rows,
        samples=evaluate.evaluation.samples,
        averaging=evaluate.evaluation.averaging,
        stages=stages,
        prepare_seconds=prepare.seconds,
        evaluation_seconds=evaluate.seconds,
        export_seconds=export.seconds,
        total_seconds=sum(report.seconds for report in all_reports),
        export=str(layout.export),
        plan_digest=plan.digest,
        model_digest=prepare.facts.model.digest,
        data_digest=prepare.facts.data.digest,
    )
    write_file_atomically(layout.run_report, report.model_dump_json(indent=2))
    return layout.run_report


def _read(path: Path) -> StageReport:
    return StageReport.model_validate_json(path.read_bytes())


def _summarise(plan: Plan, index: int, report: StageReport) -> StageSummary:
    stage, train = plan.stages[index], report.train
    estimated, peak = stage.estimate.peak_bytes(report.device), report.peak_memory_bytes
    if train is None or report.output is None:
        raise ValueError(f"the report of {stage.name} holds no result")
    return StageSummary(
        name=stage.name,
        layers=stage.layers,
        top_layers=stage.top_layers,
        state=StageState.SUCCEEDED,
        steps=train.steps,
        best_step=train.best_step,
        stopped_by=train.stopped_by,
        learning_rate=stage.learning_rate,
        trainable_parameters=train.trainable_parameters,
        seconds=report.seconds,
        train_seconds=train.train_seconds,
        tokens_per_second=train.tokens_per_second,
        padding_fraction=train.padding_fraction,
        peak_memory_bytes=peak,
        estimated_peak_memory_bytes=estimated,
        peak_memory_ratio=round(estimated / peak, 3) if peak else None,
        initial_validation_loss=train.initial_validation_loss,
        validation_loss=train.validation_loss,
        general_loss=train.general_loss,
        kl_to_base=train.kl_to_base,
        digest=report.output.digest,
        estimate=stage.estimate,
    )
