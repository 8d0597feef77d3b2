"""run_task: one StageConfig in, one StageReport out, whatever happens in between."""

import contextlib
import errno
import logging
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
from stagetune_trainer.checkpoint import Fence
from stagetune_trainer.errors import DivergedError, FencedError, InterruptedRunError, UserError
from stagetune_trainer.loop import StopRequest
from stagetune_trainer.metrics import ProgressLog

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
    config: StageConfig, stop: StopRequest, *, started: float | None = None
) -> tuple[StageReport, TrainerExitCode]:
    """Do the task, write its report beside its records, and return it with the exit code.

    `started` is the monotonic time at which the process began. Never raises for what can go wrong
    in a task: each failure has a class, and the class a code.
    """
    started = time.monotonic() if started is None else started
    layout = task_layout(config)
    history = layout.metrics if config.task is Task.TRAIN else None
    log = ProgressLog(
        task=config.task, name=task_name(config), attempt=config.attempt, history=history
    )
    try:
        layout.root.mkdir(parents=True, exist_ok=True)
        fence = Fence(layout.fence, config.attempt)
        report, code = _do(config, log, stop, fence, started), TrainerExitCode.SUCCEEDED
        report = report.model_copy(update={"seconds": report.seconds + time.monotonic() - started})
        write_file_atomically(layout.report, report.model_dump_json(indent=2))
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the border of the process
        if names.newest_attempt(layout.fence) > config.attempt:
            error = FencedError(f"attempt {config.attempt} is over: {error}")
        report, code = _failed(config, error)
        # A fenced attempt says nothing: the report belongs to the newer one.
        if code is not TrainerExitCode.FENCED:
            with contextlib.suppress(OSError):
                write_file_atomically(layout.report, report.model_dump_json(indent=2))
    return report, code


def _do(
    config: StageConfig, log: ProgressLog, stop: StopRequest, fence: Fence, started: float
) -> StageReport:
    """Do the task; each one's modules are imported only where they are needed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    # No result reads memory that was not written; filling it would cost time at every allocation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    match config.task:
        case Task.PREPARE:
            from stagetune_trainer.data.prepare import prepare_task

            return prepare_task(config, log, fence)
        case Task.TRAIN:
            from stagetune_trainer.train import train_stage

            return train_stage(config, log, stop, fence, started)
        case Task.EVALUATE:
            from stagetune_trainer.evaluate import evaluate

            return evaluate(config, log)
        case Task.EXPORT:
            from stagetune_trainer.export import export

            return export(config, log, fence)


def _failed(config: StageConfig, error: BaseException) -> tuple[StageReport, TrainerExitCode]:
    failure_class, code = classify(error)
    expected = isinstance(
        error,
        (UserError, InterruptedRunError, KeyboardInterrupt, FencedError, DivergedError),
    )
    if not expected:
        logger.error("%s failed", config.task, exc_info=error)
    tail = "" if expected else "".join(traceback.format_exception(error))[-4000:]
    interrupted = code is TrainerExitCode.INTERRUPTED
    message = str(error) or type(error).__name__
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
