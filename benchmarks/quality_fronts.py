"""From measured cells to fronts, to what stands against LoRA, and to the table of docs/quality.md.

All pure: cells in, numbers out. Forgetting is the rise of the loss on general text over the base's.
"""

import itertools
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]

SCORES = ("exactMatch", "validationLoss", "generalLoss", "klToBase", "seconds", "peakMemoryBytes")
_BOOTSTRAPS = 2000


@dataclass(frozen=True, kw_only=True)
class Point:
    """An arm at one rate and number of passes, over its seeds."""

    arm: str
    rate: float
    passes: float
    seeds: tuple[Result, ...]

    def mean(self, score: str) -> float:
        """Return the mean of `score` over the seeds."""
        return statistics.fmean(result[score] for result in self.seeds)


def points_of(results: Iterable[Result]) -> dict[str, list[Point]]:
    """Return each arm's points, the seeds of a point in their order."""
    grouped: dict[tuple[str, float, float], list[Result]] = defaultdict(list)
    for result in results:
        grouped[result["arm"], result["rate"], result["passes"]].append(result)
    arms: dict[str, list[Point]] = defaultdict(list)
    for (arm, rate, passes), seeds in sorted(grouped.items(), key=lambda item: item[0]):
        ordered = tuple(sorted(seeds, key=lambda result: result["seed"]))
        arms[arm].append(Point(arm=arm, rate=rate, passes=passes, seeds=ordered))
    return dict(arms)


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats on validation loss and on general loss, best first."""
    kept = []
    least = math.inf
    for point in sorted(points, key=lambda p: (p.mean("validationLoss"), p.mean("generalLoss"))):
        if point.mean("generalLoss") < least:
            least = point.mean("generalLoss")
            kept.append(point)
    return kept


def best(points: Sequence[Point]) -> Point:
    """Return the point with the lowest validation loss."""
    return min(points, key=lambda point: point.mean("validationLoss"))


def equal_or_better(
    points: Sequence[Point], reference: Point, *, in_time: bool = True
) -> Point | None:
    """Return the point that forgets least among those that learn no less than `reference`.

    With `in_time` it also takes no more seconds. None where no point does.
    """
    candidates = [
        point
        for point in points
        if point.mean("validationLoss") <= reference.mean("validationLoss")
        and (not in_time or point.mean("seconds") <= reference.mean("seconds"))
    ]
    return min(candidates, key=lambda point: point.mean("generalLoss"), default=None)


def compare(point: Point, reference: Point, base_general: float) -> dict[str, Any]:
    """Return `point` beside `reference`: forgetting, seconds and exact match, paired by seed.

    The interval is a bootstrap over the passages of general text, each the mean difference over the
    seeds that both have; the p-value is McNemar's exact one over all answers of these seeds.
    """
    pairs = [
        (mine, other)
        for mine in point.seeds
        for other in reference.seeds
        if mine["seed"] == other["seed"]
    ]
    forgotten = point.mean("generalLoss") - base_general
    theirs = reference.mean("generalLoss") - base_general
    low, high = _general_interval(pairs)
    won = sum(a > b for x, y in pairs for a, b in zip(x["matches"], y["matches"], strict=True))
    lost = sum(a < b for x, y in pairs for a, b in zip(x["matches"], y["matches"], strict=True))
    return {
        "rate": point.rate,
        "passes": point.passes,
        "seeds": len(pairs),
        "validationLoss": round(point.mean("validationLoss"), 4),
        "referenceValidationLoss": round(reference.mean("validationLoss"), 4),
        "forgetting": round(forgotten, 4),
        "referenceForgetting": round(theirs, 4),
        "forgettingRatio": round(forgotten / theirs, 3) if theirs > 0 else None,
        "forgettingDifferenceInterval95": [round(low, 4), round(high, 4)],
        "secondsRatio": round(point.mean("seconds") / reference.mean("seconds"), 3),
        "exactMatchWonLost": [won, lost],
        "exactMatchP": round(mcnemar(won, lost), 4),
    }


def against(points: Sequence[Point], reference: Sequence[Point], base: float) -> dict[str, Any]:
    """Return how an arm stands against the reference: at that one's best point, and at its own.

    `alongFront` holds each point of the arm's front beside the reference's front at equal loss.
    """
    target = best(reference)
    found: dict[str, Any] = {}
    for name, in_time in (("inTime", True), ("anyTime", False)):
        point = equal_or_better(points, target, in_time=in_time)
        found[name] = compare(point, target, base) if point else None
    found["alongFront"] = [
        beside
        for point in front(points)
        if (beside := beside_front(point, reference, base)) is not None
    ]
    return found


def beside_front(
    point: Point, reference: Sequence[Point], base_general: float
) -> dict[str, Any] | None:
    """Return `point` beside the reference's front at the same validation loss, paired by seed.

    Between two points of the front what is forgotten and the seconds lie on a straight line over
    the logarithm of the loss. None where no seed's loss is within its front.
    """
    pairs = []
    for mine in point.seeds:
        of_seed = [
            Point(arm=other.arm, rate=other.rate, passes=other.passes, seeds=(result,))
            for other in reference
            for result in other.seeds
            if result["seed"] == mine["seed"]
        ]
        at_loss = interpolate(front(of_seed), mine["validationLoss"])
        if at_loss is not None:
            pairs.append((mine, *at_loss))
    if not pairs:
        return None
    forgotten = statistics.fmean(mine["generalLoss"] for mine, _, _ in pairs) - base_general
    theirs = statistics.fmean(general for _, general, _ in pairs) - base_general
    seconds = statistics.fmean(seconds for _, _, seconds in pairs)
    return {
        "rate": point.rate,
        "passes": point.passes,
        "seeds": len(pairs),
        "validationLoss": round(statistics.fmean(m["validationLoss"] for m, _, _ in pairs), 4),
        "forgetting": round(forgotten, 4),
        "referenceForgetting": round(theirs, 4),
        "forgettingRatio": round(forgotten / theirs, 3) if theirs > 0 else None,
        "secondsRatio": round(statistics.fmean(m["seconds"] for m, _, _ in pairs) / seconds, 3),
    }


def interpolate(points: Sequence[Point], validation_loss: float) -> tuple[float, float] | None:
    """Return the general loss and the seconds of a front at `validation_loss`.

    None where that lies outside of the front.
    """
    for lower, upper in itertools.pairwise(points):
        low, high = lower.mean("validationLoss"), upper.mean("validationLoss")
        if low <= validation_loss <= high:
            share = math.log(validation_loss / low) / math.log(high / low)
            general, seconds = (
                lower.mean(score) + share * (upper.mean(score) - lower.mean(score))
                for score in ("generalLoss", "seconds")
            )
            return general, seconds
    return None


def mcnemar(won: int, lost: int) -> float:
    """Return the two-sided exact p-value of `won` against `lost` discordant pairs."""
    total = won + lost
    if total == 0:
        return 1.0
    tail = sum(math.comb(total, k) for k in range(min(won, lost) + 1)) / 2**total
    return min(1.0, 2 * tail)


def _general_interval(pairs: Sequence[tuple[Result, Result]]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the difference of the loss on general text."""
    rows = [_row_differences(mine, other) for mine, other in pairs]
    if not rows:
        return math.nan, math.nan
    passages = [
        (statistics.fmean(seed[index][0] for seed in rows), rows[0][index][1])
        for index in range(len(rows[0]))
    ]
    draw = random.Random(0)
    means = []
    for _ in range(_BOOTSTRAPS):
        sample = draw.choices(passages, k=len(passages))
        means.append(sum(d for d, _ in sample) / sum(count for _, count in sample))
    means.sort()
    return means[int(0.025 * _BOOTSTRAPS)], means[int(0.975 * _BOOTSTRAPS) - 1]


def _row_differences(mine: Result, other: Result) -> list[tuple[float, int]]:
    both = zip(mine["generalRows"], other["generalRows"], strict=True)
    return [(a - b, count) for (a, count), (b, _) in both]


def settled(points: Sequence[Point]) -> list[Point]:
    """Return the points with the most seeds: what was only swept past is compared with nothing."""
    most = max(len(point.seeds) for point in points)
    return [point for point in points if len(point.seeds) == most]


def summarise(
    results: Sequence[Result], base: Result, titles: Mapping[str, str], reference: str
) -> dict[str, Any]:
    """Return what benchmarks/results/quality.json holds beside the settings."""
    arms = {name: points for name, points in points_of(results).items() if name in titles}
    ordered = [name for name in titles if name in arms]
    base_general = base["generalLoss"]
    summary: dict[str, Any] = {
        "arms": [_arm(name, titles[name], arms[name]) for name in ordered],
        "fronts": {
            name: [_front_point(point, base_general) for point in front(settled(arms[name]))]
            for name in ordered
        },
    }
    if reference in arms:
        summary["againstLora"] = {
            name: against(settled(arms[name]), settled(arms[reference]), base_general)
            for name in ordered
            if name != reference
        }
    return summary


def _arm(name: str, title: str, points: Sequence[Point]) -> dict[str, Any]:
    chosen = best(settled(points))
    return {
        "name": name,
        "title": title,
        "rate": chosen.rate,
        "passes": chosen.passes,
        **{score: round(chosen.mean(score), 4) for score in SCORES},
        "seeds": [_seed(result) for result in chosen.seeds],
        "points": [
            {
                "rate": point.rate,
                "passes": point.passes,
                "seeds": [_seed(result) for result in point.seeds],
            }
            for point in points
        ],
    }


def _seed(result: Result) -> dict[str, Any]:
    named = {"seed": result["seed"], **{score: result[score] for score in SCORES}}
    if "alpha" in result:
        named["alpha"] = result["alpha"]
    return named


def _front_point(point: Point, base_general: float) -> dict[str, Any]:
    return {
        "rate": point.rate,
        "passes": point.passes,
        "validationLoss": round(point.mean("validationLoss"), 4),
        "forgetting": round(point.mean("generalLoss") - base_general, 4),
        "exactMatch": round(point.mean("exactMatch"), 4),
        "seconds": round(point.mean("seconds"), 1),
        "numSeeds": len(point.seeds),
    }
