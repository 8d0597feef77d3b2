"""Pods that stand by: the next task's, started in the last minute of a stage.

Such a pod is that of the task's Job, made early. It has imported its code and checked the base
model when its task becomes due, and asks for its stage file until then. The status says whether it
is due: from the pass on that finds so, the pod is offered the file (`progress_server`). One that
does not fit what is wanted by then, or has not started, is let go, and the task begins as any
other: nothing depends on a pod that stands by.
"""

from collections.abc import Mapping
from itertools import pairwise

from stagetune_api.spec import RuntimeSpec, StagedFineTuneSpec, Standby
from stagetune_api.spec_checks import num_gpus
from stagetune_api.stage import Task, plan_engine
from stagetune_api.status import StageState
from stagetune_operator.manifests import build_job, config_digest
from stagetune_operator.pod_template import JobOrder
from stagetune_operator.run_pass import Create, DeleteJob, RunPass
from stagetune_operator.stage_files import Step
from stagetune_operator.views import JobPhase, JobView, PodView

STANDBY_SECONDS = 60.0
"""A stage that is this near its end has the next pod started: for scheduling it, its imports, and
reading a base model of some gigabytes."""


def stands_by(run: RunPass, step: Step, job: JobView) -> bool:
    """Whether `job` was made before `step` was due and has not been accepted for it yet."""
    record = run.record_of(step)
    is_accepted = record.attempts >= job.attempt and record.state is not StageState.PENDING
    # A status that somebody wiped does not say what was accepted; a result does.
    has_result = any(pod.exit_code == 0 for pod in run.objects.pods_of(job))
    return bool(job.forecast_digest) and not is_accepted and not has_result


def was_let_go(run: RunPass, step: Step, pod: PodView) -> bool:
    """Whether `pod` stood by for `step` in vain: how it ended tells nothing of the task."""
    job = next((item for item in run.objects.jobs if item.uid == pod.job_uid), None)
    if job is None or not job.forecast_digest:
        return False
    return job.attempt <= run.record_of(step).attempts_before or stands_by(run, step, job)


def may_stand_by(spec: StagedFineTuneSpec, step: Step) -> bool:
    """Whether the manifest lets the pod of `step` be started early."""
    runtime = spec.runtime or RuntimeSpec()
    if runtime.standby is Standby.NEVER or step.task not in (Task.TRAIN, Task.EVALUATE):
        return False
    if runtime.queue_name is not None or runtime.priority_class_name is not None:
        # What is admitted or makes room for itself is not taken for a pod that only waits.
        return False
    if step.task is Task.TRAIN and plan_engine(spec.runtime, num_gpus=num_gpus(spec)) is not None:
        return False
    resources = runtime.resources
    takes = {*resources.limits, *resources.requests} if resources is not None else set()
    is_plain = not any("/" in name for name in takes)
    return runtime.standby is Standby.ALWAYS or is_plain


def foresee(
    run: RunPass, step: Step, pod: PodView, follower: Step, inputs: Mapping[str, str]
) -> None:
    """Have the pod of `follower` stand by, if `pod` is about to be done with `step` before it.

    `inputs` are the Jobs whose results it will go on from.
    """
    progress = run.circumstances.progress.get(step.key)
    if progress is None or progress.pod_uid != pod.uid or progress.eta_seconds is None:
        return
    is_leaving = pod.is_deleting or pod.is_disrupted or pod.finished is not None
    if progress.eta_seconds > STANDBY_SECONDS or is_leaving or pod.node is None:
        return
    record = run.record_of(follower)
    is_there = run.objects.newest_job(follower.key, after_attempt=record.attempts_before)
    if not run.circumstances.settings.progress_url or not may_stand_by(run.spec, follower):
        return
    if record.state is not StageState.PENDING or is_there or len(run.stages) < 2:
        return
    order = JobOrder(
        config=run.stage_file(follower),
        task=follower.key,
        attempt=record.attempts + 1,
        claim=run.status.claim_name,
        inputs=inputs,
        standby_node=pod.node,
    )
    manifest = build_job(run.owner, run.spec, run.circumstances.settings, order)
    if manifest["metadata"]["name"] not in run.circumstances.declined:
        run.act(Create(manifest=manifest, is_optional=True))


def accept(run: RunPass, step: Step, job: JobView, inputs: Mapping[str, str]) -> bool:
    """Take `job`, which stands by, for `step`, which is due; let it go where it does not fit."""
    pods = run.objects.pods_of(job)
    fits = (
        job.phase is JobPhase.ACTIVE
        and not job.is_deleting
        and not run.spec.suspend
        and job.inputs == inputs
        and job.forecast_digest == config_digest(run.stage_file(step).forecast())
        and len(pods) == 1
        and _waits(pods[0])
    )
    if fits:
        run.set(step, attempts=job.attempt, state=StageState.RUNNING)
    else:
        let_go(run, step, job)
    return fits


def is_bound_in_vain(run: RunPass, job: JobView) -> bool:
    """Whether a Job that was made early has to make another pod: on a node that may be lost."""
    return bool(job.forecast_digest) and not job.is_deleting and len(run.objects.pods_of(job)) > 1


def offer(run: RunPass, step: Step, job: JobView, pod: PodView) -> None:
    """Offer `pod` of an accepted Job its stage file, until it says that it is at work."""
    progress = run.circumstances.progress.get(step.key)
    has_begun = progress is not None and progress.pod_uid == pod.uid
    if job.forecast_digest and not has_begun:
        run.offers[pod.uid] = run.stage_file(step).model_dump_json(exclude_none=True)


def let_go_of_idle(run: RunPass) -> None:
    """Delete every Job that stands by for a task which is not the next one any more."""
    steps = run.steps
    is_over = run.status.completion_time is not None or run.spec.suspend
    for before, step in pairwise(steps):
        is_next = run.record_of(before).state is StageState.RUNNING and not is_over
        job = run.objects.newest_job(step.key, after_attempt=run.record_of(step).attempts_before)
        if job is not None and stands_by(run, step, job) and not is_next:
            let_go(run, step, job)


def _waits(pod: PodView) -> bool:
    is_leaving = pod.is_deleting or pod.is_disrupted or pod.finished is not None
    return pod.phase == "Running" and pod.started is not None and not is_leaving


def let_go(run: RunPass, step: Step, job: JobView) -> None:
    """Delete a Job that stood by; it counts as no attempt."""
    if job.phase is JobPhase.ACTIVE and not job.is_deleting:
        run.act(DeleteJob(name=job.name, uid=job.uid))
    record = run.record_of(step)
    run.set(
        step,
        attempts=max(record.attempts, job.attempt),
        attempts_before=max(record.attempts_before, job.attempt),
    )
