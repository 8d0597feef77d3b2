"""From the measurements of benchmarks/staging.py to ratios, with their spread, and a verdict."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any

from stagetune_api.training_spec import DEFAULT_EPOCHS
from staging_arms import ARMS, NUM_STAGES, REFERENCE, Arm, num_small_stages, top_size

WARM_STEPS = 2
"""The first steps of every process are not measured: memory is taken and kernels are chosen."""
CLOCK = "processor"
"""What `seconds` are unless it is said: those of the processor, in all threads together. Other work
on the machine changes them least. Those that passed are given beside them."""
LORA_PASSES = 3
"""Passes of a LoRA run that learns as much as a default one: its front in docs/quality.md."""

Cell = dict[str, Any]
Processes = list[dict[str, Any]]
"""What the processes of an arm took, one after the other."""
Round = dict[str, Processes]
"""What a round measured, by arm."""


def summarise(cells: Sequence[Cell], settings: dict[str, Any]) -> dict[str, Any]:
    """Return everything that benchmarks/results/staging.json holds."""
    rounds = _rounds(cells)
    inside = {cell["arm"]: cell["inside"] for cell in cells if cell.get("inside")}
    padded = settings["paddedTokens"]
    scale = sum(padded) / sum(padded[WARM_STEPS:])
    step = sum(padded) / padded[0]
    measure = Measure(
        rounds, inside, num_layers=settings["numLayers"], scale=scale, flop_scale=step
    )
    return {
        **{name: value for name, value in settings.items() if name != "paddedTokens"},
        "batchSize": round(settings["rows"] / len(padded)),
        "steps": len(padded),
        "warmSteps": WARM_STEPS,
        "rounds": len(rounds),
        "seconds": f"{CLOCK} seconds; `wall` has those that passed",
        "ratios": measure.ratios(),
        "arms": [measure.arm(arm) for arm in ARMS if any(arm.name in found for found in rounds)],
        "startUp": measure.start_up(),
        "profile": measure.profiles(),
        "errors": {cell["arm"]: cell["error"] for cell in cells if "error" in cell},
        "othersShare": spread(
            process["othersShare"] for cell in cells for process in cell.get("processes", [])
        ),
    }


def spread(values: Iterable[float], digits: int = 4) -> dict[str, Any]:
    """Return the median of all rounds, the least and the most."""
    found = [round(value, digits) for value in values]
    return {
        "median": round(median(found), digits),
        "min": min(found),
        "max": max(found),
        "rounds": found,
    }


class Measure:
    """Ratios between arms, each within its round."""

    def __init__(
        self,
        rounds: Sequence[Round],
        inside: dict[str, list[dict[str, Any]]],
        *,
        num_layers: int,
        scale: float,
        flop_scale: float,
    ) -> None:
        """`scale` takes measured steps to those of a pass, `flop_scale` the first step."""
        self._num_layers = num_layers
        self._rounds = rounds
        self._inside = inside
        self._scale = scale
        self._flop_scale = flop_scale

    def ratios(self) -> dict[str, Any]:
        """Return what the targets speak of, each relative to full fine-tuning."""
        stages, small = 1 / NUM_STAGES, 1 / num_small_stages(self._num_layers)
        found = {
            "topStageSeconds": self._seconds("top-cached", _steps_of(-1)),
            "topStageFlops": self._step_flops("top-cached", -1),
            "allStagesSecondsPerPass": self._seconds("stages-cached", self._pass, factor=stages),
            "allStagesFlopsPerPass": self._pass_flops("stages-cached", factor=stages),
            "smallStagesSecondsPerPass": self._seconds("small-cached", self._pass, factor=small),
            "smallStagesFlopsPerPass": self._pass_flops("small-cached", factor=small),
            "uncachedStagesSecondsPerPass": self._seconds(
                "stages-uncached", self._pass, factor=stages
            ),
            "msSwiftStagesSecondsPerPass": self._seconds("swift-stages", self._pass, factor=stages),
            "loraSecondsPerPass": self._seconds("lora16", self._pass),
            "loraEverywhereSecondsPerPass": self._seconds("lora16-all", self._pass),
            "fullEverywhereSecondsPerPass": self._seconds("full-all", self._pass),
            "msSwiftLoraSecondsPerPass": self._seconds("swift-lora16", self._pass),
            "topStagePeakMemory": self._paired("top-cached", _last_peak),
            "loraPeakMemory": self._paired("lora16", _last_peak),
            **{
                name: self._seconds("default", self._default_run, reference=self._lora_run, of=lora)
                for name, lora in (
                    ("defaultRunOverLora", "lora16"),
                    ("defaultRunOverLoraEverywhere", "lora16-all"),
                    ("defaultRunOverMsSwiftLora", "swift-lora16"),
                )
            },
        }
        return {name: ratio for name, ratio in found.items() if ratio is not None}

    def arm(self, arm: Arm) -> dict[str, Any]:
        """Return everything about an arm, in all and process by process."""
        cells = [found[arm.name] for found in self._rounds if arm.name in found]
        counted = self._inside.get(arm.name)
        found = {
            "name": arm.name,
            "title": arm.title,
            "passSeconds": spread((self._pass(cell, CLOCK) for cell in cells), 2),
            "passWallSeconds": spread((self._pass(cell, "wall") for cell in cells), 2),
            "passRatio": self._seconds(arm.name, self._pass),
            "passFlopsRatio": self._pass_flops(arm.name),
            "peakMemoryRatio": self._paired(arm.name, _most_peak),
            "processes": [],
        }
        for place, process in enumerate(cells[0]):
            own = [cell[place] for cell in cells]
            found["processes"].append(
                {
                    "name": process["name"],
                    "tokensPerRow": process.get("tokensPerRow"),
                    "stepSeconds": spread(one["steps"][CLOCK] / one["numSteps"] for one in own),
                    "stepWallSeconds": spread(
                        one["steps"]["wall"] / one["numSteps"] for one in own
                    ),
                    "stepRatio": self._seconds(arm.name, _steps_of(place)),
                    "fillSeconds": spread((one["fill"][CLOCK] for one in own), 2),
                    "fillWallSeconds": spread((one["fill"]["wall"] for one in own), 2),
                    "startSeconds": spread((one["startSeconds"] for one in own), 2),
                    "peakMemoryBytes": spread((one["peakMemoryBytes"] for one in own), 0),
                    "stepFlops": counted[place]["stepFlops"] if counted else None,
                    "stepFlopsRatio": self._step_flops(arm.name, place),
                    "fillFlops": counted[place].get("fillFlops", 0) if counted else None,
                }
            )
        return found

    def start_up(self) -> dict[str, Any]:
        """Return seconds that passed from a process's start to its first step, over all stages."""
        programs: defaultdict[str, list[float]] = defaultdict(list)
        by_name = {arm.name: arm for arm in ARMS}
        for found in self._rounds:
            for name, cell in found.items():
                if by_name[name].stages is not None:
                    programs[by_name[name].program] += [one["startSeconds"] for one in cell]
        return {program: spread(values, 2) for program, values in programs.items()}

    def profiles(self) -> dict[str, Any]:
        """Return where the time of a middle, an upper and a top stage goes, and what is possible.

        `ofLimit` is the share of the step in which its operations would be done at the speed of the
        stage's own matrix products, with nothing between them.
        """
        wanted = {"middle": ("stages-cached", 1), "upper": ("stages-cached", 2)}
        wanted[f"top {top_size(self._num_layers)}"] = ("top-cached", 1)
        found = {}
        for title, (arm, place) in wanted.items():
            seen = self._inside.get(arm, [])[place : place + 1]
            cells = [one[arm] for one in self._rounds if arm in one]
            if not seen or not cells or "profile" not in seen[0]:
                continue
            process, seconds = seen[0], sum(seen[0]["profile"].values())
            step = median(cell[place]["steps"]["wall"] / cell[place]["numSteps"] for cell in cells)
            mean_flops = process["stepFlops"] * self._flop_scale / self._num_steps()
            gflops = mean_flops / step / 1e9
            found[title] = {
                "layers": process["name"],
                "profiledStepSeconds": round(seconds, 4),
                "shares": {
                    name: round(value / seconds, 4)
                    for name, value in sorted(process["profile"].items())
                },
                "stepWallSeconds": round(step, 4),
                "gflopsAchieved": round(gflops, 1),
                **process["gemm"],
                "ofLimit": round(gflops / process["gemm"]["gflopsAtTheseShapes"], 3),
            }
        return found

    def _num_steps(self) -> int:
        cell = next(iter(self._rounds[0].values()))
        return int(cell[0]["numSteps"]) + WARM_STEPS

    def _pass(self, cell: Processes, clock: str) -> float:
        """Return the seconds of one pass of every process, with what fills caches."""
        return sum(one["steps"][clock] * self._scale + one["fill"][clock] for one in cell)

    def _default_run(self, cell: Processes, clock: str) -> float:
        """Return the seconds of a whole run by default: a cache is filled once for all passes."""
        return sum(
            one["steps"][clock] * self._scale * DEFAULT_EPOCHS + one["fill"][clock] for one in cell
        )

    def _lora_run(self, cell: Processes, clock: str) -> float:
        """Return the seconds of a LoRA run that learns as much."""
        return LORA_PASSES * self._pass(cell, clock)

    def _seconds(
        self,
        arm: str,
        value: Callable[[Processes, str], float],
        *,
        reference: Callable[[Processes, str], float] | None = None,
        of: str = REFERENCE,
        factor: float = 1,
    ) -> dict[str, Any] | None:
        """Return `value` of `arm` over that of `of`, by both clocks; None where either is missing.

        With a `reference`, that is what is taken of `of`.
        """
        found = {
            clock: self._paired(
                arm,
                partial(value, clock=clock),
                partial(reference or value, clock=clock),
                of=of,
                factor=factor,
            )
            for clock in (CLOCK, "wall")
        }
        ratio = found[CLOCK]
        return None if ratio is None else {**ratio, "wall": found["wall"]}

    def _paired(
        self,
        arm: str,
        value: Callable[[Processes], float],
        reference: Callable[[Processes], float] | None = None,
        *,
        of: str = REFERENCE,
        factor: float = 1,
    ) -> dict[str, Any] | None:
        both = [found for found in self._rounds if arm in found and of in found]
        if not both:
            return None
        return spread(
            factor * value(found[arm]) / (reference or value)(found[of]) for found in both
        )

    def _pass_flops(self, arm: str, *, factor: float = 1) -> dict[str, Any] | None:
        """Return the operations of a pass over full fine-tuning's."""
        counted, full = self._inside.get(arm), self._inside.get(REFERENCE)
        if not counted or not full:
            return None
        flops = sum(
            one["stepFlops"] * self._flop_scale + one.get("fillFlops", 0) for one in counted
        )
        return spread([factor * flops / (full[0]["stepFlops"] * self._flop_scale)])

    def _step_flops(self, arm: str, place: int) -> dict[str, Any] | None:
        """Return the operations of a process's first step over full fine-tuning's."""
        counted, full = self._inside.get(arm), self._inside.get(REFERENCE)
        if not counted or not full:
            return None
        return spread([counted[place]["stepFlops"] / full[0]["stepFlops"]])


def _last_peak(cell: Processes) -> float:
    peak: float = cell[-1]["peakMemoryBytes"]
    return peak


def _most_peak(cell: Processes) -> float:
    return max(one["peakMemoryBytes"] for one in cell)


def _steps_of(place: int) -> Callable[[Processes, str], float]:
    """Return what takes the measured steps of one process; an arm of one process has no other."""

    def steps(cell: Processes, clock: str) -> float:
        seconds: float = cell[min(place, len(cell) - 1)]["steps"][clock]
        return seconds

    return steps


def _rounds(cells: Sequence[Cell]) -> list[Round]:
    found: defaultdict[int, Round] = defaultdict(dict)
    for cell in cells:
        if cell.get("processes"):
            found[cell["round"]][cell["arm"]] = cell["processes"]
    return [found[number] for number in sorted(found)]
