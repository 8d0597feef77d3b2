"""Rules over more than one field of schedules and explicit stages, a part of `training_checks`.

`schedule_rules` says the same as CEL; a test holds the two together.
"""

from collections.abc import Iterator

from stagetune_api import names
from stagetune_api.problems import Problem, conflict
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.training_spec import (
    DataPartition,
    EmbeddingsPolicy,
    ExplicitStageSpec,
    HeadPolicy,
    MethodType,
    Order,
    ScheduleSpec,
)

_SLACK = 1e-9
"""So that three times 0.3333333334 is not more than the whole."""


def check_schedule_options(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    """Yield what in `spec.schedule` does not go together."""
    schedule = spec.schedule
    if schedule is None:
        return
    yield from _check_counts(schedule)
    if schedule.overlap and schedule.cumulative:
        yield conflict(
            "spec.schedule.overlap",
            f"{schedule.overlap} has no meaning beside cumulative, which keeps whole groups open; "
            "remove one of them",
        )
    if schedule.order is Order.GRADIENT_NORM:
        yield from _check_gradient_norm(schedule)
    elif schedule.gradient_norm is not None:
        yield conflict(
            "spec.schedule.gradientNorm",
            f"order is {schedule.order}; set it to GradientNorm or remove gradientNorm",
        )
    given = {
        "openTop": schedule.open_top > 0,
        "cumulative": schedule.cumulative,
        "overlap": schedule.overlap > 0,
        "order: GradientNorm": schedule.order is Order.GRADIENT_NORM,
    }
    if spec.method.type is MethodType.EXPAND and any(given.values()):
        found = ", ".join(name for name, is_given in given.items() if is_given)
        yield conflict(
            "spec.schedule",
            f"Expand trains only blocks that it adds; remove {found}",
        )


def _check_counts(schedule: ScheduleSpec) -> Iterator[Problem]:
    size, count, passes = schedule.layers_per_stage, schedule.count, schedule.passes
    fraction = schedule.data_fraction
    disjoint = schedule.data_partition is DataPartition.DISJOINT
    stages = count * passes if count is not None else None
    if disjoint and fraction is not None and stages and fraction * stages > 1 + _SLACK:
        yield conflict(
            "spec.schedule.dataFraction",
            f"{fraction} of the rows for each of {stages} disjoint stages is more than there is; "
            f"use at most {1 / stages:.4f} or dataPartition: Shared",
        )
    if stages is not None and stages > names.MAX_STAGES:
        yield conflict(
            "spec.schedule.passes",
            f"{passes} passes of {count} stages are more than the {names.MAX_STAGES} stages that a "
            "run may have; lower one of them",
        )
    if size is not None and schedule.overlap >= size:
        yield conflict(
            "spec.schedule.overlap",
            f"{schedule.overlap} is not smaller than layersPerStage {size}, so a stage would open "
            f"all of the group below its own; use at most {size - 1}",
        )


def _check_gradient_norm(schedule: ScheduleSpec) -> Iterator[Problem]:
    given = {
        "cumulative": schedule.cumulative,
        "overlap": schedule.overlap > 0,
        "passes": schedule.passes > 1,
    }
    if any(given.values()):
        found = ", ".join(name for name, is_given in given.items() if is_given)
        yield conflict(
            "spec.schedule.order",
            "GradientNorm runs the groups once, in an order of their own, and leaves some out; "
            f"remove {found} or use BottomUp",
        )
    ends = (schedule.head is HeadPolicy.NEVER, schedule.embeddings is EmbeddingsPolicy.NEVER)
    if not all(ends):
        yield conflict(
            "spec.schedule.order",
            "GradientNorm may leave out the group that head or embeddings train with; use Never "
            "for both, or order BottomUp",
        )


def check_stage_options(spec: StagedFineTuneSpec) -> Iterator[Problem]:
    """Yield what in the explicit stages does not go together or with the rest."""
    for index, stage in enumerate(spec.stages or []):
        path = f"spec.stages[{index}]"
        if stage.data_offset + stage.data_fraction > 1 + _SLACK:
            yield conflict(
                f"{path}.dataOffset",
                f"{stage.data_offset} and dataFraction {stage.data_fraction} reach beyond the "
                f"rows; use a dataFraction of at most {1 - stage.data_offset:.6g}",
            )
        if stage.open_top and spec.method.type is MethodType.EXPAND:
            yield conflict(
                f"{path}.openTop",
                "Expand trains only blocks that it adds; remove openTop",
            )
        if stage.rank and spec.method.type not in (MethodType.LORA, MethodType.QLORA):
            yield conflict(
                f"{path}.rank",
                f"method.type is {spec.method.type}; set it to LoRA or QLoRA, or remove rank",
            )
        yield from _check_batches(path, stage, spec)


def _check_batches(
    path: str, stage: ExplicitStageSpec, spec: StagedFineTuneSpec
) -> Iterator[Problem]:
    if stage.batch_size is None and stage.micro_batch_size is None:
        return
    batch = stage.batch_size or spec.training.batch_size
    micro = stage.micro_batch_size or spec.training.micro_batch_size
    if batch % micro:
        field = "batchSize" if stage.micro_batch_size is None else "microBatchSize"
        yield conflict(
            f"{path}.{field}",
            f"a microBatchSize of {micro} does not divide a batchSize of {batch}; use a divisor, "
            "or give the stage both",
        )
