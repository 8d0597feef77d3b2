"""Which layers each stage opens, on which rows, and how fast it learns: the plan before estimates.

Every function takes a valid spec and counts; where model and spec do not fit together the result is
still defined, and `plan_checks` says what is wrong with it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from stagetune_api.spec import (
    DataPartition,
    EmbeddingsPolicy,
    HeadPolicy,
    Interpolation,
    LayerRange,
    LearningRateByDepth,
    Order,
    ScheduleSpec,
    StagedFineTuneSpec,
    TrainingSpec,
)


@dataclass(frozen=True)
class Draft:
    """A stage before the rows are dealt out; `path` is where its part of the spec stands."""

    path: str
    name: str
    layers: LayerRange
    embeddings: bool
    head: bool
    epochs: float
    data_fraction: float
    learning_rate: float | None = None
    """The stage's own rate; None where that of `training` counts."""


def draft_stages(spec: StagedFineTuneSpec, num_layers: int) -> list[Draft]:
    """Return the stages in running order, from the explicit list or by the schedule's rule."""
    if spec.schedule is not None:
        return _scheduled(spec.schedule, num_layers)
    return [
        Draft(
            path=f"spec.stages[{index}]",
            name=stage.name,
            layers=stage.layers,
            embeddings=stage.embeddings,
            head=stage.head,
            epochs=stage.epochs,
            data_fraction=stage.data_fraction,
            learning_rate=stage.learning_rate,
        )
        for index, stage in enumerate(spec.stages or [])
    ]


def _scheduled(schedule: ScheduleSpec, num_layers: int) -> list[Draft]:
    groups = split_layers(schedule, num_layers)
    disjoint = schedule.data_partition is DataPartition.DISJOINT
    fraction = schedule.data_fraction or (1 / len(groups) if disjoint else 1.0)
    drafts = [
        Draft(
            path="spec.schedule",
            name=_layers_name(layers),
            layers=layers,
            embeddings=schedule.embeddings is EmbeddingsPolicy.FIRST_STAGE and layers.first == 0,
            head=schedule.head is HeadPolicy.LAST_STAGE and layers.last == num_layers - 1,
            epochs=schedule.epochs_per_stage,
            data_fraction=fraction,
        )
        for layers in groups
    ]
    return drafts[::-1] if schedule.order is Order.TOP_DOWN else drafts


def split_layers(schedule: ScheduleSpec, num_layers: int) -> list[LayerRange]:
    """Return the groups of layers from the bottom up; together they are all layers, once each.

    With `layersPerStage` the topmost group may be smaller; with `stageCount` group sizes differ by
    one at most and the larger ones are at the bottom. More stages than layers count as that many.
    """
    if schedule.layers_per_stage is not None:
        size = schedule.layers_per_stage
        sizes = [min(size, num_layers - first) for first in range(0, num_layers, size)]
    else:
        count = min(schedule.stage_count or 1, num_layers)
        size, num_larger = divmod(num_layers, count)
        sizes = [size + 1 if index < num_larger else size for index in range(count)]
    firsts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        LayerRange(first=first, last=first + size - 1)
        for first, size in zip(firsts, sizes, strict=True)
    ]


def _layers_name(layers: LayerRange) -> str:
    if layers.count == 1:
        return f"layers-{layers.first}"
    return f"layers-{layers.first}-{layers.last}"


def deal_rows(
    spec: StagedFineTuneSpec, drafts: Sequence[Draft], train_rows: int
) -> list[tuple[int, int]]:
    """Return (start, end) of each stage's rows in the one shuffled order of the training rows.

    Shared rows are the first of that order for every stage, disjoint ones consecutive slices in
    running order. A stage for which no row is left gets an empty range.
    """
    if spec.schedule is not None and spec.schedule.data_partition is DataPartition.DISJOINT:
        share = drafts[0].data_fraction * train_rows
        borders = [min(round(share * index), train_rows) for index in range(len(drafts) + 1)]
        return list(itertools.pairwise(borders))
    return [(0, round(draft.data_fraction * train_rows)) for draft in drafts]


def learning_rates(training: TrainingSpec, drafts: Sequence[Draft]) -> list[float]:
    """Return each stage's learning rate: its own, the one for all, or the one by its depth.

    By depth, a stage stands where the centre of its layers does between the lowest and the highest
    centre of all stages; a single height counts as the top.
    """
    by_depth = training.learning_rate_by_depth
    if by_depth is None:
        for_all = training.learning_rate or 0.0  # 0.0 only where every stage has its own
        return [draft.learning_rate or for_all for draft in drafts]
    centres = [(draft.layers.first + draft.layers.last) / 2 for draft in drafts]
    lowest, highest = min(centres), max(centres)
    if lowest == highest:
        return [by_depth.top] * len(drafts)
    return [_rate_at(by_depth, (centre - lowest) / (highest - lowest)) for centre in centres]


def _rate_at(by_depth: LearningRateByDepth, height: float) -> float:
    """Return the rate at `height`, which is 0 at the lowest centre and 1 at the highest."""
    bottom, top = by_depth.bottom, by_depth.top
    if height in (0.0, 1.0):
        return top if height else bottom
    if by_depth.interpolation is Interpolation.LINEAR:
        rate = bottom + (top - bottom) * height
    else:
        rate = bottom * (top / bottom) ** height
    # Six digits, so that the last bit of a platform's pow() never changes a plan's digest.
    return min(max(float(f"{rate:.6g}"), min(bottom, top)), max(bottom, top))
