"""Why a task failed, and what follows from it: another attempt, an earlier stage again, or the end.

docs/reliability.md has the classes; here each meets its cure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from stagetune_api.names import TrainerExitCode
from stagetune_api.report import Failure, FailureClass
from stagetune_api.stage import PlannedStage, Task
from stagetune_api.training_spec import TrainingSpec
from stagetune_operator.stage_files import PREPARE, Step
from stagetune_operator.views import JobView, PodView

MAX_DELAY_SECONDS = 300.0
_CODES = {
    TrainerExitCode.USER_ERROR: FailureClass.USER_ERROR,
    TrainerExitCode.OUT_OF_MEMORY: FailureClass.OUT_OF_MEMORY,
    TrainerExitCode.DIVERGED: FailureClass.DIVERGED,
    TrainerExitCode.STORAGE_FULL: FailureClass.STORAGE_FULL,
    TrainerExitCode.STORAGE_ERROR: FailureClass.STORAGE_ERROR,
    TrainerExitCode.INTERRUPTED: FailureClass.DISRUPTED,
    TrainerExitCode.FENCED: FailureClass.FENCED,
    TrainerExitCode.INTERNAL: FailureClass.INTERNAL,
}
_KILLED = (137, 143)
"""128 + SIGKILL and 128 + SIGTERM, as a container's runtime gives them."""
_HOPELESS = {
    FailureClass.USER_ERROR,
    FailureClass.DIVERGED,
    # Another attempt would fill the volume again.
    FailureClass.STORAGE_FULL,
}


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Another attempt at the same task."""

    delay_seconds: float
    micro_batch_size: int | None = None
    """Smaller than before, where memory ran out."""


@dataclass(frozen=True, kw_only=True)
class Redo:
    """What an earlier task left is damaged: that task is done again, then this one."""

    key: str


@dataclass(frozen=True, kw_only=True)
class GiveUp:
    """Nothing that the operator can do would help."""

    failure: Failure


def read_failure(job: JobView, pods: Sequence[PodView]) -> Failure:
    """Return why a failed Job failed: by its last pod's report, else by how that pod ended."""
    ended = [pod for pod in pods if pod.exit_code not in (None, 0) or pod.phase == "Failed"]
    if not ended:
        return _failure(
            FailureClass.DISRUPTED,
            exit_code=-1,
            message=f"{job.name}: its pod is gone without a trace ({job.message or 'deleted'})",
        )
    pod = _to_blame(ended)
    report = pod.report
    if report is not None and report.failure is not None:
        return report.failure
    code = pod.exit_code if pod.exit_code is not None else -1
    failure_class, message = _without_report(pod, code)
    return _failure(failure_class, exit_code=code, message=message, log_tail=pod.message)


def _to_blame(ended: Sequence[PodView]) -> PodView:
    """Return the pod that says why a Job failed.

    Pods of one index come one after the other, and the last one counts; one that never ran has no
    time at which it finished. Of several at once most only lost their connection to the one that
    failed: whoever has more to say than that is to blame, and then whoever ended first.
    """
    last: dict[int, PodView] = {}
    for pod in sorted(ended, key=lambda item: (item.created, item.finished or "")):
        last[pod.index] = pod

    def rank(pod: PodView) -> tuple[bool, str, int]:
        failure = pod.report.failure if pod.report is not None else None
        is_vague = failure is not None and failure.failure_class is FailureClass.INTERNAL
        return is_vague, pod.finished or "", pod.index

    return min(last.values(), key=rank)


def _without_report(pod: PodView, code: int) -> tuple[FailureClass, str]:
    if pod.reason == "OOMKilled":
        return (
            FailureClass.OUT_OF_MEMORY,
            f"{pod.name} was killed because it took more memory than its limit; raise "
            "spec.runtime.resources.limits.memory, or lower training.microBatchSize or "
            "dataset.maxLength",
        )
    if pod.is_disrupted or pod.reason in ("Evicted", "Preempting", "Shutdown", "Terminated"):
        return FailureClass.DISRUPTED, f"{pod.name} was ended from outside ({pod.reason})"
    if pod.reason == "NodeLost":
        return FailureClass.NODE_LOST, f"the node {pod.node} of {pod.name} is lost"
    if pod.exit_code is None:
        # The kubelet did not let it in: a device that is broken, resources gone meanwhile.
        why = ": ".join(part for part in (pod.reason, pod.message) if part)
        return FailureClass.DISRUPTED, f"{pod.name} never ran on {pod.node} ({why})"
    if code in _KILLED:
        return FailureClass.DISRUPTED, f"{pod.name} was killed from outside (code {code})"
    known = _CODES.get(TrainerExitCode(code)) if code in list(TrainerExitCode) else None
    if known is not None:
        return known, f"{pod.name} exited with code {code} ({known}) and left no report"
    detail = f" ({pod.reason})" if pod.reason not in ("", "Error") else ""
    return FailureClass.INTERNAL, f"{pod.name} exited with code {code}{detail} without a report"


def _failure(
    failure_class: FailureClass, *, exit_code: int, message: str, log_tail: str = ""
) -> Failure:
    return Failure(
        failure_class=failure_class,
        exit_code=exit_code,
        message=message[:8192],
        log_tail=log_tail[-8192:],
    )


def decide_remedy(
    failure: Failure,
    step: Step,
    *,
    failures: int,
    max_retries: int,
    delay_seconds: float,
    training: TrainingSpec,
    micro_batch_size: int,
    damaged: str | None = None,
) -> Retry | Redo | GiveUp:
    """Return what follows from the `failures`-th failure of `step`, the first being 1.

    `damaged` is the key of the earlier task whose result the failure blames, where that task has
    not been done again since.
    """
    failure_class = failure.failure_class
    if failure_class in _HOPELESS:
        return GiveUp(failure=failure)
    if failure_class is FailureClass.OUT_OF_MEMORY:
        return _with_less_memory(failure, step, training, micro_batch_size)
    if failures > max_retries:
        return GiveUp(failure=_after(failure, failures))
    if damaged is not None:
        return Redo(key=damaged)
    delay = min(delay_seconds * 2 ** (failures - 1), MAX_DELAY_SECONDS)
    return Retry(delay_seconds=delay)


def _after(failure: Failure, failures: int) -> Failure:
    if failures == 1:
        return failure
    message = f"{failure.message} (attempt {failures} of {failures})"
    return failure.model_copy(update={"message": message[:8192]})


def _with_less_memory(
    failure: Failure, step: Step, training: TrainingSpec, micro_batch_size: int
) -> Retry | GiveUp:
    # With the optimizer in the backward pass a batch cannot be split.
    is_whole = step.task is Task.TRAIN and training.optimizer_in_backward
    if step.task in (Task.TRAIN, Task.EVALUATE) and micro_batch_size > 1 and not is_whole:
        smaller = halved(micro_batch_size, training.batch_size)
        return Retry(delay_seconds=0.0, micro_batch_size=smaller)
    cure = "; the micro-batch is as small as it can be" if step.task is Task.TRAIN else ""
    if is_whole:
        cure = "; with optimizerInBackward a batch is one micro-batch: lower batchSize"
    message = f"{failure.message}{cure}"[:8192]
    return GiveUp(failure=failure.model_copy(update={"message": message}))


def halved(micro_batch_size: int, batch_size: int) -> int:
    """Return the largest divisor of `batch_size` that is at most half of `micro_batch_size`."""
    return next(size for size in range(micro_batch_size // 2, 0, -1) if batch_size % size == 0)


def damaged_task(failure: Failure, stages: Sequence[PlannedStage]) -> str | None:
    """Return the key of the task that made the artifact which `failure` found damaged."""
    if failure.artifact is None:
        return None
    parts = PurePosixPath(failure.artifact).parts
    for stage in stages:
        if stage.directory in parts and "output" in parts:
            return stage.directory
    made_by_prepare = "prepare" in parts or "models" in parts or "stagetune-models" in parts
    return PREPARE.key if made_by_prepare else None
