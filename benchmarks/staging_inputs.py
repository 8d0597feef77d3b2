"""Rows and model of benchmarks/staging.py: the quick start's, or others that the caller names."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from staging_arms import SYSTEM

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart"
VALIDATION_ROWS = 8
"""As few as there may be: nobody else validates, and only training is compared."""


def write_inputs(work: Path, num_rows: int, model: Path | None, data: Path | None) -> str:
    """Put `num_rows` rows into `work`, and return the source of the model.

    `data` holds messages as JSON lines, `model` is a folder or a GGUF file.
    """
    if data is None:
        rows = quickstart_rows(num_rows, VALIDATION_ROWS)
        for row in rows:
            row["messages"].insert(0, {"role": "system", "content": SYSTEM})
    else:
        lines = data.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[: num_rows + VALIDATION_ROWS]]
    for name, part in (
        ("train", rows[:-VALIDATION_ROWS]),
        ("validation", rows[-VALIDATION_ROWS:]),
    ):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (work / f"{name}.jsonl").write_text(text, encoding="utf-8")
    if model is not None:
        return f"file://{model.resolve()}"
    return place_model(work)


def quickstart_rows(num_rows: int, num_validation: int) -> list[dict[str, Any]]:
    """Return rows of the quick start's training set, and behind them rows of the other one."""
    inputs = _quickstart()
    training, validation = inputs.build_rows(inputs.FACT_TYPES, inputs.SEED)
    chosen = training[:num_rows] + validation[:num_validation]
    return [json.loads(line) for line in inputs.format_rows(chosen).splitlines()]


def place_model(work: Path) -> str:
    """Put the quick start's model into `work` and return its source."""
    inputs = _quickstart()
    inputs.place_model(inputs.find_model(), work / "model.gguf")
    return "file://model.gguf"


def _quickstart() -> Any:
    spec = importlib.util.spec_from_file_location("build_inputs", QUICKSTART / "build_inputs.py")
    if spec is None or spec.loader is None:
        raise SystemExit("the quick start's build_inputs.py is missing")
    inputs = importlib.util.module_from_spec(spec)
    sys.modules["build_inputs"] = inputs
    spec.loader.exec_module(inputs)
    return inputs
