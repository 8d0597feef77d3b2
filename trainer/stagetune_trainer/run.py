"""run_task: one StageConfig in, one StageReport out, whatever happens in between."""

import contextlib
import errno
import logging
import os
import time
import traceback
from pathlib import Path

import torch

from stagetune_api import names
from stagetune_api.artifact import ArtifactError
from stagetune_api.files import write_file_atomically
from stagetune_api.names import TrainerExitCode
from stagetune_api.report import Failure, FailureClass, Outcome, StageReport
from stagetune_api.stage import StageConfig, Task
from stagetune_trainer.checkpoint import Fence, ReadersFence
from stagetune_trainer.errors import DivergedError, FencedError, InterruptedRunError, UserError
from stagetune_trainer.hub_tokens import redacted
from stagetune_trainer.loop import StopRequest
from stagetune_trainer.metrics import HistoryFile, ProgressLog, ProgressSink, StandardOutput
from stagetune_trainer.progress_post import ProgressPoster, ProgressServer
from stagetune_trainer.ranks import ALONE, is_first, join_ranks, leave_ranks
from stagetune_trainer.start_clock import StartClock

logger = logging.getLogger(__name__)

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


def task_layout(config: StageConfig) -> names.StageLayout:
    """Return where the records of the task lie."""
    layout = names.RunLayout(Path(config.run_directory))
    if config.stage is not None and config.task is Task.TRAIN:
        return layout.stage(config.stage.directory)
    return layout.task(config.task.value.lower())


def task_name(config: StageConfig) -> str:
    """Return the stage's name, or the task's in lower case."""
    if config.stage is not None and config.task is Task.TRAIN:
        return config.stage.name
    return config.task.value.lower()


def run_task(
    config: StageConfig,
    stop: StopRequest,
    *,
    clock: StartClock | None = None,
    metrics_port: int | None = None,
) -> tuple[StageReport, TrainerExitCode]:
    """Do the task, write its report beside its records, and return it with the exit code.

    A file without an attempt gets the next free number first, and everything after goes by that.
    Never raises for what can go wrong in a task: each failure has a class, and the class a code.
    """
    clock = clock or StartClock()
    if config.engine is not None and not is_first():
        return _follow(config, stop, clock)
    layout = task_layout(config)
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
        fence = Fence(layout.fence, config.attempt)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the border of the process
        report, code = failed(config, error)
        if config.attempt > 0 and code is not TrainerExitCode.FENCED:
            _write_report(layout, report)
        return report, code
    config = config.model_copy(update={"attempt": fence.attempt})
    log = _progress_log(config, layout, fence, clock, metrics_port)
    report, code = _attempt(config, log, stop, fence, clock)
    # Asked to stop while the last post goes out: the task has ended all the same.
    with contextlib.suppress(KeyboardInterrupt):
        log.close(report)
    return report, code


def _follow(
    config: StageConfig, stop: StopRequest, clock: StartClock
) -> tuple[StageReport, TrainerExitCode]:
    """Do a stage beside the process that writes and reports."""
    log = ProgressLog(task=config.task, name=task_name(config), attempt=config.attempt, sinks=())
    try:
        return _do(config, log, stop, ReadersFence(), clock), TrainerExitCode.SUCCEEDED
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the border of the process
        return failed(config, error)


def _progress_log(
    config: StageConfig,
    layout: names.StageLayout,
    fence: Fence,
    clock: StartClock,
    metrics_port: int | None,
) -> ProgressLog:
    """Return the log of a claimed attempt, with everybody who wants to be told."""
    sinks: list[ProgressSink] = [StandardOutput(), clock]
    if config.task is Task.TRAIN:
        sinks.insert(0, HistoryFile(layout.metrics, before_write=fence.check))
    server = ProgressServer.from_environment(os.environ)
    if server is not None:
        sinks.append(ProgressPoster(config, server))
    if metrics_port is not None:
        # Imported only where somebody asks for it: local runs do without.
        from stagetune_trainer.prometheus import PrometheusMetrics

        namespace = os.environ.get("POD_NAMESPACE", "")
        sinks.append(
            PrometheusMetrics(config, task_name(config), port=metrics_port, namespace=namespace)
        )
    return ProgressLog(
        task=config.task, name=task_name(config), attempt=config.attempt, sinks=sinks
    )


def _attempt(
    config: StageConfig, log: ProgressLog, stop: StopRequest, fence: Fence, clock: StartClock
) -> tuple[StageReport, TrainerExitCode]:
    """Do the task under a claimed number, and leave its report unless a newer one has begun."""
    layout = task_layout(config)
    try:
        report = _do(config, log, stop, fence, clock)
        seconds = report.seconds + time.monotonic() - clock.started
        report = report.model_copy(update={"seconds": seconds, "timings": clock.timings()})
        # The report belongs to the newest attempt, like everything else that is published.
        fence.check()
        write_file_atomically(layout.report, report.model_dump_json(indent=2))
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the border of the process
        report, code = failed(config, _fenced_or(error, fence))
        report = report.model_copy(update={"timings": clock.timings()})
        if code is not TrainerExitCode.FENCED:
            _write_report(layout, report)
        return report, code
    return report, TrainerExitCode.SUCCEEDED


def _fenced_or(error: BaseException, fence: Fence) -> BaseException:
    """Return `error`, unless a newer attempt explains it: that one may have removed our drafts."""
    try:
        fence.check()
    except FencedError:
        return FencedError(f"attempt {fence.attempt} is over: {error}")
    except OSError:
        # The volume is away; that is what `error` says.
        return error
    return error


def _write_report(layout: names.StageLayout, report: StageReport) -> None:
    with contextlib.suppress(OSError):
        write_file_atomically(layout.report, report.model_dump_json(indent=2))


def _do(
    config: StageConfig, log: ProgressLog, stop: StopRequest, fence: Fence, clock: StartClock
) -> StageReport:
    """Do the task; each one's modules are imported only where they are needed."""
    # As use_deterministic_algorithms, which imports torch's compiler to tell it too.
    torch.set_deterministic_debug_mode("warn")
    # No result reads memory that was not written; filling it would cost time at every allocation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    match config.task:
        case Task.PREPARE:
            from stagetune_trainer.data.prepare import prepare_task

            clock.imported()
            return prepare_task(config, log, fence)
        case Task.TRAIN:
            from stagetune_trainer.train import train_stage

            clock.imported()
            ranks = join_ranks() if config.engine is not None else ALONE
            report = train_stage(config, log, stop, fence, clock, ranks)
            leave_ranks()
            return report
        case Task.EVALUATE:
            from stagetune_trainer.evaluate import evaluate

            clock.imported()
            return evaluate(config, log)
        case Task.EXPORT:
            from stagetune_trainer.export import export

            clock.imported()
            return export(config, log, fence)


def failed(config: StageConfig, error: BaseException) -> tuple[StageReport, TrainerExitCode]:
    """Return the report of a task that `error` ended, and the exit code; logs what nobody expects.

    No token is in it, whatever a library put into its error's text.
    """
    failure_class, code = classify(error)
    expected = isinstance(
        error,
        (UserError, InterruptedRunError, KeyboardInterrupt, FencedError, DivergedError),
    )
    if not expected:
        logger.error("%s failed", config.task, exc_info=error)
    tail = "" if expected else redacted("".join(traceback.format_exception(error)))[-4000:]
    interrupted = code is TrainerExitCode.INTERRUPTED
    message = redacted(str(error) or type(error).__name__)
    artifact = str(error.path)[:4096] if isinstance(error, ArtifactError) else None
    report = StageReport(
        task=config.task,
        name=task_name(config),
        attempt=config.attempt,
        outcome=Outcome.INTERRUPTED if interrupted else Outcome.FAILED,
        failure=Failure(
            failure_class=failure_class,
            exit_code=int(code),
            message=message[:8192],
            log_tail=tail,
            artifact=artifact,
        ),
    )
    return report, code


def classify(error: BaseException) -> tuple[FailureClass, TrainerExitCode]:
    """Return what kind of failure `error` is and the exit code that says so."""
    match error:
        case UserError():
            return FailureClass.USER_ERROR, TrainerExitCode.USER_ERROR
        case InterruptedRunError() | KeyboardInterrupt():
            return FailureClass.DISRUPTED, TrainerExitCode.INTERRUPTED
        case FencedError():
            return FailureClass.FENCED, TrainerExitCode.FENCED
        case DivergedError():
            return FailureClass.DIVERGED, TrainerExitCode.DIVERGED
        case torch.OutOfMemoryError() | MemoryError():
            return FailureClass.OUT_OF_MEMORY, TrainerExitCode.OUT_OF_MEMORY
        case ArtifactError():
            return FailureClass.STORAGE_ERROR, TrainerExitCode.STORAGE_ERROR
        case OSError(errno=number) if number in _FULL_DISK:
            return FailureClass.STORAGE_FULL, TrainerExitCode.STORAGE_FULL
        case OSError():
            return FailureClass.STORAGE_ERROR, TrainerExitCode.STORAGE_ERROR
        # torch's CPU allocator raises a plain RuntimeError.
        case RuntimeError() if "DefaultCPUAllocator" in str(error):
            return FailureClass.OUT_OF_MEMORY, TrainerExitCode.OUT_OF_MEMORY
        case _:
            return FailureClass.INTERNAL, TrainerExitCode.INTERNAL
