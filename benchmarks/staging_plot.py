"""A bar for each arm of benchmarks/staging.py, as an SVG that is read on light and dark pages."""

from collections.abc import Iterator
from html import escape
from typing import Any

from staging_arms import NUM_STAGES

_WIDTH, _LEFT, _BAR, _GAP, _TOP = 760, 250, 16, 8, 34
_COLOURS = ("#3b7dd8", "#e08a2c", "#4a9d5b")
_STYLE = (
    "text{font:12px sans-serif;fill:#333}"
    ".line{stroke:#888;stroke-width:1}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
)


def draw(summary: dict[str, Any]) -> str:
    """Return the plot: one pass of every arm in passes of full fine-tuning, stage by stage."""
    bars = [arm for arm in summary["arms"] if arm["passRatio"] is not None]
    height = _TOP + len(bars) * (_BAR + _GAP) + 10
    most = max([arm["passRatio"]["median"] for arm in bars] + [NUM_STAGES * 0.5])
    unit = (_WIDTH - _LEFT - 60) / most
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" '
        'aria-label="Seconds of one pass of each arm, relative to full fine-tuning">',
        f"<style>{_STYLE}</style>",
        f'<text x="{_LEFT}" y="16">seconds of one pass over all stages; full fine-tuning is 1'
        "</text>",
    ]
    for place, arm in enumerate(bars):
        lines += _bar(arm, _TOP + place * (_BAR + _GAP), unit)
    one = _LEFT + unit
    lines += [f'<line class="line" x1="{one:.1f}" y1="24" x2="{one:.1f}" y2="{height - 6}"/>']
    return "\n".join([*lines, "</svg>", ""])


def _bar(arm: dict[str, Any], y: int, unit: float) -> Iterator[str]:
    middle = y + _BAR - 4
    yield f'<text x="{_LEFT - 8}" y="{middle}" text-anchor="end">{escape(arm["title"])}</text>'
    total = arm["passSeconds"]["median"]
    length = arm["passRatio"]["median"] * unit
    x = float(_LEFT)
    parts = [process["stepSeconds"]["median"] for process in arm["processes"]]
    fills = [process["fillSeconds"]["median"] for process in arm["processes"]]
    filled = sum(fills) / total if total else 0.0
    weights = [part / sum(parts) * (1 - filled) for part in parts]
    for number, weight in enumerate(weights):
        width = length * weight
        colour = _COLOURS[number % len(_COLOURS)]
        yield f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}"/>'
        x += width
    if filled > 0:
        width = length * filled
        yield f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="#999"/>'
        x += width
    yield f'<text x="{x + 6:.1f}" y="{middle}">{arm["passRatio"]["median"]:.2f}</text>'
