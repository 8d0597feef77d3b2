"""Why a Job's pod does not run yet, in words that a person can act on."""

from stagetune_api.status import ConditionReason, RunState
from stagetune_operator.conditions import Standing
from stagetune_operator.views import JobView, PodView

_IMAGE_REASONS = {
    *("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"),
    *("ImageInspectError", "RegistryUnavailable"),
}


def has_image_problem(pod: PodView | None) -> bool:
    """Whether the pod waits for an image that cannot be had."""
    return pod is not None and pod.waiting in _IMAGE_REASONS


def describe_wait(title: str, job: JobView, pod: PodView | None) -> Standing:
    """Return the standing of a run whose task `title` has no running container."""
    reason = ConditionReason.QUEUED
    if job.is_suspended:
        message = _describe_suspension(title, job, pod)
    elif pod is None:
        message = f"{title}: no pod yet; if it stays so, kubectl describe job {job.name} says why"
    elif has_image_problem(pod):
        reason, message = ConditionReason.IMAGE_ERROR, f"{pod.waiting}: {pod.waiting_message}"
    elif pod.unschedulable:
        reason, message = ConditionReason.UNSCHEDULABLE, f"{title}: {pod.unschedulable}"
    elif pod.waiting_message:
        message = f"{title}: {pod.waiting}: {pod.waiting_message}"
    else:
        # A missing Secret or a volume that cannot be mounted shows in the pod's events alone.
        state = pod.waiting or "the pod starts"
        message = f"{title}: {state}; if it stays so, kubectl describe pod {pod.name} says why"
    return Standing(state=RunState.QUEUED, reason=reason, message=message)


def _describe_suspension(title: str, job: JobView, pod: PodView | None) -> str:
    if job.queue is None:
        return (
            f"{title}: somebody has suspended {job.name}; set its spec.suspend to false, or delete "
            "it and another one is made"
        )
    if pod is not None and pod.started is not None:
        return f"{title} is taken back by the queue {job.queue}; it saves and leaves"
    return f"{title} waits to be admitted by the queue {job.queue}"
