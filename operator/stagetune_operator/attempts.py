"""One task of a run, attempt by attempt: its Job is made, followed, taken over, or tried again.

`decide` says which task it is. Each function returns the standing of the run, or None where the
task is done.
"""

from stagetune_api.report import Failure, FailureClass, StageReport
from stagetune_api.spec import RuntimeSpec
from stagetune_api.spec_checks import num_gpus
from stagetune_api.stage import Task, training_of_stage
from stagetune_api.status import ConditionReason, RunState, StageState, StageStatus
from stagetune_operator import standby
from stagetune_operator.conditions import Standing
from stagetune_operator.failures import (
    GiveUp,
    Redo,
    Retry,
    damaged_task,
    decide_remedy,
    read_failure,
)
from stagetune_operator.manifests import build_job, build_service, job_name
from stagetune_operator.pod_template import JobOrder
from stagetune_operator.records import progress_values, trained_values
from stagetune_operator.replan import changed_inputs
from stagetune_operator.run_pass import Create, DeleteJob, RunPass
from stagetune_operator.stage_files import Step, run_layout
from stagetune_operator.views import JobPhase, JobView, PodView, seconds_between
from stagetune_operator.waiting import describe_wait, has_image_problem

_MIN_GONE = 3
"""So often a Job may vanish also where nothing is to be tried again: it is no failure of a task."""
_AT_WORK = {
    Task.PREPARE: (RunState.PREPARING, ConditionReason.PREPARING),
    Task.TRAIN: (RunState.TRAINING, ConditionReason.TRAINING),
    Task.EVALUATE: (RunState.EVALUATING, ConditionReason.EVALUATING),
    Task.EXPORT: (RunState.EXPORTING, ConditionReason.EXPORTING),
}


def at_work(step: Step, message: str = "") -> Standing:
    """Return the standing of a run that is at `step`."""
    state, reason = _AT_WORK[step.task]
    return Standing(state=state, reason=reason, message=message or step.title)


def advance(run: RunPass, step: Step) -> Standing | None:
    """Bring `step` on as far as it goes now; None once it is done."""
    record = run.record_of(step)
    job = run.objects.newest_job(step.key, after_attempt=record.attempts_before)
    if job is None:
        if record.state is StageState.SUCCEEDED:
            return None
        return _gone_too_often(run, step) or _start(run, step)
    if standby.stands_by(run, step, job):
        is_taken = standby.accept(run, step, job, _inputs(run, step), _last_node(run))
        return at_work(step, f"{step.title} begins") if is_taken else _start(run, step)
    disruptions = sum(
        pod.was_disrupted and not standby.was_in_vain(run, step, pod)
        for pod in run.objects.pods
        if pod.task == step.key and pod.index == 0
    )
    if disruptions > record.disruptions:
        run.set(step, disruptions=disruptions)
    if record.attempts < job.attempt:
        run.set(step, attempts=job.attempt, micro_batch_size=_smaller(run, step, job))
    if record.state is StageState.SUCCEEDED and record.attempts >= job.attempt:
        return None
    match job.phase:
        case JobPhase.ACTIVE if _has_ended_well(run, step, job):
            # The Job takes note seconds later; what it would say is known.
            return _take_over(run, step, job)
        case JobPhase.ACTIVE:
            return _follow(run, step, job)
        case JobPhase.SUCCEEDED:
            return _take_over(run, step, job)
        case JobPhase.FAILED if _result_of(run, step, job) is not None:
            # Another container of the pod failed, or somebody ended the Job; the work is done.
            return _take_over(run, step, job)
        case JobPhase.FAILED if record.state is StageState.INTERRUPTED:
            # It did not leave in time after a suspension. However it ended, that was asked for.
            return _start(run, step)
        case JobPhase.FAILED:
            return _fail(run, step, job, read_failure(job, run.objects.all_pods_of(job)))


def _gone_too_often(run: RunPass, step: Step) -> Standing | None:
    """End a run whose Jobs vanish, whoever deletes them; None while it may go on."""
    record = run.record_of(step)
    num_gone = record.attempts - record.attempts_before
    if run.spec.suspend and num_gone:
        # By the suspension, though the note of it was lost.
        run.set(step, state=StageState.INTERRUPTED)
        return None
    may_go_on = num_gone <= max(_max_retries(run), _MIN_GONE)
    if may_go_on or record.state is StageState.INTERRUPTED:
        return None
    name = job_name(run.owner.name, step.key, record.attempts)
    failure = Failure(
        failure_class=FailureClass.DISRUPTED,
        exit_code=-1,
        message=f"{name} is gone and was not deleted by this operator (attempt {num_gone} of "
        f"{num_gone}); find out what deletes the run's Jobs, then raise spec.retry.number",
    )
    return run.give_up(step, failure)


def _max_retries(run: RunPass) -> int:
    return (run.spec.runtime or RuntimeSpec()).max_retries


def _start(run: RunPass, step: Step) -> Standing:
    """Make the Job for the next attempt at `step`."""
    if run.spec.suspend:
        return run.suspended()
    if step.task is Task.EXPORT and run.lacks_averaging_alpha:
        evaluate = next(item for item in run.steps if item.task is Task.EVALUATE)
        run.begin_again(evaluate)
        return _start(run, evaluate)
    record = run.record_of(step)
    if record.state is StageState.INTERRUPTED:
        # It was ended by the suspension, which does not count.
        run.set(step, attempts_before=record.attempts)
    attempt = record.attempts + 1
    order = JobOrder(
        config=run.stage_file(step),
        task=step.key,
        attempt=attempt,
        claim=run.status.claim_name,
        inputs=_inputs(run, step),
        preferred_node=_last_node(run),
    )
    manifest = build_job(run.owner, run.spec, run.circumstances.settings, order)
    if order.config.engine is not None and order.config.engine.nodes > 1:
        run.act(Create(manifest=build_service(run.owner)))
    run.act(Create(manifest=manifest))
    run.set(step, state=StageState.QUEUED, attempts=attempt)
    return Standing(
        state=RunState.QUEUED, reason=ConditionReason.QUEUED, message=f"{step.title} is queued"
    )


def _inputs(run: RunPass, step: Step) -> dict[str, str]:
    """Return the Jobs whose results `step` goes on from."""
    inputs = {}
    for earlier in run.steps:
        if earlier.key == step.key:
            break
        job = run.objects.newest_job(earlier.key)
        if job is not None:
            inputs[earlier.key] = job.name
    return inputs


def _last_node(run: RunPass) -> str | None:
    """Return the node of the pod that ended last: its caches are warm."""
    ended = [pod for pod in run.objects.pods if pod.node and pod.finished]
    last = max(ended, key=lambda pod: pod.finished or "", default=None)
    return last.node if last is not None else None


def _follow(run: RunPass, step: Step, job: JobView) -> Standing:
    """Show how an unfinished Job stands; end it where the run is suspended."""
    if run.spec.suspend:
        return _suspend(run, step, job)
    if job.is_deleting:
        # By somebody else's hand; what comes next is decided when it is gone.
        return at_work(step, f"{job.name} is being deleted")
    if standby.is_bound_in_vain(run, job):
        standby.let_go(run, step, job)
        return _start(run, step)
    pods = run.objects.pods_of(job)
    # Of several pods none trains before all have started.
    missing = [pod for pod in run.objects.all_pods_of(job) if pod.index and _is_missing(pod)]
    pod = next((pod for pod in reversed(pods) if pod.phase in ("Pending", "Running")), None)
    if missing and pod is not None and pod.started is not None:
        pod = missing[-1]
    if pod is None and pods and not (pods[-1].was_disrupted or job.is_suspended):
        # Its Job takes note within a second or two.
        return at_work(step)
    if pod is None or pod.started is None or job.is_suspended:
        run.set(step, state=StageState.QUEUED)
        return _wait(run, step, job, pod)
    run.set(step, state=StageState.RUNNING)
    standby.offer(run, step, job, pod)
    if step.task is Task.TRAIN:
        _show_progress(run, step, job, pod)
        follower = run.steps[run.steps.index(step) + 1]
        standby.foresee(run, step, pod, follower, _inputs(run, follower))
    return at_work(step, _describe_end(step, pod))


def _is_missing(pod: PodView) -> bool:
    return pod.phase == "Pending" and pod.started is None


def _describe_end(step: Step, pod: PodView) -> str:
    """Return what keeps a pod that is about to end; empty for one that works."""
    if pod.finished is not None:
        # With ours alone the pod's own end follows within two seconds.
        if not pod.others_running:
            return ""
        return f"{step.title} is done; other containers keep {pod.name} from ending"
    if pod.is_deleting or pod.is_disrupted:
        return (
            f"{step.title}: {pod.name} has to leave the node {pod.node} and saves; where that node "
            "is lost, another pod follows once Kubernetes gives this one up"
        )
    return ""


def _show_progress(run: RunPass, step: Step, job: JobView, pod: PodView) -> None:
    progress = run.circumstances.progress.get(step.key)
    values = {"queued_seconds": seconds_between(job.created, pod.started)}
    if progress is not None and progress.pod_uid == pod.uid:
        values |= progress_values(progress)
    run.set(step, **values)


def _wait(run: RunPass, step: Step, job: JobView, pod: PodView | None) -> Standing:
    """Return why a Job's pod does not run yet; an image is not waited for without end."""
    standing = describe_wait(step.title, job, pod)
    if pod is None or job.is_suspended or not has_image_problem(pod):
        return standing
    patience = run.circumstances.settings.image_patience_seconds
    waited = run.circumstances.age(f"image/{pod.uid}")
    if waited < patience:
        run.look_again_seconds = patience - waited
        return standing
    run.act(DeleteJob(name=job.name, uid=job.uid))
    return run.give_up(step, _image_failure(standing.message))


def suspend_all(run: RunPass) -> None:
    """End what is at work where the run is suspended, though it cannot go on for another reason."""
    for step in run.steps if run.spec.suspend else ():
        job = run.objects.newest_job(step.key, after_attempt=run.record_of(step).attempts_before)
        is_at_work = job is not None and not standby.stands_by(run, step, job)
        if job is not None and is_at_work and job.phase is JobPhase.ACTIVE:
            _suspend(run, step, job)


def _suspend(run: RunPass, step: Step, job: JobView) -> Standing:
    if not job.is_deleting:
        run.act(DeleteJob(name=job.name, uid=job.uid))
    pods = run.objects.pods_of(job)
    if step.task is Task.TRAIN and pods:
        # What it posts while it saves is what it goes on from.
        _show_progress(run, step, job, pods[-1])
    run.set(step, state=StageState.INTERRUPTED)
    message = f"{step.title} saves and leaves"
    return Standing(state=RunState.SUSPENDED, reason=ConditionReason.SUSPENDING, message=message)


def _take_over(run: RunPass, step: Step, job: JobView) -> Standing | None:
    """Take over what a finished Job reports; None if it is all there."""
    report = _result_of(run, step, job)
    if report is None:
        failure = Failure(
            failure_class=FailureClass.INTERNAL,
            exit_code=0,
            message=f"{job.name} is done and its report is lost; it is asked again",
        )
        return _fail(run, step, job, failure)
    match step.task:
        case Task.PREPARE if run.record is not None and report.facts is not None:
            changed = changed_inputs(run.record, report.facts)
            if changed is not None:
                return run.give_up(step, changed)
        case Task.TRAIN:
            _take_over_stage(run, step, job, report)
        case Task.EVALUATE:
            run.update(evaluation=report.evaluation)
        case Task.EXPORT:
            run.update(export=report.export or str(run_layout(run.owner).export))
    run.set(step, state=StageState.SUCCEEDED, last_failure=None)
    return None


def _take_over_stage(run: RunPass, step: Step, job: JobView, report: StageReport) -> None:
    record = run.record_of(step)
    made = record.checkpoint if isinstance(record, StageStatus) else None
    if made is not None and report.output is not None and made.digest != report.output.digest:
        # Done again with another result: what was made of the old one follows it.
        _begin_again_after(run, step)
    values = trained_values(
        report,
        [pod for pod in run.objects.pods if pod.task == step.key],
        previous_end=_end_of_task_before(run, step),
        num_gpus=num_gpus(run.spec),
    )
    started = next((pod.started for pod in run.objects.pods_of(job) if pod.started), None)
    run.set(step, queued_seconds=seconds_between(job.created, started), **values)


def _begin_again_after(run: RunPass, step: Step) -> None:
    steps = run.steps
    for follower in steps[steps.index(step) + 1 :]:
        # One that failed on the old one goes on, and counts on, with the new one: else a stage
        # with another result each time and one that never accepts it go round for ever.
        if run.record_of(follower).state is StageState.SUCCEEDED:
            run.begin_again(follower)


def _end_of_task_before(run: RunPass, step: Step) -> str | None:
    """Return when the container of the task before `step` ended."""
    steps = run.steps
    before = run.objects.newest_job(steps[steps.index(step) - 1].key)
    pods = run.objects.pods_of(before) if before is not None else []
    return max((pod.finished for pod in pods if pod.finished), default=None)


def _fail(run: RunPass, step: Step, job: JobView, failure: Failure) -> Standing:
    """Decide what follows from a failed attempt."""
    record = run.record_of(step)
    run.set(step, last_failure=failure)
    training = training_of_stage(run.spec.training, step.stage)
    remedy = decide_remedy(
        failure,
        step,
        failures=job.attempt - record.attempts_before,
        max_retries=_max_retries(run),
        delay_seconds=run.circumstances.settings.retry_delay_seconds,
        training=training,
        micro_batch_size=job.micro_batch_size or training.micro_batch_size,
        damaged=_damaged(run, step, job, failure),
    )
    match remedy:
        case GiveUp(failure=final):
            return run.give_up(step, final)
        case Redo(key=key):
            earlier = next(item for item in run.steps if item.key == key)
            run.begin_again(earlier)
            return _start(run, earlier)
        case Retry(delay_seconds=delay, micro_batch_size=smaller):
            run.set(step, state=StageState.QUEUED)
            if run.spec.suspend:
                return run.suspended()
            waited = run.circumstances.age(f"failed/{job.uid}")
            if waited < delay:
                run.look_again_seconds = delay - waited
                return Standing(
                    state=_AT_WORK[step.task][0],
                    reason=ConditionReason.RETRYING,
                    message=f"{step.title} is tried again: {failure.message}"[:4096],
                )
            if smaller is not None:
                # There are few sizes to try, and that one was too large is no failure of the next.
                run.set(step, micro_batch_size=smaller, attempts_before=job.attempt)
            return _start(run, step)


def _damaged(run: RunPass, step: Step, job: JobView, failure: Failure) -> str | None:
    """Return the task whose result `failure` blames, unless it was done again since."""
    stages = run.stages
    key = damaged_task(failure, stages)
    if key is None or key == step.key or key not in job.inputs:
        return None
    newest = run.objects.newest_job(key)
    return key if newest is None or newest.name == job.inputs[key] else None


def _smaller(run: RunPass, step: Step, job: JobView) -> int | None:
    size = job.micro_batch_size
    planned = training_of_stage(run.spec.training, step.stage).micro_batch_size
    return size if size != planned else None


def report_of(run: RunPass, job: JobView) -> StageReport | None:
    for pod in reversed(run.objects.pods_of(job)):
        if pod.exit_code == 0 and pod.report is not None:
            return pod.report
    return None


def _has_ended_well(run: RunPass, step: Step, job: JobView) -> bool:
    """Whether the Job's last pod did the task and is over, so that its GPU is free."""
    pods = run.objects.pods_of(job)
    is_over = bool(pods) and pods[-1].phase == "Succeeded"
    return is_over and _result_of(run, step, job) is not None


def _result_of(run: RunPass, step: Step, job: JobView) -> StageReport | None:
    """Return the report of a Job that did its task."""
    report = report_of(run, job)
    return report if report is not None and _has_result(report, step.task) else None


def _has_result(report: StageReport, task: Task) -> bool:
    match task:
        case Task.PREPARE:
            return report.facts is not None
        case Task.TRAIN:
            return report.train is not None and report.output is not None
        case Task.EVALUATE:
            return report.evaluation is not None
        case Task.EXPORT:
            return report.outcome.value == "Succeeded"


def _image_failure(message: str) -> Failure:
    return Failure(
        failure_class=FailureClass.IMAGE_ERROR,
        exit_code=-1,
        message=f"{message}; give the operator an image that the nodes can pull"[:8192],
    )
