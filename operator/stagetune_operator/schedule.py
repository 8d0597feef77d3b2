"""Which layers each stage opens, on which rows, and how fast it learns: the plan before estimates.

Every function takes a valid spec and counts; where model and spec do not fit together the result is
still defined, and `plan_checks` says what is wrong with it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from stagetune_api.facts import GradientFacts
from stagetune_api.spec import StagedFineTuneSpec
from stagetune_api.training_spec import (
    DataPartition,
    EmbeddingsPolicy,
    ExplicitStageSpec,
    HeadPolicy,
    Interpolation,
    LayerRange,
    LearningRateByDepth,
    Order,
    ScheduleSpec,
    TrainingSpec,
)
from stagetune_operator.gradient_groups import GradientPlan, decide_groups, flat_profile
from stagetune_operator.layer_groups import split_layers, stage_name, widened, with_open_top


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A stage before the rows are dealt out; `path` is where its part of the spec stands."""

    path: str
    name: str
    group: LayerRange
    """The layers whose turn it is; what else the stage opens does not move its learning rate."""
    layers: LayerRange
    top_layers: LayerRange | None = None
    embeddings: bool
    head: bool
    epochs: float
    data_fraction: float
    data_offset: float = 0.0
    learning_rate: float | None = None
    """The stage's own rate; None where that of `training` counts."""
    batch_size: int | None = None
    micro_batch_size: int | None = None
    rank: int | None = None

    @property
    def opened(self) -> frozenset[int]:
        """Every layer that the stage opens."""
        ranges = [self.layers] if self.top_layers is None else [self.layers, self.top_layers]
        return frozenset(layer for part in ranges for layer in range(part.first, part.last + 1))


@dataclass(frozen=True)
class Drafts:
    """The stages in running order, and what a profile of gradients decided about them."""

    stages: list[Draft]
    gradients: GradientPlan | None = None


def draft_stages(
    spec: StagedFineTuneSpec, num_layers: int, profile: GradientFacts | None = None
) -> Drafts:
    """Return the stages in running order, from the explicit list or by the schedule's rule.

    Order GradientNorm goes by `profile`; without one, all layers count as alike.
    """
    schedule = spec.schedule_in_use
    if schedule is not None:
        return _scheduled(spec, schedule, num_layers, profile or flat_profile(num_layers))
    return Drafts(
        [_explicit(index, stage, num_layers) for index, stage in enumerate(spec.stages or [])]
    )


def _explicit(index: int, stage: ExplicitStageSpec, num_layers: int) -> Draft:
    layers, top_layers = with_open_top(stage.layers, stage.open_top, num_layers)
    return Draft(
        path=f"spec.stages[{index}]",
        name=stage.name,
        group=stage.layers,
        layers=layers,
        top_layers=top_layers,
        embeddings=stage.embeddings,
        head=stage.head,
        epochs=stage.epochs,
        data_fraction=stage.data_fraction,
        data_offset=stage.data_offset,
        learning_rate=stage.learning_rate,
        batch_size=stage.batch_size,
        micro_batch_size=stage.micro_batch_size,
        rank=stage.rank,
    )


def _scheduled(
    spec: StagedFineTuneSpec, schedule: ScheduleSpec, num_layers: int, profile: GradientFacts
) -> Drafts:
    groups = split_layers(schedule, num_layers)
    options, gradients = spec.gradient_profile, None
    if options is not None:
        chosen, gradients = decide_groups(options, schedule.epochs, groups, profile)
        turns = [(group.layers, group.layers, group.epochs) for group in chosen]
    else:
        turns = [
            (group, widened(schedule, groups, index), schedule.epochs)
            for index, group in enumerate(groups)
        ]
        if schedule.order is Order.TOP_DOWN:
            turns.reverse()
    disjoint = schedule.data_partition is DataPartition.DISJOINT
    equal_share = 1 / (len(turns) * schedule.passes) if disjoint else 1.0
    drafts = []
    for number, (group, reach, epochs) in itertools.product(range(1, schedule.passes + 1), turns):
        layers, top_layers = with_open_top(reach, schedule.open_top, num_layers)
        head = schedule.head is HeadPolicy.LAST_STAGE and reach.last == groups[-1].last
        drafts.append(
            Draft(
                path="spec.schedule",
                name=stage_name(layers, number),
                group=group,
                layers=layers,
                top_layers=top_layers,
                embeddings=schedule.embeddings is EmbeddingsPolicy.FIRST_STAGE and reach.first == 0,
                head=head,
                epochs=epochs,
                data_fraction=schedule.data_fraction or equal_share,
            )
        )
    return Drafts(drafts, gradients)


def deal_rows(
    spec: StagedFineTuneSpec, drafts: Sequence[Draft], train_rows: int
) -> list[tuple[int, int]]:
    """Return (start, end) of each stage's rows in the one shuffled order of the training rows.

    Shared rows are the first of that order for every stage, disjoint ones consecutive slices in
    running order, one for each stage of each pass. An explicit stage's rows begin at its offset. A
    stage for which no row is left gets an empty range.
    """
    schedule = spec.schedule_in_use
    if schedule is not None and schedule.data_partition is DataPartition.DISJOINT:
        share = drafts[0].data_fraction * train_rows
        borders = [min(round(share * index), train_rows) for index in range(len(drafts) + 1)]
        return list(itertools.pairwise(borders))
    return [
        (
            round(draft.data_offset * train_rows),
            min(round((draft.data_offset + draft.data_fraction) * train_rows), train_rows),
        )
        for draft in drafts
    ]


def learning_rates(training: TrainingSpec, drafts: Sequence[Draft]) -> list[float]:
    """Return each stage's learning rate: its own, the one for all, or the one by its depth.

    By depth, a stage stands where the centre of its group does between the lowest and the highest
    centre of all stages; a single height counts as the top.
    """
    by_depth = training.learning_rate_by_depth
    if by_depth is None:
        for_all = training.learning_rate or 0.0  # 0.0 only where every stage has its own
        return [draft.learning_rate or for_all for draft in drafts]
    centres = [(draft.group.first + draft.group.last) / 2 for draft in drafts]
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
