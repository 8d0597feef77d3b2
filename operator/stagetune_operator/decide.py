"""What a run needs now: from its objects to a new status and the actions that bring it on.

Pure and level-based: whatever happened before and in which order, the same objects give the same
decision, so a pass may be repeated, and a restart needs no memory but the status. The tasks are
walked in order; the first that is not done decides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stagetune_api.facts import Facts
from stagetune_api.names import EXPORT_TASK
from stagetune_api.spec import RetainPolicy, StagedFineTune, StagedFineTuneSpec
from stagetune_api.spec_checks import Runner, check_runner
from stagetune_api.stage import PlannedStage
from stagetune_api.status import (
    ConditionReason,
    ConditionType,
    RunState,
    StagedFineTuneStatus,
    StageState,
)
from stagetune_api.validation import parse_manifest
from stagetune_operator.attempts import advance, at_work, report_of, suspend_all
from stagetune_operator.conditions import Standing, with_standing
from stagetune_operator.manifests import (
    build_claim,
    build_plan_record,
    claim_name,
    config_digest,
)
from stagetune_operator.ownership import Owner
from stagetune_operator.plan_record import PlanRecord, digest_of_planned, plan_record_name
from stagetune_operator.records import (
    Record,
    begun_again,
    read_status,
    records_in_order,
    with_stages,
)
from stagetune_operator.replan import plan_run, refusal
from stagetune_operator.run_pass import Circumstances, Create, DeleteJob, Intent, RunPass
from stagetune_operator.stage_files import PREPARE
from stagetune_operator.standby import let_go_of_idle
from stagetune_operator.views import JobPhase, RunObjects


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The run's new status, and what is to be done before it is written."""

    status: StagedFineTuneStatus
    """The status once all actions are done."""
    intents: Sequence[Intent] = ()
    record: PlanRecord | None = None
    """The plan that `status` follows."""
    look_again_seconds: float | None = None
    """When to decide again though nothing is heard; None: only then."""
    offers: Mapping[str, str] = field(default_factory=dict)
    """Stage files for pods that stand by and whose task is due, by the pod's uid."""


def decide(objects: RunObjects, circumstances: Circumstances) -> Decision:
    """Return what the run needs now."""
    status = read_status(objects.run)
    generation = objects.run["metadata"].get("generation", 0)
    manifest = parse_manifest(objects.run)
    problems = (
        manifest if isinstance(manifest, list) else check_runner(manifest.spec, Runner.CLUSTER)
    )
    if isinstance(manifest, StagedFineTune) and not problems:
        return _decide_by(manifest.spec, objects, circumstances, status)
    standing = refusal(problems)
    if status.completion_time is not None:
        # It is over, and stays what it became.
        standing = _final_standing(status, standing.message)
    status = with_standing(status, standing, generation=generation, now=circumstances.now)
    return Decision(status=status)


def _decide_by(
    spec: StagedFineTuneSpec,
    objects: RunObjects,
    circumstances: Circumstances,
    status: StagedFineTuneStatus,
) -> Decision:
    metadata = objects.run["metadata"]
    run = RunPass(
        owner=Owner(name=metadata["name"], namespace=metadata["namespace"], uid=metadata["uid"]),
        spec=spec,
        objects=objects,
        circumstances=circumstances,
        status=status,
        record=circumstances.record,
    )
    _begin(run)
    _obey_retry(run)
    is_over = run.status.completion_time is not None
    standing = _final_standing(run.status, run.refusal) if is_over else _walk(run)
    let_go_of_idle(run)
    decided = with_standing(
        run.status, standing, generation=metadata.get("generation", 0), now=circumstances.now
    )
    return Decision(
        status=decided,
        intents=tuple(run.intents),
        record=run.record,
        look_again_seconds=run.look_again_seconds,
        offers=run.offers,
    )


def _begin(run: RunPass) -> None:
    """Fix what stays the same from a run's first pass on, and make its claim."""
    if run.status.start_time is None:
        retry = run.spec.retry
        run.update(
            start_time=run.circumstances.now,
            directory=run.owner.directory,
            # An order that was there from the beginning is no order.
            retry_number=retry.number if retry is not None else 0,
        )
    storage = run.spec.storage
    if not run.status.claim_name and storage is not None and not run.spec.suspend:
        if storage.claim_name is None:
            run.act(Create(manifest=build_claim(run.owner, storage)))
        run.update(claim_name=claim_name(run.owner, storage))
    if run.record is not None and [stage.name for stage in run.stages] != [
        stage.name for stage in run.status.stages
    ]:
        # Somebody's hand was in the status, or an older version could not read all of it.
        run.status = with_stages(run.status, run.stages)


def _obey_retry(run: RunPass) -> None:
    """Begin a run again that is over, if a new order says so."""
    retry = run.spec.retry
    is_new = retry is not None and retry.number > run.status.retry_number
    if retry is None or not is_new or run.status.completion_time is None:
        return
    # By what the status knows: the plan may be gone.
    records = records_in_order(run.status)
    if retry.from_stage is not None:
        known = [record.name for record in records]
        if retry.from_stage not in known:
            run.refusal = (
                f"spec.retry.fromStage: there is no stage {retry.from_stage!r}; choose one of "
                f"{', '.join(known)}"
            )
            return
        again = records[known.index(retry.from_stage) :]
    else:
        again = [record for record in records if record.state is StageState.FAILED]
    if _lacks_rows_for(run, again):
        again = [*(record for record in records if record.name == PREPARE.key), *again]
    for record in again:
        run.status = begun_again(run.status, record)
    run.update(retry_number=retry.number, completion_time=None, last_failure=None)


def _lacks_rows_for(run: RunPass, again: Sequence[Record]) -> bool:
    """Whether the tokenised rows are gone that tasks to be done again read: with `retain: Result`
    the export took them away, and prepare makes the same ones once more."""
    storage = run.spec.storage
    was_cleared = storage is not None and storage.retain is RetainPolicy.RESULT
    has_exported = bool(run.status.export)
    tasks = {record.name for record in again}
    return was_cleared and has_exported and bool(tasks - {PREPARE.key, EXPORT_TASK})


def _final_standing(status: StagedFineTuneStatus, problem: str) -> Standing:
    """Return the standing of a run that is over, whatever its spec says by now.

    `problem` is what is wrong with that spec.
    """
    previous = next(
        (item for item in status.conditions if item.type is ConditionType.FINISHED),
        None,
    )
    succeeded = status.state is RunState.SUCCEEDED
    fallback = ConditionReason.COMPLETED if succeeded else ConditionReason.STAGE_FAILED
    return Standing(
        state=RunState.SUCCEEDED if succeeded else RunState.FAILED,
        reason=previous.reason if previous else fallback,
        message=previous.message if previous else "",
        refusal=problem,
        is_stalled=not succeeded,
    )


def _walk(run: RunPass) -> Standing:
    """Take the tasks in order, and return the standing of the first that is not done."""
    standing = _prepare_again_if_edited(run) or advance(run, PREPARE) or _plan(run)
    if standing is not None:
        return standing
    for step in run.steps[1:]:
        standing = advance(run, step)
        if standing is not None:
            return standing
    retry = run.spec.retry
    run.update(
        completion_time=run.circumstances.now,
        # An order that was given while the run was at work has found what it wanted.
        retry_number=max(run.status.retry_number, retry.number if retry is not None else 0),
    )
    return Standing(state=RunState.SUCCEEDED, reason=ConditionReason.COMPLETED)


def _prepare_again_if_edited(run: RunPass) -> Standing | None:
    """Leave what was prepared for another spec: until it is planned, a run can be edited."""
    record = run.record_of(PREPARE)
    job = run.objects.newest_job(PREPARE.key, after_attempt=record.attempts_before)
    if run.record is not None or job is None:
        return None
    if job.config_digest == config_digest(run.stage_file(PREPARE)):
        return None
    if job.phase is JobPhase.ACTIVE:
        if not job.is_deleting:
            run.act(DeleteJob(name=job.name, uid=job.uid))
        # As after a suspension, the attempt does not count.
        run.set(PREPARE, attempts=max(record.attempts, job.attempt), state=StageState.INTERRUPTED)
        return at_work(PREPARE, "the manifest was edited; prepare begins again")
    run.set(PREPARE, attempts=max(record.attempts, job.attempt))
    run.begin_again(PREPARE)
    return None


def _plan(run: RunPass) -> Standing | None:
    """See to it that there is a plan for the spec as it is; None if so."""
    record = run.record
    if record is not None and record.spec_digest == digest_of_planned(run.spec):
        return None
    facts = record.facts if record is not None else _prepared_facts(run)
    if facts is None:
        # The pod that measured them is gone, and nothing was planned: measured again.
        run.begin_again(PREPARE)
        return advance(run, PREPARE)
    planned = plan_run(run.spec, facts, run.status, record)
    if isinstance(planned, Standing):
        suspend_all(run)
        return planned
    run.record = planned
    name = plan_record_name(run.owner.name, planned.plan.digest)
    run.act(Create(manifest=build_plan_record(run.owner, name, planned.data())))
    run.status = with_stages(run.status, planned.plan.stages)
    if record is not None:
        _leave_jobs_of_pending_stages(run, record)
    run.update(
        plan_digest=planned.plan.digest,
        model_digest=facts.model.digest or "",
        data_digest=facts.data.digest or "",
    )
    return None


def _leave_jobs_of_pending_stages(run: RunPass, before: PlanRecord) -> None:
    """Have no Job count that was made for another plan of a stage which has yet to be trained.

    Nor does the micro-batch size that memory ran out down to, where the stage is another one now.
    """
    planned = {stage.name: _without_place(stage) for stage in before.plan.stages}
    for step in run.steps:
        if step.stage is None or run.record_of(step).state is not StageState.PENDING:
            continue
        if planned.get(step.stage.name) != _without_place(step.stage):
            run.set(step, micro_batch_size=None)
        attempts = run.record_of(step).attempts
        job = run.objects.newest_job(step.key, after_attempt=run.record_of(step).attempts_before)
        if job is None:
            continue
        if job.phase is JobPhase.ACTIVE and not job.is_deleting:
            run.act(DeleteJob(name=job.name, uid=job.uid))
        attempts = max(attempts, job.attempt)
        run.set(step, attempts=attempts, attempts_before=attempts)


def _without_place(stage: PlannedStage) -> PlannedStage:
    return stage.model_copy(update={"index": 0, "estimate": None, "prefix_cache": None})


def _prepared_facts(run: RunPass) -> Facts | None:
    job = run.objects.newest_job(PREPARE.key)
    report = report_of(run, job) if job is not None else None
    return report.facts if report is not None else None
