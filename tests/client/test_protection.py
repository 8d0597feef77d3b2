"""Protection in whole runs: on a tiny model with everything on, and on the real one."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from stagetune.listeners import Listeners
from stagetune.local_run import run_locally
from stagetune.manifest_file import read_manifest_file
from stagetune_api.names import RunLayout

WriteManifest = Callable[..., Path]
EVERYTHING: dict[str, Any] = {
    "distillation": {"weight": 0.5},
    "anchor": {"weight": 0.1},
    "replay": {"ratio": 0.25, "generated": {"tokens": 400}},
}


def run(path: Path, directory: Path) -> dict[str, Any]:
    """Run the manifest at `path` and return its report."""
    report = run_locally(read_manifest_file(path), directory, Listeners())
    return json.loads(report.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_protected_run_goes_to_its_end_and_tells_what_was_forgotten(
    method: str, write_manifest: WriteManifest, tmp_path: Path
) -> None:
    path = write_manifest(
        method={"type": method},
        protection=EVERYTHING,
        training={"earlyStopping": {"patience": 3}, "microBatchSize": 2},
    )
    report = run(path, tmp_path / "run")
    after = report["after"]
    for stage in report["stages"]:
        assert 0 < stage["klToBase"] < 1
        assert stage["generalLoss"] > 0
    last = report["stages"][-1]
    assert last["generalLoss"] == pytest.approx(after["generalLoss"], rel=1e-3)
    assert last["klToBase"] == pytest.approx(after["klToBase"], rel=0.3)
    assert after["validationLoss"] < report["before"]["validationLoss"]
    layout = RunLayout(tmp_path / "run")
    status = json.loads(layout.status.read_text())
    assert status["stages"][-1]["measured"]["klToBase"] == last["klToBase"]
    # One machine keeps everything, but for what a stage alone needed.
    assert {p.name for p in layout.cache.iterdir()} == {"teacher-train", "teacher-validation"}
    assert not list(layout.stages.glob("*/anchor"))
    # The same command again finds all of it done.
    assert run(path, tmp_path / "run") == report


@pytest.mark.real_model
def test_protection_keeps_the_real_model_nearer_to_itself(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """One short stage over six layers, with and without; generated text needs no data."""
    import subprocess
    import sys

    root = pytestconfig.rootpath
    build = [sys.executable, "examples/quickstart/build_inputs.py", "--output", str(tmp_path)]
    subprocess.run(build, cwd=root, check=True, capture_output=True, timeout=600)
    for name, count in (("train", 64), ("validation", 24)):
        with (tmp_path / f"{name}.jsonl").open() as file:
            lines = list(islice(file, count))
        (tmp_path / f"{name}-few.jsonl").write_text("".join(lines))
    (model,) = (tmp_path / "model").glob("*.gguf")
    spec: dict[str, Any] = {
        "model": {"source": f"file://{model}"},
        "dataset": {
            "source": "file://train-few.jsonl",
            "validation": {"source": "file://validation-few.jsonl"},
            "maxLength": 128,
        },
        "stages": [{"name": "top", "layers": {"first": 24, "last": 29}}],
        "training": {
            "learningRate": 3e-4,
            "batchSize": 8,
            "microBatchSize": 8,
            "gradientCheckpointing": "Never",
        },
        "evaluation": {
            "generalText": {
                "source": f"file://{root}/examples/quickstart/general_text.jsonl",
                "maxTokens": 1500,
            },
            "samples": 0,
        },
    }
    protection = {
        "distillation": {"weight": 0.5},
        "anchor": {"weight": 0.5},
        "replay": {"ratio": 0.25, "generated": {"tokens": 1000}},
    }
    reports = {}
    for name, changes in (("free", {}), ("held", {"protection": protection})):
        document = {
            "apiVersion": "stagetune.io/v1alpha1",
            "kind": "StagedFineTune",
            "metadata": {"name": name},
            "spec": {**spec, **changes},
        }
        path = tmp_path / f"{name}.yaml"
        with path.open("w") as file:
            YAML(typ="safe", pure=True).dump(document, file)
        reports[name] = run(path, tmp_path / "runs" / name)
    free, held = reports["free"], reports["held"]
    assert held["after"]["klToBase"] < 0.8 * free["after"]["klToBase"]
    assert held["after"]["validationLoss"] < held["before"]["validationLoss"] - 0.3
    for report in reports.values():
        meter, exact = report["stages"][0]["klToBase"], report["after"]["klToBase"]
        assert meter == pytest.approx(exact, rel=0.1)
