"""How a schedule cuts the decoder: groups of layers, what a stage opens beside its own, and names.

`schedule` orders the groups and gives them rows and rates.
"""

from collections.abc import Sequence

from stagetune_api import names
from stagetune_api.training_spec import LayerRange, Order, ScheduleSpec


def split_layers(schedule: ScheduleSpec, num_layers: int) -> list[LayerRange]:
    """Return the groups of layers from the bottom up; together they are all of them, once each.

    With `layersPerStage` the topmost group may be smaller; with `stageCount` group sizes differ by
    one at most and the larger ones are at the bottom. More stages than layers count as that many.
    The layers of `openTop` are in no group, unless they are all there are.
    """
    below = num_layers - schedule.open_top
    num_layers = below if below > 0 else num_layers
    if schedule.layers_per_stage is not None:
        size = schedule.layers_per_stage
        sizes = [min(size, num_layers - first) for first in range(0, num_layers, size)]
    else:
        count = min(schedule.count or 1, num_layers)
        size, num_larger = divmod(num_layers, count)
        sizes = [size + 1 if index < num_larger else size for index in range(count)]
    firsts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [
        LayerRange(first=first, last=first + size - 1)
        for first, size in zip(firsts, sizes, strict=True)
    ]


def widened(schedule: ScheduleSpec, groups: Sequence[LayerRange], index: int) -> LayerRange:
    """Return what the stage of `groups[index]` opens below the open top.

    Cumulative stages open all groups from the end where the schedule begins; with `overlap` a
    stage opens layers of the group below too.
    """
    group = groups[index]
    if schedule.cumulative and schedule.order is Order.TOP_DOWN:
        return LayerRange(first=group.first, last=groups[-1].last)
    if schedule.cumulative:
        return LayerRange(first=groups[0].first, last=group.last)
    return LayerRange(first=max(group.first - schedule.overlap, 0), last=group.last)


def with_open_top(
    layers: LayerRange, open_top: int, num_layers: int
) -> tuple[LayerRange, LayerRange | None]:
    """Return `layers` and the `open_top` topmost layers above them.

    The second is None where there is nothing above, or no frozen layer between: the first then
    reaches to the top.
    """
    # Layers that the model does not have are a problem that `plan_checks` shows.
    if open_top == 0 or layers.last >= num_layers:
        return layers, None
    first = max(num_layers - open_top, 0)
    if first > layers.last + 1:
        return layers, LayerRange(first=first, last=num_layers - 1)
    return LayerRange(first=min(layers.first, first), last=num_layers - 1), None


def stage_name(layers: LayerRange, number: int = 1) -> str:
    """Return the name of a schedule's stage in its pass `number`, the first being 1.

    `layers-0-7`, and `layers-0-7-p2` in the second pass; where that is too long, `l100-107-p2`,
    which is short enough for every layer and pass there can be.
    """
    where = f"{layers.first}" if layers.count == 1 else f"{layers.first}-{layers.last}"
    if number == 1:
        return f"layers-{where}"
    name = f"layers-{where}-p{number}"
    return name if len(name) <= names.STAGE_NAME_MAX_LENGTH else f"l{where}-p{number}"
