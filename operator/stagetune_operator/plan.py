"""From a valid spec and the facts about model and data to the ordered stages, or to what is wrong.

Validation has looked at the manifest alone; here it meets the model and the data. `schedule` cuts
the stages, `plan_checks` says what does not agree, `estimate` adds what each stage needs; the
runner turns every stage of the plan into a StageConfig.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from stagetune_api import names
from stagetune_api.artifact import digest_of_json
from stagetune_api.base import ApiModel
from stagetune_api.facts import Facts
from stagetune_api.problems import Problem
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.spec_checks import check_spec
from stagetune_api.stage import (
    PlannedStage,
    PrefixCachePlan,
    RowRange,
    StageEstimate,
    training_of_stage,
)
from stagetune_api.training_spec import AdapterScope, LoraSpec, MethodSpec, TrainingSpec
from stagetune_operator.estimate import (
    CLUSTER_GPU,
    Machine,
    added_layers,
    estimate_full_fine_tuning,
    estimate_stage,
)
from stagetune_operator.gradient_groups import GradientPlan
from stagetune_operator.plan_checks import find_memory_problems, find_problems
from stagetune_operator.prefix_plan import StagePasses, most_cached_bytes, plan_prefix_caches
from stagetune_operator.protection_estimate import (
    ProtectedStage,
    add_protection,
    asks_the_base,
    hidden_states_bytes,
)
from stagetune_operator.schedule import Draft, deal_rows, draft_stages, learning_rates
from stagetune_operator.schedule_checks import find_profile_problems
from stagetune_operator.stage_scope import StageScope, uses_adapters

Count = Annotated[int, Field(ge=0)]


class PlanSummary(ApiModel):
    """What the stages add up to, beside full fine-tuning of the same model on the same rows."""

    parameters: Count
    """parameters of the model."""
    num_layers: Count
    """numLayers of the decoder."""
    added_layers: Count = 0
    """addedLayers are the blocks that method Expand adds to the decoder."""
    added_parameters: Count = 0
    """addedParameters of those blocks."""
    train_rows: Count
    """trainRows of the data."""
    validation_rows: Count
    """validationRows of the data."""
    train_tokens: Count
    """trainTokens of the data."""
    max_row_tokens: Count
    """maxRowTokens, for which the memory is estimated."""
    total_steps: Count
    """totalSteps of all stages."""
    total_flops: Count
    """totalFlops of all stages: steps times stepFlops, and what prefix caches take to fill."""
    relative_total_flops: Annotated[float, Field(ge=0)]
    """relativeTotalFlops is totalFlops over that of one pass of full fine-tuning over all rows."""
    peak_memory_bytes: Count
    """peakMemoryBytes of the stage that needs most."""
    disk_bytes: Count
    """diskBytes of all stages together: nothing is pruned between them but the states of anchors
    and of prefix caches, of which there are two at once."""
    full_fine_tuning: StageEstimate
    """fullFineTuning is what tuning every weight at once would need, step by step."""


class Plan(ApiModel):
    """The ordered stages of a run, every number resolved."""

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """digest over all that decides the result: the spec's model, data, method and training, the
    digests of what was prepared, and the stages. Estimates are left out, so that a better formula
    in a later version is not a new plan."""
    model_digest: str | None = None
    """modelDigest of the prepared base model; absent in a plan made from assumptions."""
    data_digest: str | None = None
    """dataDigest of the tokenised rows; absent in a plan made from assumptions."""
    stages: Annotated[list[PlannedStage], Field(min_length=1, max_length=names.MAX_STAGES)]
    """stages in running order."""
    gradients: GradientPlan | None = None
    """gradients and what was decided by them; only with order GradientNorm."""
    summary: PlanSummary
    """summary of the stages."""


def make_plan(
    spec: StagedFineTuneSpec, facts: Facts, machine: Machine = CLUSTER_GPU
) -> Plan | list[Problem]:
    """Return the plan, or every problem that keeps it from being made.

    Equal arguments give equal plans, to the digest. `machine` decides what precision Auto means
    and, where its memory is known, whether the stages fit.
    """
    problems = check_spec(spec)
    if problems:
        return problems
    problems = find_profile_problems(spec, facts)
    if problems:
        return problems
    drafts = draft_stages(spec, facts.model.num_layers, facts.gradients)
    problems = find_problems(spec, facts, drafts.stages)
    if problems:
        return problems
    stages = _planned_stages(spec, facts, machine, drafts.stages)
    problems = find_memory_problems(spec, machine, stages)
    if problems:
        return problems
    full = estimate_full_fine_tuning(facts, spec.training, machine)
    return Plan(
        digest=_digest(spec, facts, stages),
        model_digest=facts.model.digest,
        data_digest=facts.data.digest,
        stages=stages,
        gradients=drafts.gradients,
        summary=_summary(facts, spec, stages, full),
    )


def _planned_stages(
    spec: StagedFineTuneSpec, facts: Facts, machine: Machine, drafts: Sequence[Draft]
) -> list[PlannedStage]:
    rates = learning_rates(spec.training, drafts)
    passes = _stage_passes(spec, facts, drafts)
    caches = plan_prefix_caches(spec, facts, passes, machine)
    return [
        PlannedStage(
            index=index,
            name=draft.name,
            layers=draft.layers,
            top_layers=draft.top_layers,
            embeddings=draft.embeddings,
            head=draft.head,
            learning_rate=rates[index],
            epochs=draft.epochs,
            rows=RowRange(start=stage.rows[0], end=stage.rows[1]),
            batch_size=draft.batch_size,
            micro_batch_size=draft.micro_batch_size,
            rank=draft.rank,
            steps=stage.steps,
            warmup_steps=_warmup_steps(stage),
            validation_interval=stage.validation_interval,
            estimate=_estimate(spec, facts, machine, index, stage, cache),
            prefix_cache=cache,
        )
        for index, (draft, stage, cache) in enumerate(zip(drafts, passes, caches, strict=True))
    ]


def _stage_passes(
    spec: StagedFineTuneSpec, facts: Facts, drafts: Sequence[Draft]
) -> list[StagePasses]:
    """Return what each stage opens, and which rows it sees how often."""
    ranks: dict[int, tuple[int, ...]] = {}
    stages = []
    for draft, rows in zip(drafts, deal_rows(spec, drafts, facts.data.train_rows), strict=True):
        training = training_of_stage(spec.training, draft)
        steps, interval = _steps(draft, rows[1] - rows[0], training)
        stages.append(
            StagePasses(
                scope=StageScope(
                    draft.layers,
                    draft.embeddings,
                    draft.head,
                    idle_ranks=_idle_adapters(spec.method, ranks, draft.opened),
                    top_layers=draft.top_layers,
                    rank=draft.rank,
                ),
                training=training,
                rows=rows,
                epochs=draft.epochs,
                steps=steps,
                validation_interval=interval,
            )
        )
        ranks = _adapters_after(spec.method, ranks, draft)
    return stages


def _estimate(
    spec: StagedFineTuneSpec,
    facts: Facts,
    machine: Machine,
    index: int,
    stage: StagePasses,
    cache: PrefixCachePlan | None,
) -> StageEstimate:
    scope = replace(
        stage.scope,
        asks_base=index == 0 or asks_the_base(spec.protection),
        measures_general=spec.evaluation.general_text is not None,
    )
    if cache is not None and cache.used:
        scope = replace(scope, prefix_cached=True, loaded_from=cache.begins_at)
    return add_protection(
        estimate_stage(facts, spec.method, stage.training, scope, machine),
        spec.protection,
        facts,
        ProtectedStage(
            method=spec.method,
            training=stage.training,
            scope=scope,
            rows=stage.rows[1] - stage.rows[0],
            is_first=index == 0,
        ),
        machine,
    )


def _idle_adapters(
    method: MethodSpec, ranks: Mapping[int, tuple[int, ...]], layers: frozenset[int]
) -> dict[int, tuple[int, ...]]:
    """Return the ranks, by layer, of earlier adapters beside what a stage of `layers` trains.

    A stage that opens a layer again goes on with the adapter which that layer has, unless every
    stage has adapters of its own.
    """
    goes_on = _shares_adapters(method)
    return {layer: there for layer, there in ranks.items() if not (goes_on and layer in layers)}


def _adapters_after(
    method: MethodSpec, ranks: Mapping[int, tuple[int, ...]], draft: Draft
) -> dict[int, tuple[int, ...]]:
    """Return the ranks of all adapters, by layer, once the stage is done."""
    if not uses_adapters(method):
        return {}
    rank = draft.rank or (method.lora or LoraSpec()).rank
    before = {} if _shares_adapters(method) else ranks
    return {**ranks, **{layer: (*before.get(layer, ()), rank) for layer in draft.opened}}


def _shares_adapters(method: MethodSpec) -> bool:
    return (method.lora or LoraSpec()).adapters is AdapterScope.SHARED


def _steps(draft: Draft, rows: int, training: TrainingSpec) -> tuple[int, int]:
    """Return the stage's steps, and the steps from one validation to the next.

    The last batch of an epoch may be smaller than the others; an interval is never longer than the
    stage.
    """
    steps_per_epoch = math.ceil(rows / training.batch_size)
    # Rounded first: 2.2 * 25 is 55.00000000000001 in binary and means 55 steps.
    steps = max(1, math.ceil(round(draft.epochs * steps_per_epoch, 6)))
    interval = math.ceil(steps_per_epoch / training.validations_per_epoch)
    return steps, min(interval, steps)


def _warmup_steps(stage: StagePasses) -> int:
    return min(round(stage.training.warmup_ratio * stage.steps), stage.steps - 1)


def _digest(spec: StagedFineTuneSpec, facts: Facts, stages: Sequence[PlannedStage]) -> str:
    body = {
        "model": spec.model.model_dump(mode="json", exclude={"secret_name"}),
        "dataset": spec.dataset.model_dump(mode="json", exclude={"secret_name"}),
        "method": spec.method.model_dump(mode="json"),
        **({"protection": spec.protection.model_dump(mode="json")} if spec.protection else {}),
        # How often to save changes no bit of the result, nor does the cache on a CPU.
        "training": spec.training.model_dump(
            mode="json", exclude={"checkpoint_interval_seconds", "prefix_cache"}
        ),
        "modelDigest": facts.model.digest,
        "dataDigest": facts.data.digest,
        "stages": [
            stage.model_dump(mode="json", exclude={"estimate", "prefix_cache"}) for stage in stages
        ],
    }
    return digest_of_json(body)


def _summary(
    facts: Facts, spec: StagedFineTuneSpec, stages: Sequence[PlannedStage], full: StageEstimate
) -> PlanSummary:
    data, training = facts.data, spec.training
    added = added_layers(facts.model, spec.method)
    total_flops = sum(stage.steps * stage.estimate.step_flops for stage in stages)
    caches = [stage.prefix_cache for stage in stages if stage.prefix_cache is not None]
    total_flops += sum(cache.flops for cache in caches)
    anchored = [hidden_states_bytes(spec.protection, facts, stage.rows.count) for stage in stages]
    # Of a stage that is done no checkpoint is being written any more.
    checkpoints = [stage.estimate.checkpoint_bytes for stage in stages]
    kept = sum(stage.estimate.disk_bytes for stage in stages) - sum(checkpoints) - sum(anchored)
    full_flops = math.ceil(data.train_rows / training.batch_size) * full.step_flops
    return PlanSummary(
        parameters=facts.model.parameters,
        num_layers=facts.model.num_layers,
        added_layers=added,
        added_parameters=added * facts.model.layer.parameters,
        train_rows=data.train_rows,
        validation_rows=data.validation_rows,
        train_tokens=data.train_tokens,
        max_row_tokens=data.max_row_tokens,
        total_steps=sum(stage.steps for stage in stages),
        total_flops=total_flops,
        relative_total_flops=round(total_flops / full_flops, 6),
        peak_memory_bytes=max(stage.estimate.memory_bytes for stage in stages),
        disk_bytes=kept + max(checkpoints) + max(anchored) + most_cached_bytes(stages),
        full_fine_tuning=full,
    )
