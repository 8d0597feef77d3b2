"""The plan that a run follows: made when its facts are known, and again when its stages are edited.

A started stage never changes: an edit that would is refused, whatever let it through.
"""

from collections.abc import Sequence

from stagetune_api.facts import Facts
from stagetune_api.problems import Problem, ProblemReason
from stagetune_api.report import Failure, FailureClass
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.spec_checks import num_gpus
from stagetune_api.stage import PlannedStage, plan_engine
from stagetune_api.status import ConditionReason, RunState, StagedFineTuneStatus, StageState
from stagetune_operator.conditions import Standing
from stagetune_operator.estimate import Machine
from stagetune_operator.plan import make_plan
from stagetune_operator.plan_record import PlanRecord, digest_of_planned


def plan_run(
    spec: StagedFineTuneSpec,
    facts: Facts,
    status: StagedFineTuneStatus,
    record: PlanRecord | None,
) -> PlanRecord | Standing:
    """Return the plan for `spec`, or why there is none; `record` is the plan followed so far."""
    plan = make_plan(spec, facts, _machine(spec))
    if isinstance(plan, list):
        return refusal(plan)
    if record is not None and (name := _changed_stage(status, record, plan.stages)) is not None:
        return Standing(
            state=RunState.FAILED,
            reason=ConditionReason.STARTED_STAGE_CHANGED,
            message=f"spec.stages: the stage {name} has started and would no longer be the same; "
            "undo the change, only stages that have not started can be edited",
            is_stalled=True,
        )
    return PlanRecord(plan=plan, facts=facts, spec_digest=digest_of_planned(spec))


def refusal(problems: Sequence[Problem]) -> Standing:
    """Return the standing of a run whose manifest asks for what cannot be done."""
    message = "\n".join(str(problem) for problem in problems)
    if any(problem.reason is ProblemReason.DOES_NOT_FIT for problem in problems):
        reason, invalid = ConditionReason.DOES_NOT_FIT, ""
    else:
        reason, invalid = ConditionReason.INVALID_SPEC, message
    return Standing(
        state=RunState.FAILED, reason=reason, message=message, refusal=invalid, is_stalled=True
    )


def changed_inputs(record: PlanRecord, facts: Facts) -> Failure | None:
    """Return the failure of a run whose model or data are no longer those of its plan."""
    pairs = {
        "spec.model.source": (record.facts.model.digest, facts.model.digest),
        "spec.dataset.source": (record.facts.data.digest, facts.data.digest),
    }
    changed = [path for path, (planned, found) in pairs.items() if planned != found]
    if not changed:
        return None
    return Failure(
        failure_class=FailureClass.USER_ERROR,
        exit_code=0,
        message=f"{' and '.join(changed)}: holds something else than when the run was planned; put "
        "it back and raise spec.retry.number, or apply the manifest under another name",
    )


def _machine(spec: StagedFineTuneSpec) -> Machine:
    """Return what a stage has to fit into; the memory of a GPU is not known here."""
    gpus = num_gpus(spec)
    return Machine(is_gpu=gpus > 0, engine=plan_engine(spec.runtime, num_gpus=gpus))


def _decided(stage: PlannedStage) -> dict[str, object]:
    """Return what of a stage an edit must not change once it has started.

    Its cache is decided together with those of later stages, which may still change.
    """
    return stage.model_dump(exclude={"estimate", "prefix_cache"})


def _changed_stage(
    status: StagedFineTuneStatus, record: PlanRecord, stages: Sequence[PlannedStage]
) -> str | None:
    """Return the name of a started stage that `stages` no longer hold as it was."""
    for index, item in enumerate(status.stages):
        if item.state is StageState.PENDING:
            continue
        if index >= len(stages) or _decided(stages[index]) != _decided(record.plan.stages[index]):
            return item.name
    return None
