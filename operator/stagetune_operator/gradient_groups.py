"""From a profile of gradient norms to the groups that train, in which order and for how long.

Comes after prepare has measured the profile (`stagetune_trainer.gradient_profile`) and
`layer_groups` has cut the decoder; `schedule` makes stages of the result. The measure is Auto-RGN's
(arXiv 2210.11466), which scales learning rates by it; here it decides about whole groups.
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stagetune_api.base import ApiModel
from stagetune_api.facts import GradientFacts
from stagetune_api.training_spec import GradientNormSpec, LayerRange


class GradientDecision(StrEnum):
    """What becomes of a group."""

    TRAINED = "Trained"
    MERGED = "Merged"
    SKIPPED = "Skipped"


class GradientGroup(ApiModel):
    """One group of layers as the profile sees it."""

    layers: LayerRange
    """layers of the group."""
    share: Annotated[float, Field(ge=0)]
    """share is the mean signal of its layers over that of all layers."""
    decision: GradientDecision
    """decision: Trained in a stage of its own, Merged with its neighbours, or Skipped."""
    epochs: Annotated[float, Field(ge=0)]
    """epochs of the stage that trains it; 0 where it is skipped."""


class GradientPlan(ApiModel):
    """The profile, and what was decided by it."""

    profile: GradientFacts
    """profile of the decoder layers."""
    groups: Annotated[list[GradientGroup], Field(max_length=1024)]
    """groups from the bottom up."""


class GroupToTrain(ApiModel):
    """A group that becomes a stage."""

    layers: LayerRange
    """layers of one group, or of neighbours that were merged."""
    share: float
    """share of all its layers together."""
    epochs: float
    """epochs over the stage's rows."""


def decide_groups(
    options: GradientNormSpec,
    epochs_per_stage: float,
    groups: Sequence[LayerRange],
    profile: GradientFacts,
) -> tuple[list[GroupToTrain], GradientPlan]:
    """Return the groups to train in running order, and the decision about each of `groups`.

    `groups` are neighbours from the bottom up, and the profile has a signal for each of their
    layers. The largest share comes first, of equal ones the lower group.
    """
    signals = profile.relative_norms
    shares = [_share(signals, layers) for layers in groups]
    largest = shares.index(max(shares))
    trained = [
        share >= options.skip_below or index == largest for index, share in enumerate(shares)
    ]
    stages: list[GroupToTrain] = []
    decided = []
    for run in _merged(options, trained, shares):
        layers = LayerRange(first=groups[run[0]].first, last=groups[run[-1]].last)
        share = _share(signals, layers)
        epochs = _digits(epochs_per_stage * min(max(share, options.floor), options.cap))
        decision = GradientDecision.MERGED if len(run) > 1 else GradientDecision.TRAINED
        if trained[run[0]]:
            stages.append(GroupToTrain(layers=layers, share=share, epochs=epochs))
        else:
            decision, epochs = GradientDecision.SKIPPED, 0.0
        decided += [
            GradientGroup(
                layers=groups[index], share=shares[index], decision=decision, epochs=epochs
            )
            for index in run
        ]
    stages.sort(key=lambda stage: (-stage.share, stage.layers.first))
    return stages, GradientPlan(profile=profile, groups=decided)


def _merged(
    options: GradientNormSpec, trained: Sequence[bool], shares: Sequence[float]
) -> Iterator[list[int]]:
    """Yield the groups' indices in runs that stay together: one group, or neighbours that merge."""
    run: list[int] = []
    for index, share in enumerate(shares):
        merges = trained[index] and share < options.merge_below
        if run and merges and trained[run[-1]] and shares[run[-1]] < options.merge_below:
            run.append(index)
            continue
        if run:
            yield run
        run = [index]
    yield run


def _share(signals: Sequence[float], layers: LayerRange) -> float:
    """Return the mean signal of `layers` over that of all; 1 where nothing has a gradient."""
    of_all = sum(signals) / len(signals)
    if of_all == 0:
        return 1.0
    return _digits(sum(signals[layers.first : layers.last + 1]) / layers.count / of_all)


def _digits(value: float) -> float:
    """Return `value` to six digits: they are shown, and part of a plan's digest."""
    return float(f"{value:.6g}")


def flat_profile(num_layers: int) -> GradientFacts:
    """Return the profile that is assumed before one is measured: all layers alike."""
    return GradientFacts(relative_norms=[1.0] * num_layers, rows=0, tokens=0)


def describe_gradients(plan: GradientPlan) -> str:
    """Return in one line which groups train and which do not, with their shares."""
    parts = [
        f"layers {group.layers.first}-{group.layers.last} {group.decision.value.lower()} "
        f"(share {group.share:.2f}, {group.epochs:.3g} epochs)"
        for group in plan.groups
    ]
    rows = plan.profile.rows
    source = f"measured on {rows} rows" if rows else "assumed to be flat"
    return f"gradient norms, {source}: {'; '.join(parts)}"
