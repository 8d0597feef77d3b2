"""What docs/performance.md shows of benchmarks/staging.py: tables between their marks, and a plot.

The words around them are written by hand.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from staging_plot import draw

BEGIN, END = "<!-- table: {} -->", "<!-- end of table -->"
PLOT = "staging.svg"
_MIB, _GIB = 2**20, 2**30
_PARTS = {
    "groupForwardGemm": "matrix products, forward",
    "groupBackwardGemm": "matrix products, backward",
    "attention": "attention",
    "groupOther": "norms, activations, all else in the group",
    "suffix": "frozen layers above, both ways",
    "headAndLoss": "final norm, head and loss, both ways",
    "optimizer": "clipping and optimizer",
    "data": "reading rows and cached states",
    "prefix": "layers below",
}
TARGETS = (
    ("topStageSeconds", "step of the top stage, seconds", 0.20),
    ("topStageFlops", "step of the top stage, FLOPs", 0.20),
    ("allStagesSecondsPerPass", "a pass of three cached stages, over three full passes", 0.45),
    ("smallStagesSecondsPerPass", "a pass of ten cached stages, over ten full passes", 0.45),
    ("topStagePeakMemory", "peak resident memory of the top stage", 0.50),
    ("defaultRunOverLora", "a default run over a LoRA run of equal validation loss", 1.0),
)


def write_page(page: Path, summary: dict[str, Any]) -> None:
    """Replace the page's tables of staging by those of `summary`, and draw the plot beside it."""
    tables = {
        "staging-targets": _targets(summary),
        "staging-arms": _arms(summary),
        "staging-stages": _stages(summary),
        "staging-profile": _profile(summary),
    }
    text = page.read_text(encoding="utf-8")
    for name, rows in tables.items():
        before, found, rest = text.partition(BEGIN.format(name))
        _, ended, after = rest.partition(END)
        if not found or not ended:
            raise SystemExit(f"{page} has no table {name}")
        text = f"{before}{found}\n" + "\n".join(rows) + f"\n{END}{after}"
    page.write_text(text, encoding="utf-8")
    page.with_name(PLOT).write_text(draw(summary), encoding="utf-8")


def _said(ratio: dict[str, Any] | None, digits: int = 2) -> str:
    if ratio is None:
        return "–"
    if ratio["min"] == ratio["max"]:
        return f"{ratio['median']:.{digits}f}"
    low, high = ratio["min"], ratio["max"]
    return f"{ratio['median']:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _targets(summary: dict[str, Any]) -> Iterator[str]:
    others = summary["othersShare"]
    yield (
        f"Of {summary['rounds']} round(s) of {len(summary['arms'])} arms "
        "([results/staging.json](../benchmarks/results/staging.json)). Other work took "
        f"{others['median']:.0%} of the processors meanwhile, at most {others['max']:.0%}; seconds "
        "that passed can be compared where that is next to nothing."
    )
    yield ""
    yield "| what, of full fine-tuning's unless it says otherwise | measured | wall | target |"
    yield "| --- | --- | --- | --- |"
    for name, title, target in TARGETS:
        ratio = summary["ratios"].get(name)
        wall = ratio.get("wall") if ratio else None
        yield f"| {title} | {_said(ratio, 3)} | {_said(wall, 3)} | ≤ {target:.2f} |"
    for program, target_text in (("stagetune", "≤ 10 s"), ("ms-swift", "–")):
        start = summary["startUp"].get(program)
        name = {"stagetune": "ours", "ms-swift": "ms-swift"}[program]
        yield f"| start-up of a stage in seconds, {name} | – | {_said(start, 1)} | {target_text} |"


def _arms(summary: dict[str, Any]) -> Iterator[str]:
    yield f"![Seconds of one pass of each arm]({PLOT})"
    yield ""
    yield "| arm | one pass over all stages: seconds | wall | FLOPs | peak memory |"
    yield "| --- | --- | --- | --- | --- |"
    for arm in summary["arms"]:
        ratio = arm["passRatio"]
        wall = ratio["wall"] if ratio else None
        flops = arm["passFlopsRatio"]
        yield (
            f"| {arm['title']} | {_said(ratio)} | {_said(wall)} | {_said(flops)} | "
            f"{_said(arm['peakMemoryRatio'])} |"
        )


def _stages(summary: dict[str, Any]) -> Iterator[str]:
    yield "| arm | process | step: seconds | wall | FLOPs | fill, s | start-up, s | peak, GiB |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for arm in summary["arms"]:
        for process in arm["processes"]:
            ratio = process["stepRatio"]
            flops = process["stepFlopsRatio"]
            yield (
                f"| {arm['title']} | {process['name']} | {_said(ratio)} | "
                f"{_said(ratio['wall'] if ratio else None)} | "
                f"{_said(flops, 3)} | "
                f"{process['fillWallSeconds']['median']:.1f} | "
                f"{process['startSeconds']['median']:.1f} | "
                f"{process['peakMemoryBytes']['median'] / _GIB:.2f} |"
            )


def _profile(summary: dict[str, Any]) -> Iterator[str]:
    profiles = summary["profile"]
    yield (
        "| share of a step | "
        + " | ".join(f"{title} ({found['layers']})" for title, found in profiles.items())
        + " |"
    )
    yield "| --- |" + " --- |" * len(profiles)
    for part, title in _PARTS.items():
        shares = [found["shares"].get(part) for found in profiles.values()]
        if any(shares):
            cells = ["–" if share is None else f"{share:.1%}" for share in shares]
            yield f"| {title} | " + " | ".join(cells) + " |"
    for key, title in (
        ("stepWallSeconds", "a step, seconds that pass"),
        ("gflopsAchieved", "GFLOP/s of the whole step"),
        ("gflopsAtTheseShapes", "GFLOP/s of its matrix products alone, at their best"),
        ("gflopsOfALargeSquare", "GFLOP/s of a large square product, at its best"),
        ("ofLimit", "of the speed of its matrix products"),
    ):
        cells = [f"{found[key]:g}" for found in profiles.values()]
        yield f"| {title} | " + " | ".join(cells) + " |"
