"""Whole runs by schedules that are more than groups one after another."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stagetune.__main__ import main
from stagetune_api import names
from stagetune_api.names import ExitCode, RunLayout
from stagetune_operator.plan import Plan

WriteManifest = Callable[..., Path]
BY_GRADIENT = {
    "stageCount": None,
    "layersPerStage": 1,
    "order": "GradientNorm",
    "gradientNorm": {"batches": 2},
}
TIMEOUT_SECONDS = 1200


def run(manifest: Path, run_directory: Path) -> str:
    """Run the manifest to its end, in processes of their own, and return what was said."""
    result = subprocess.run(
        [sys.executable, "-m", "stagetune", "run", str(manifest), "--run-dir", str(run_directory)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == ExitCode.DONE, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def plan_of(run_directory: Path) -> Plan:
    return Plan.model_validate_json(RunLayout(run_directory).plan.read_bytes())


def report_of(run_directory: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run_directory / names.REPORT_FILE).read_text())
    return report


def test_run_by_gradient_norm_measures_decides_and_trains_in_that_order(
    write_manifest: WriteManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, directory = write_manifest(schedule=BY_GRADIENT), tmp_path / "run"

    said = run(manifest, directory)

    plan = plan_of(directory)
    assert plan.gradients is not None
    assert plan.gradients.profile.rows == 8
    shares = {group.layers.first: group.share for group in plan.gradients.groups}
    assert len(shares) == 4
    assert len(set(shares.values())) > 1
    trained = [stage.layers.first for stage in plan.stages]
    assert [shares[first] for first in trained] == sorted(
        (shares[first] for first in trained), reverse=True
    )
    assert "gradient norms, measured on 8 rows: layers 0-0" in said
    report = report_of(directory)
    assert [stage["name"] for stage in report["stages"]] == [stage.name for stage in plan.stages]
    assert report["after"]["validationLoss"] < report["before"]["validationLoss"]

    capsys.readouterr()
    assert main(["plan", str(manifest), "--run-dir", str(directory)]) == ExitCode.DONE
    shown = capsys.readouterr().out
    assert "Gradient norms, measured on 8 rows" in shown
    assert "Assumed" not in shown


def test_plan_before_prepare_assumes_a_flat_profile_and_says_so(
    write_manifest: WriteManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(schedule=BY_GRADIENT)
    arguments = ["plan", str(manifest), "--run-dir", str(tmp_path / "none")]

    assert main(arguments) == ExitCode.DONE

    shown = " ".join(capsys.readouterr().out.split())
    assert "Assumed: gradient norms that are the same in all layers" in shown
    assert main([*arguments, "-o", "json"]) == ExitCode.DONE
    plan = json.loads(capsys.readouterr().out)
    assert [stage["layers"]["first"] for stage in plan["stages"]] == [0, 1, 2, 3]
    assert plan["gradients"]["profile"]["rows"] == 0


@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_run_with_an_open_top_in_two_passes_exports_what_the_last_stages_left(
    method: str, write_manifest: WriteManifest, tmp_path: Path
) -> None:
    schedule = {"stageCount": 2, "openTop": 1, "passes": 2, "epochsPerStage": 1}
    directory = tmp_path / "run"

    run(write_manifest(schedule=schedule, method={"type": method}), directory)

    plan, report = plan_of(directory), report_of(directory)
    assert [stage.directory for stage in plan.stages] == [
        "01-layers-0-1",
        "02-layers-2-3",
        "03-layers-0-1-p2",
        "04-layers-2-3-p2",
    ]
    assert plan.stages[0].top_layers is not None
    losses = [stage["validationLoss"] for stage in report["stages"]]
    before = [stage["initialValidationLoss"] for stage in report["stages"]]
    assert before[1:] == pytest.approx(losses[:-1], rel=1e-4)
    assert report["after"]["validationLoss"] == pytest.approx(losses[-1], rel=1e-4)
    assert losses[-1] < before[0]
    card = (Path(report["export"]) / "README.md").read_text()
    assert "| 0–1, 3–3 |" in card
    if method == "Full":
        exported = load_file(Path(report["export"]) / names.WEIGHTS_FILE)
        last = load_file(RunLayout(directory).stage("04-layers-2-3-p2").output / names.WEIGHTS_FILE)
        assert all(torch.equal(exported[name], tensor) for name, tensor in last.items())


def write_small_inputs(root: Path, directory: Path) -> None:
    """Write the quick start's inputs with few rows: every step costs seconds on the real model."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    script = [sys.executable, "examples/quickstart/build_inputs.py", "--output", str(directory)]
    subprocess.run(script, cwd=root, env=environment, check=True, capture_output=True)
    for name, count in (("train", 24), ("validation", 12)):
        path = directory / f"{name}.jsonl"
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        random.Random(0).shuffle(rows)
        path.write_text("".join(rows[:count]), encoding="utf-8")


@pytest.mark.real_model
def test_open_top_lowers_the_validation_loss_of_the_real_model(
    write_manifest: WriteManifest, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    inputs, directory = tmp_path / "inputs", tmp_path / "run"
    write_small_inputs(pytestconfig.rootpath, inputs)
    manifest = write_manifest(
        model={"source": f"file://{inputs / 'model' / 'SmolLM2-135M-Instruct.Q4_1.gguf'}"},
        dataset={
            "source": f"file://{inputs / 'train.jsonl'}",
            "validation": {"fraction": None, "source": f"file://{inputs / 'validation.jsonl'}"},
            "maxLength": 128,
        },
        schedule=None,
        stages=[
            {"name": "middle", "layers": {"first": 18, "last": 20}, "openTop": 2},
            {"name": "upper", "layers": {"first": 23, "last": 25}, "openTop": 2},
        ],
        training={
            "learningRate": 2e-4,
            "batchSize": 8,
            "microBatchSize": 8,
            "gradientCheckpointing": "Never",
            "validationsPerEpoch": 1,
        },
        evaluation={"exactMatch": None, "generalText": None, "samples": 0},
    )

    run(manifest, directory)

    report = report_of(directory)
    losses = [stage["validationLoss"] for stage in report["stages"]]
    assert [stage["steps"] for stage in report["stages"]] == [3, 3]
    assert losses[1] < losses[0] < report["before"]["validationLoss"]
    assert report["after"]["validationLoss"] == pytest.approx(losses[1], rel=1e-3)
