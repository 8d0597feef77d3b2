"""What the operator reads of Jobs and pods, taken out of their objects once and typed.

Comes first in a pass: `decide` sees these views and never an object of the API. Times are the
cluster's own and are only ever compared with each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import TypeAdapter, ValidationError

from stagetune_api import names
from stagetune_api.names import TrainerExitCode
from stagetune_api.report import StageReport

Object = dict[str, Any]
"""An object of the Kubernetes API as JSON."""

_INPUTS = TypeAdapter(dict[str, str])


class JobPhase(StrEnum):
    """What a Job has come to."""

    ACTIVE = "Active"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


@dataclass(frozen=True, kw_only=True)
class JobView:
    """A Job of a run."""

    name: str
    uid: str
    task: str
    attempt: int
    phase: JobPhase
    created: str
    is_suspended: bool
    """Whether somebody, a queue for one, keeps its pod from being made."""
    queue: str | None
    """Name of the queue that has to admit it."""
    is_deleting: bool
    inputs: Mapping[str, str]
    """The Job by which each earlier task was done when this one was made."""
    config_digest: str
    """Digest of the stage file that it was made with."""
    micro_batch_size: int | None
    message: str
    """Why the Job failed, in Kubernetes' words."""
    forecast_digest: str = ""
    """Of a Job that was made before its task was due: digest of its pods' template."""


@dataclass(frozen=True, kw_only=True)
class PodView:
    """A pod of a run's Job."""

    name: str
    uid: str
    job_uid: str
    task: str
    phase: str
    node: str | None
    created: str
    started: str | None
    """When its container started."""
    finished: str | None
    exit_code: int | None
    reason: str
    """Why the container ended, or why the pod did: OOMKilled, Evicted, NodeLost."""
    message: str
    """The termination message: a report in short, or the end of the log."""
    waiting: str
    """Why the container does not start: ImagePullBackOff, CreateContainerConfigError."""
    waiting_message: str
    unschedulable: str
    """Why no node takes the pod, in the scheduler's words."""
    is_disrupted: bool
    """Whether it was ended by preemption, eviction, a drained or lost node."""
    is_deleting: bool
    others_running: bool
    """Whether containers that are not ours, a mesh's or a log shipper's, still run in it."""
    index: int = 0
    """Which of its Job's pods it is; the first one reports."""

    @property
    def report(self) -> StageReport | None:
        """The report in its termination message, if that is what it holds."""
        try:
            return StageReport.model_validate_json(self.message)
        except ValidationError:
            return None

    @property
    def was_disrupted(self) -> bool:
        """Whether it was ended from outside in a way that its Job does not count."""
        asked_to_stop = self.exit_code == TrainerExitCode.INTERRUPTED
        return self.phase == "Failed" and (self.is_disrupted or asked_to_stop)

    @property
    def seconds(self) -> float:
        """How long its container ran; 0 while it has not ended."""
        return seconds_between(self.started, self.finished) or 0.0


@dataclass(frozen=True, kw_only=True)
class RunObjects:
    """A run's object and what belongs to it, of one moment."""

    run: Object
    jobs: Sequence[JobView] = ()
    """Only those that this very run owns, by its uid."""
    pods: Sequence[PodView] = ()

    def newest_job(self, task: str, *, after_attempt: int = 0) -> JobView | None:
        """Return the Job of the highest attempt above `after_attempt` at `task`."""
        found = [job for job in self.jobs if job.task == task and job.attempt > after_attempt]
        return max(found, key=lambda job: job.attempt, default=None)

    def pods_of(self, job: JobView) -> list[PodView]:
        """Return the pods that `job` made, the oldest first; of several at once the first one."""
        return [pod for pod in self.all_pods_of(job) if pod.index == 0]

    def all_pods_of(self, job: JobView) -> list[PodView]:
        """Return all pods that `job` made, the oldest first."""
        found = [pod for pod in self.pods if pod.job_uid == job.uid]
        return sorted(found, key=lambda pod: pod.created)


def view_run(run: Object, jobs: Sequence[Object], pods: Sequence[Object]) -> RunObjects:
    """Return the typed view of a run's objects.

    Jobs of other owners are left out, and so are the pods of other Jobs: those of an earlier run of
    the same name may still be leaving.
    """
    uid = run["metadata"]["uid"]
    own = [job for job in jobs if _owner_uid(job) == uid]
    own_uids = {job["metadata"]["uid"] for job in own}
    return RunObjects(
        run=run,
        jobs=tuple(view_job(job) for job in own),
        pods=tuple(view_pod(pod) for pod in pods if _owner_uid(pod) in own_uids),
    )


def view_job(job: Object) -> JobView:
    """Return what the operator reads of a Job."""
    metadata, status = job["metadata"], job.get("status") or {}
    annotations = metadata.get("annotations") or {}
    ended = {item["type"]: item for item in status.get("conditions") or [] if _is_true(item)}
    phase = JobPhase.ACTIVE
    if "Complete" in ended:
        phase = JobPhase.SUCCEEDED
    elif "Failed" in ended:
        phase = JobPhase.FAILED
    micro_batch_size = annotations.get(names.ANNOTATION_MICRO_BATCH_SIZE, "")
    return JobView(
        name=metadata["name"],
        uid=metadata["uid"],
        task=metadata["labels"][names.LABEL_TASK],
        attempt=int(metadata["labels"][names.LABEL_ATTEMPT]),
        phase=phase,
        created=metadata["creationTimestamp"],
        is_suspended=bool(job.get("spec", {}).get("suspend")),
        queue=metadata["labels"].get(names.LABEL_QUEUE),
        is_deleting="deletionTimestamp" in metadata,
        inputs=_inputs(annotations.get(names.ANNOTATION_INPUTS, "{}")),
        config_digest=annotations.get(names.ANNOTATION_CONFIG_DIGEST, ""),
        micro_batch_size=int(micro_batch_size) if micro_batch_size.isdecimal() else None,
        message=ended.get("Failed", {}).get("message", ""),
        forecast_digest=annotations.get(names.ANNOTATION_FORECAST_DIGEST, ""),
    )


def _inputs(text: str) -> dict[str, str]:
    """Return the Jobs in an annotation; none where others have made nonsense of it."""
    try:
        return _INPUTS.validate_json(text)
    except ValidationError:
        return {}


def view_pod(pod: Object) -> PodView:
    """Return what the operator reads of a pod."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    conditions = {item["type"]: item for item in status.get("conditions") or []}
    scheduled = conditions.get("PodScheduled", {})
    is_unschedulable = scheduled.get("status") == "False"
    state = _container_state(status)
    ended, waiting = state.get("terminated") or {}, state.get("waiting") or {}
    running = state.get("running") or {}
    index = (metadata.get("labels") or {}).get(names.LABEL_POD_INDEX, "0")
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        job_uid=_owner_uid(pod) or "",
        task=(metadata.get("labels") or {}).get(names.LABEL_TASK, ""),
        phase=status.get("phase", "Pending"),
        node=pod.get("spec", {}).get("nodeName"),
        created=metadata["creationTimestamp"],
        started=running.get("startedAt") or ended.get("startedAt"),
        finished=ended.get("finishedAt"),
        exit_code=ended.get("exitCode"),
        reason=ended.get("reason") or status.get("reason") or "",
        message=ended.get("message") or status.get("message") or "",
        waiting=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        unschedulable=scheduled.get("message", "") if is_unschedulable else "",
        is_disrupted=_is_true(conditions.get("DisruptionTarget", {})),
        is_deleting="deletionTimestamp" in metadata,
        others_running=any(
            container.get("name") != names.TRAINER_CONTAINER
            and "running" in (container.get("state") or {})
            for container in status.get("containerStatuses") or []
        ),
        index=int(index) if index.isdecimal() else 0,
    )


def seconds_between(start: str | None, end: str | None) -> float | None:
    """Return the seconds from one RFC 3339 time to another; None where one is not known.

    The times may be of two nodes whose clocks do not agree; less than 0 is none.
    """
    if start is None or end is None:
        return None
    try:
        passed = datetime.fromisoformat(end) - datetime.fromisoformat(start)
    except (ValueError, TypeError):
        return None
    return max(passed.total_seconds(), 0.0)


def _container_state(status: Object) -> Object:
    for container in status.get("containerStatuses") or []:
        if container.get("name") == names.TRAINER_CONTAINER:
            state: Object = container.get("state") or {}
            return state
    return {}


def _owner_uid(item: Object) -> str | None:
    for owner in item["metadata"].get("ownerReferences") or []:
        if owner.get("controller"):
            return str(owner["uid"])
    return None


def _is_true(condition: Object) -> bool:
    return bool(condition.get("status") == "True")
