"""Pods that stand by: the next task's, started in the last minute of a stage.

Such a pod is that of the task's Job, made early. It has imported its code and checked the base
model when its task becomes due, and asks for its stage file until then. The status says whether it
is due: from the pass on that finds so, the pod is offered the file (`progress_server`). One that is
not what would be made by then is let go, and the task begins as any other.
"""

from collections.abc import Mapping
from itertools import pairwise

from stagetune_api import names
from stagetune_api.spec import RuntimeSpec, StagedFineTuneSpec, Standby
from stagetune_api.spec_checks import num_gpus
from stagetune_api.stage import Task, plan_engine
from stagetune_api.status import StageState
from stagetune_operator.manifests import build_job
from stagetune_operator.pod_template import JobOrder
from stagetune_operator.run_pass import Create, DeleteJob, RunPass
from stagetune_operator.stage_files import Step
from stagetune_operator.views import JobPhase, JobView, Object, PodView

STANDBY_SECONDS = 60.0
"""A stage that is this near its end has the next pod started: for scheduling it, its imports, and
reading a base model of some gigabytes."""

ROOM_SECONDS = 20.0
"""So long an accepted pod may find no room on its node before another one is made, for any node."""


def stands_by(run: RunPass, step: Step, job: JobView) -> bool:
    """Whether `job` was made before `step` was due and has not been accepted for it yet."""
    record = run.record_of(step)
    is_accepted = record.attempts >= job.attempt and record.state is not StageState.PENDING
    # A status that somebody wiped does not say what was accepted; a result does.
    has_result = any(pod.exit_code == 0 for pod in run.objects.pods_of(job))
    return bool(job.forecast_digest) and not is_accepted and not has_result


def was_in_vain(run: RunPass, step: Step, pod: PodView) -> bool:
    """Whether `pod` stood by and never came to its task: how it ended tells nothing of that."""
    job = next((item for item in run.objects.jobs if item.uid == pod.job_uid), None)
    if job is None or not job.forecast_digest:
        return False
    # The number of its attempt is what a process takes first.
    has_begun = pod.report is None or pod.report.attempt > 0
    return stands_by(run, step, job) or not has_begun


def may_stand_by(spec: StagedFineTuneSpec, task: Task) -> bool:
    """Whether the manifest lets a pod of `task` be started early."""
    runtime = spec.runtime or RuntimeSpec()
    if runtime.standby is Standby.NEVER or task not in (Task.TRAIN, Task.EVALUATE):
        return False
    if runtime.queue_name is not None or runtime.priority_class_name is not None:
        # What is admitted or makes room for itself is not taken for a pod that only waits.
        return False
    if plan_engine(spec.runtime, num_gpus=num_gpus(spec)) is not None:
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
    record = run.record_of(follower)
    job = run.objects.newest_job(follower.key, after_attempt=record.attempts_before)
    progress = run.circumstances.progress.get(step.key)
    if progress is None or progress.pod_uid != pod.uid or progress.eta_seconds is None:
        return
    # One that says 0 is done: its follower would be made for nothing but to be let go.
    is_near = 0 < progress.eta_seconds <= STANDBY_SECONDS
    is_leaving = pod.is_deleting or pod.is_disrupted or pod.finished is not None
    if not is_near or is_leaving or pod.node is None:
        return
    if job is not None or record.state is not StageState.PENDING:
        return
    has_somebody_to_ask = bool(run.circumstances.settings.progress_url)
    if not has_somebody_to_ask or not may_stand_by(run.spec, follower.task) or len(run.stages) < 2:
        return
    manifest = _manifest(run, follower, record.attempts + 1, inputs, pod.node)
    if manifest["metadata"]["name"] not in run.circumstances.declined:
        run.act(Create(manifest=manifest, is_optional=True))


def accept(
    run: RunPass, step: Step, job: JobView, inputs: Mapping[str, str], node: str | None
) -> bool:
    """Take `job`, which stands by, for `step`, which is due; let it go where it does not fit.

    It fits if it is what would be made now on `node`, that of the task before.
    """
    pods = run.objects.pods_of(job)
    may_go_on = job.phase is JobPhase.ACTIVE and not job.is_deleting and not run.spec.suspend
    is_ready = len(pods) == 1 and _is_on_its_way(pods[0])
    fits = may_go_on and is_ready and node is not None and may_stand_by(run.spec, step.task)
    if fits and node is not None:
        wanted = _manifest(run, step, job.attempt, inputs, node)["metadata"]["annotations"]
        fits = job.inputs == inputs
        fits = fits and job.forecast_digest == wanted[names.ANNOTATION_FORECAST_DIGEST]
    if fits:
        state = StageState.RUNNING if pods[0].started is not None else StageState.QUEUED
        run.set(step, attempts=job.attempt, state=state)
    else:
        let_go(run, step, job)
    return fits


def offer(run: RunPass, step: Step, job: JobView, pod: PodView) -> None:
    """Offer `pod` of an accepted Job its stage file, until it says that it is at work."""
    progress = run.circumstances.progress.get(step.key)
    has_begun = progress is not None and progress.pod_uid == pod.uid
    if job.forecast_digest and not has_begun:
        run.offers[pod.uid] = run.stage_file(step).model_dump_json(exclude_none=True)


def is_bound_in_vain(run: RunPass, job: JobView) -> bool:
    """Whether an accepted Job waits for a node that may be lost, or has to make another pod there.

    A pod that found no room beside the one before it has it now, once the scheduler looks again.
    """
    if not job.forecast_digest or job.is_deleting:
        return False
    pods = run.objects.pods_of(job)
    waiting = next((pod for pod in pods if pod.unschedulable), None)
    if waiting is None:
        return len(pods) > 1
    waited = run.circumstances.age(f"bound/{waiting.uid}")
    if waited < ROOM_SECONDS:
        run.look_again_seconds = ROOM_SECONDS - waited
    return waited >= ROOM_SECONDS


def let_go_of_idle(run: RunPass) -> None:
    """Delete every Job that stands by for a task which is not the next one any more."""
    steps = run.steps
    is_over = run.status.completion_time is not None or run.spec.suspend
    for before, step in pairwise(steps):
        is_next = run.record_of(before).state is StageState.RUNNING and not is_over
        job = run.objects.newest_job(step.key, after_attempt=run.record_of(step).attempts_before)
        if job is not None and stands_by(run, step, job) and not is_next:
            let_go(run, step, job)
    known = {step.key for step in steps}
    for job in run.objects.jobs if run.stages else ():
        # Of a stage that an edit took away or gave another name.
        if job.forecast_digest and job.task not in known:
            _delete(run, job)


def let_go(run: RunPass, step: Step, job: JobView) -> None:
    """Delete a Job that was made early; its number is used up, and it counts as no attempt."""
    _delete(run, job)
    record = run.record_of(step)
    run.set(
        step,
        attempts=max(record.attempts, job.attempt),
        attempts_before=max(record.attempts_before, job.attempt),
    )


def _delete(run: RunPass, job: JobView) -> None:
    if job.phase is JobPhase.ACTIVE and not job.is_deleting:
        run.act(DeleteJob(name=job.name, uid=job.uid))


def _manifest(
    run: RunPass, step: Step, attempt: int, inputs: Mapping[str, str], node: str
) -> Object:
    """Return the Job of a pod that stands by for `step` on `node`."""
    config = run.stage_file(step)
    num_stages = step.stage.index if step.stage is not None else len(run.stages)
    # The output before it is not known, or is that of an earlier round.
    config = config.model_copy(update={"chain": config.chain[: num_stages - 1]})
    order = JobOrder(
        config=config,
        task=step.key,
        attempt=attempt,
        claim=run.status.claim_name,
        inputs=inputs,
        standby_node=node,
    )
    return build_job(run.owner, run.spec, run.circumstances.settings, order)


def _is_on_its_way(pod: PodView) -> bool:
    """Whether a pod is at work, or will be no later than another one would."""
    is_leaving = pod.is_deleting or pod.is_disrupted or pod.finished is not None
    return pod.phase in ("Pending", "Running") and not is_leaving
