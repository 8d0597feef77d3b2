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


def describe_wait(
    title: str, job: JobView, pod: PodView | None, queue_name: str | None
) -> Standing:
    """Return the standing of a run whose task `title` has no running container."""
    reason, message = ConditionReason.QUEUED, f"{title}: no pod yet"
    if job.is_suspended:
        message = f"{title} waits to be admitted by the queue {queue_name}"
    elif pod is None:
        pass
    elif has_image_problem(pod):
        reason, message = ConditionReason.IMAGE_ERROR, f"{pod.waiting}: {pod.waiting_message}"
    elif pod.unschedulable:
        reason, message = ConditionReason.UNSCHEDULABLE, f"{title}: {pod.unschedulable}"
    elif pod.waiting_message:
        message = f"{title}: {pod.waiting}: {pod.waiting_message}"
    else:
        message = f"{title}: {pod.waiting or 'the pod starts'}"
    return Standing(state=RunState.QUEUED, reason=reason, message=message)
