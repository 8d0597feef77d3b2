"""The tables of docs/quality.md, between their marks; the words around them are written by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- table: {} -->", "<!-- end of table -->"


def write_tables(page: Path, summary: dict[str, Any]) -> None:
    """Replace every table of `page` by the one that `summary` gives."""
    text = page.read_text(encoding="utf-8")
    tables = {"arms": _arms(summary), "fronts": _fronts(summary), "against": _against(summary)}
    for name, rows in tables.items():
        begin = BEGIN.format(name)
        before, found, rest = text.partition(begin)
        if not found:
            raise SystemExit(f"{page} has no mark {begin}")
        _, found, after = rest.partition(END)
        if not found:
            raise SystemExit(f"{page}: the table {name} has no end")
        body = "\n".join(rows)
        text = f"{before}{begin}\n{body}\n{END}{after}"
    page.write_text(text, encoding="utf-8")


def _arms(summary: dict[str, Any]) -> Iterator[str]:
    base = summary["base"]
    yield "| arm | rate, passes | validation loss | exact match | forgetting | KL | s | GiB |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    yield f"| base | – | {base['validationLoss']:.3f} | {base['exactMatch']:.3f} | 0 | 0 | – | – |"
    for arm in summary["arms"]:
        forgotten = arm["generalLoss"] - base["generalLoss"]
        yield (
            f"| {arm['title']} | {arm['rate']:g}, {arm['passes']:g} | "
            f"{arm['validationLoss']:.3f}{_spread(arm, 'validationLoss')} | "
            f"{arm['exactMatch']:.3f} | {forgotten:+.4f}{_spread(arm, 'generalLoss', 4)} | "
            f"{arm['klToBase']:.2f} | {arm['seconds']:.0f} | "
            f"{arm['peakMemoryBytes'] / 2**30:.2f} |"
        )


def _spread(arm: dict[str, Any], score: str, digits: int = 3) -> str:
    values = [seed[score] for seed in arm["seeds"]]
    if len(values) < 2:
        return ""
    return f" ± {(max(values) - min(values)) / 2:.{digits}f}"


def _fronts(summary: dict[str, Any]) -> Iterator[str]:
    yield "| arm | rate, passes | validation loss | forgetting | exact match | s | seeds |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    titles = {arm["name"]: arm["title"] for arm in summary["arms"]}
    for name, points in summary["fronts"].items():
        for point in points:
            yield (
                f"| {titles[name]} | {point['rate']:g}, {point['passes']:g} | "
                f"{point['validationLoss']:.3f} | {point['forgetting']:+.4f} | "
                f"{point['exactMatch']:.3f} | {point['seconds']:.0f} | {point['numSeeds']} |"
            )


def _against(summary: dict[str, Any]) -> Iterator[str]:
    yield (
        "| arm | rate, passes | validation loss | forgetting | LoRA's there | ratio | "
        "seconds, ratio | seeds |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    titles = {arm["name"]: arm["title"] for arm in summary["arms"]}
    for name, found in summary.get("againstLora", {}).items():
        for row in found["alongFront"]:
            ratio = "–" if row["forgettingRatio"] is None else f"{row['forgettingRatio']:.2f}"
            yield (
                f"| {titles[name]} | {row['rate']:g}, {row['passes']:g} | "
                f"{row['validationLoss']:.3f} | {row['forgetting']:+.4f} | "
                f"{row['referenceForgetting']:+.4f} | {ratio} | {row['secondsRatio']:.2f} | "
                f"{row['seeds']} |"
            )
