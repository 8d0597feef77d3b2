"""A run on this machine: the operator's story with processes in the place of pods.

The steps are those of docs/architecture.md, "The story of one run": prepare, plan, one process per
stage, evaluate, export. Everything that is done and still verifies is left alone, so the same
command starts a run, goes on with it and shows it once it is finished.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from stagetune.listeners import Listeners
from stagetune.manifest_file import ManifestFile
from stagetune.run_lock import RunIsBusyError, locked
from stagetune.run_record import (
    changed_fields,
    changed_inputs,
    finished_report,
    read_plan,
    read_report,
)
from stagetune.run_report import write_run_report
from stagetune.standby import Standby, is_near_its_end
from stagetune.status_board import StatusBoard
from stagetune.task_files import Foreseen, TaskFiles
from stagetune.trainer_process import Interruption, log_tail
from stagetune_api import names
from stagetune_api.artifact import ArtifactError, ArtifactKind, verify_artifact
from stagetune_api.facts import Facts
from stagetune_api.files import write_file_atomically
from stagetune_api.names import RunLayout, StageLayout, TrainerExitCode
from stagetune_api.problems import InvalidManifestError
from stagetune_api.progress import Progress
from stagetune_api.report import Failure, FailureClass, StageReport
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.spec_checks import Runner, check_runner
from stagetune_api.stage import (
    EnginePlan,
    ParentRef,
    PlannedStage,
    StageConfig,
    Task,
    plan_engine,
)
from stagetune_api.status import (
    ConditionReason,
    ConditionType,
    RunState,
    StageState,
)
from stagetune_operator.estimate import Machine
from stagetune_operator.gradient_groups import describe_gradients
from stagetune_operator.plan import Plan, make_plan

_LOCK_WAIT_SECONDS = 60.0


class RunFailedError(Exception):
    """A task of the run failed; the status says which and why."""

    def __init__(self, where: str, failure: Failure) -> None:
        self.where = where
        self.failure = failure
        super().__init__(f"{where}: {failure.message}")


class RunInterruptedError(Exception):
    """The run was asked to stop; says whether it could save before."""


def run_locally(
    file: ManifestFile,
    run_directory: Path,
    listeners: Listeners = Listeners(),  # noqa: B008 - frozen
) -> Path:
    """Bring the run in `run_directory` to its end and return the path of its report.

    Raises InvalidManifestError with all problems before anything is trained, RunFailedError,
    RunInterruptedError after saving, and RunIsBusyError where another process has the run. What
    only a cluster can run, and a changed manifest, are refused before anything is written.
    """
    layout = RunLayout(run_directory.resolve())
    problems = [
        *file.with_lines(check_runner(file.manifest.spec, Runner.LOCAL)),
        *changed_fields(file.manifest, layout),
    ]
    if problems:
        raise InvalidManifestError(problems)
    interruption = Interruption()
    lock = locked(
        layout.lock,
        wait_seconds=_LOCK_WAIT_SECONDS,
        on_wait=listeners.on_message,
        gives_up=interruption.is_requested,
    )
    try:
        with interruption.handled(), lock as descriptor:
            return _Run(file, layout, listeners, interruption, descriptor).to_its_end()
    except RunIsBusyError:
        if interruption.is_requested():
            raise RunInterruptedError("nothing was at work") from None
        raise


def cluster_sections(spec: StagedFineTuneSpec) -> list[str]:
    """Return the paths of what `spec` gives and a run on this machine passes over."""
    counted_here = {"engine", "processes_per_node", "deepspeed", "standby"}
    runtime = spec.runtime
    sections = {
        "runtime": runtime and runtime.model_dump(exclude=counted_here, exclude_defaults=True),
        "storage": spec.storage,
        "retry": spec.retry,
    }
    return [f"spec.{name}" for name, section in sections.items() if section]


class _Run:
    """One pass over a run: what is missing is done, in order."""

    def __init__(
        self,
        file: ManifestFile,
        layout: RunLayout,
        listeners: Listeners,
        interruption: Interruption,
        lock_descriptor: int,
    ) -> None:
        self._file = file
        self._spec = file.manifest.spec
        self._layout = layout
        self._listeners = listeners
        self._interruption = interruption
        self._files = TaskFiles(file, layout)
        self._standby = Standby(lock_descriptor)
        self._board = StatusBoard(layout.status, on_change=listeners.on_status)

    def to_its_end(self) -> Path:
        """Do what is missing and return the path of the run's report."""
        try:
            return self._do_what_is_missing()
        finally:
            self._standby.end()

    def _do_what_is_missing(self) -> Path:
        text = self._file.manifest.model_dump_json(indent=2, exclude_none=True)
        write_file_atomically(self._layout.root / names.RUN_MANIFEST_FILE, text)
        self._board.passed(ConditionType.VALIDATED, ConditionReason.VALID)
        facts, machine = self._prepare()
        plan = self._plan(facts, machine)
        chain = self._train(plan, facts)
        alpha = self._evaluate(plan, facts, chain)
        export = self._export(plan, facts, chain, alpha)
        report = write_run_report(self._layout, self._file.manifest, plan)
        self._board.succeeded(export)
        return report

    def _prepare(self) -> tuple[Facts, Machine]:
        """Fetch and tokenise, unless that is done with the same input and still verifies."""
        layout = self._layout.task("prepare")
        config = self._files.build(Task.PREPARE, layout)
        report = finished_report(layout, config)
        facts = report.facts if report else None
        if facts is None or not self._is_sound(facts):
            self._board.enter(RunState.PREPARING, ConditionReason.PREPARING)
            report = self._run_task(config, layout, ConditionReason.PREPARE_FAILED)
            facts = report.facts
        if facts is None or report is None:
            raise RuntimeError("prepare succeeded without facts")
        self._board.passed(
            ConditionType.PREPARED,
            ConditionReason.PREPARED,
            f"{facts.data.train_rows} training and {facts.data.validation_rows} validation rows",
        )
        return facts, _machine(report, plan_engine(self._spec.runtime))

    def _is_sound(self, facts: Facts) -> bool:
        """Whether what prepare left is still there to the last bit."""
        try:
            verify_artifact(
                Path(facts.model_directory),
                digest=facts.model.digest,
                kind=ArtifactKind.BASE_MODEL,
            )
            verify_artifact(self._layout.data, digest=facts.data.digest, kind=ArtifactKind.DATASET)
        except ArtifactError as error:
            self._listeners.on_message(f"preparing again: {error}")
            return False
        return True

    def _plan(self, facts: Facts, machine: Machine) -> Plan:
        """Return the run's plan: the one it was started with, or a new one."""
        # A later version may plan differently; a run that has begun keeps its plan.
        plan = read_plan(self._layout)
        if plan is not None:
            problems = changed_inputs(plan, facts)
        else:
            result = make_plan(self._spec, facts, machine)
            plan, problems = (None, result) if isinstance(result, list) else (result, [])
            if plan is not None and plan.gradients is not None:
                self._listeners.on_message(describe_gradients(plan.gradients))
        if plan is None or problems:
            self._board.refused(problems)
            raise InvalidManifestError(problems)
        write_file_atomically(self._layout.plan, plan.model_dump_json(indent=2))
        self._board.planned(
            plan.stages,
            plan_digest=plan.digest,
            model_digest=facts.model.digest or "",
            data_digest=facts.data.digest or "",
        )
        return plan

    def _train(self, plan: Plan, facts: Facts) -> list[ParentRef]:
        """Train every stage that is not done, and return the chain of their outputs."""
        chain: list[ParentRef] = []
        for stage in plan.stages:
            layout = self._layout.stage(stage.directory)
            config = self._files.build(Task.TRAIN, layout, facts, stage=stage, chain=chain)
            report = finished_report(layout, config)
            if report is None or not self._output_is_sound(stage, report):
                foreseen = self._files.after(stage, plan, facts, chain)
                report = self._train_stage(stage, config, layout, foreseen)
            if report.output is None:
                raise RuntimeError(f"{stage.name} succeeded without an output")
            self._board.stage_done(stage.index, report)
            # By the layout and not by the report, so that a run's folder can be moved.
            chain.append(ParentRef(path=str(layout.output), digest=report.output.digest))
        self._board.passed(ConditionType.TRAINED, ConditionReason.TRAINED)
        return chain

    def _train_stage(
        self,
        stage: PlannedStage,
        config: StageConfig,
        layout: StageLayout,
        foreseen: Foreseen | None,
    ) -> StageReport:
        self._board.enter(RunState.TRAINING, ConditionReason.TRAINING)
        self._board.stage_started(stage.index, config.attempt)

        def on_progress(progress: Progress) -> None:
            self._board.stage_progressed(stage.index, progress)
            is_leaving = self._interruption.is_requested()
            if foreseen is not None and is_near_its_end(progress) and not is_leaving:
                self._standby.begin(*foreseen)

        try:
            return self._run_task(
                config, layout, ConditionReason.STAGE_FAILED, on_progress=on_progress
            )
        except RunInterruptedError:
            self._board.stage_ended(stage.index, StageState.INTERRUPTED, None)
            raise
        except RunFailedError as error:
            self._board.stage_ended(stage.index, StageState.FAILED, error.failure)
            raise

    def _output_is_sound(self, stage: PlannedStage, report: StageReport) -> bool:
        """Whether a finished stage's output is still there to the last bit."""
        if report.output is None:
            return False
        try:
            verify_artifact(
                self._layout.stage(stage.directory).output,
                digest=report.output.digest,
                kind=ArtifactKind.STAGE_OUTPUT,
            )
        except ArtifactError as error:
            self._listeners.on_message(
                f"{stage.name} is trained again from its last good checkpoint: {error}"
            )
            self._board.stage_reset(stage.index)
            return False
        return True

    def _evaluate(self, plan: Plan, facts: Facts, chain: list[ParentRef]) -> float | None:
        """Measure, and return the share of the tuned weights where it was chosen there."""
        layout = self._layout.task("evaluate")
        config = self._files.build(Task.EVALUATE, layout, facts, chain=chain, stages=plan.stages)
        report = finished_report(layout, config)
        if report is None:
            self._board.enter(RunState.EVALUATING, ConditionReason.EVALUATING)
            report = self._run_task(config, layout, ConditionReason.EVALUATION_FAILED)
        if report.evaluation is None:
            raise RuntimeError("the evaluation succeeded without a result")
        self._board.evaluated(report.evaluation)
        averaging = report.evaluation.averaging
        return averaging.chosen if averaging is not None else None

    def _export(
        self, plan: Plan, facts: Facts, chain: list[ParentRef], averaging_alpha: float | None
    ) -> str:
        layout = self._layout.task("export")
        config = self._files.build(
            Task.EXPORT,
            layout,
            facts,
            chain=chain,
            stages=plan.stages,
            averaging_alpha=averaging_alpha,
        )
        report = finished_report(layout, config)
        if report is None or not self._export_is_sound(report):
            self._board.enter(RunState.EXPORTING, ConditionReason.EXPORTING)
            report = self._run_task(config, layout, ConditionReason.EXPORT_FAILED)
        self._board.passed(ConditionType.EXPORTED, ConditionReason.EXPORTED)
        return str(self._layout.export)

    def _export_is_sound(self, report: StageReport) -> bool:
        if report.output is None:
            return False
        try:
            verify_artifact(
                self._layout.export, digest=report.output.digest, kind=ArtifactKind.EXPORT
            )
        except ArtifactError as error:
            self._listeners.on_message(f"exporting again: {error}")
            return False
        return True

    def _run_task(
        self,
        config: StageConfig,
        layout: StageLayout,
        reason: ConditionReason,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> StageReport:
        """Run a trainer process and return its report; raise if it did not succeed."""
        if self._interruption.is_requested():
            self._board.interrupted()
            raise RunInterruptedError("nothing was at work")
        layout.report.unlink(missing_ok=True)

        def tell(progress: Progress) -> None:
            on_progress(progress)
            self._listeners.on_progress(progress)

        code = self._standby.start(config, layout).follow(tell, self._interruption)
        report = read_report(layout)
        if code == TrainerExitCode.SUCCEEDED and report is not None:
            return report
        if code == TrainerExitCode.INTERRUPTED or (code < 0 and self._interruption.is_requested()):
            self._board.interrupted()
            saved = code > 0 and config.task is Task.TRAIN
            raise RunInterruptedError("saved" if saved else "ended without saving")
        failure = report.failure if report and report.failure else _died(code, layout)
        self._board.failed(reason, failure)
        raise RunFailedError(config.stage.name if config.stage else config.task.value, failure)


def _machine(prepare: StageReport, engine: EnginePlan | None) -> Machine:
    """Return what the plan has to fit into: the GPU that prepare saw, or this machine's memory."""
    if prepare.device == "cuda":
        return Machine(is_gpu=True, engine=engine)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if engine is not None:
        memory_bytes //= engine.num_processes
    return Machine(is_gpu=False, memory_bytes=memory_bytes, engine=engine)


def _died(code: int, layout: StageLayout) -> Failure:
    """Return the failure of a process that left no report."""
    how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
    if code == -signal.SIGKILL:
        how += " (by the kernel, if the machine ran out of memory)"
    return Failure(
        failure_class=FailureClass.INTERNAL if code >= 0 else FailureClass.DISRUPTED,
        exit_code=code,
        message=f"the trainer {how} without a report; the same command goes on from the last "
        f"checkpoint (log: {layout.log})",
        log_tail=log_tail(layout),
    )
