"""Whole runs with 8-bit moments, updates in the backward pass and a share that is chosen."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from stagetune.run_report import RunReport
from stagetune_api import names
from stagetune_api.names import RunLayout
from stagetune_api.stage import StageConfig
from stagetune_api.status import StagedFineTuneStatus

TIMEOUT_SECONDS = 900


def command(*arguments: object) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def run(manifest: Path, run_directory: Path) -> tuple[RunReport, str]:
    output = command("-m", "stagetune", "run", manifest, "--run-dir", run_directory)
    path = RunLayout(run_directory).run_report
    return RunReport.model_validate_json(path.read_bytes()), output


def test_run_exports_the_share_that_it_has_chosen(
    write_manifest: Callable[..., Path], tmp_path: Path
) -> None:
    manifest = write_manifest(
        training={"optimizer": "AdamW8bit", "optimizerInBackward": True, "precision": "BF16"},
        protection={"averaging": {"tolerance": 0.05}, "depthScaling": {"bottom": 0.5}},
    )
    report, output = run(manifest, tmp_path / "run")
    averaging = report.averaging
    assert averaging is not None
    assert 0 < averaging.chosen <= 1
    assert f"The exported weights are {averaging.chosen:g} tuned" in output
    index = averaging.alphas.index(averaging.chosen)
    assert averaging.validation_losses[index] == pytest.approx(report.after.validation_loss)
    layout = RunLayout(tmp_path / "run")
    given = StageConfig.model_validate_json(layout.task("export").config.read_bytes())
    assert given.averaging_alpha == averaging.chosen
    status = StagedFineTuneStatus.model_validate_json(layout.status.read_bytes())
    assert status.evaluation is not None
    assert status.evaluation.averaging == averaging
    # Nothing is done again, and an export that is lost is the same one again.
    exported = load_file(layout.export / names.WEIGHTS_FILE)
    (layout.export / names.WEIGHTS_FILE).unlink()
    again, _ = run(manifest, tmp_path / "run")
    assert again.averaging == averaging
    found = load_file(layout.export / names.WEIGHTS_FILE)
    assert [name for name in exported if not torch.equal(exported[name], found[name])] == []


@pytest.mark.real_model
def test_real_model_is_tuned_with_little_memory_and_averaged(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    inputs = tmp_path / "inputs"
    command(pytestconfig.rootpath / "examples/quickstart/build_inputs.py", "--output", inputs)
    for name, count in (("train", 48), ("validation", 8)):
        rows = (inputs / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (inputs / f"few-{name}.jsonl").write_text("".join(rows[:count]))
    spec: dict[str, Any] = {
        "model": {"source": "file://inputs/model/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "dataset": {
            "source": "file://inputs/few-train.jsonl",
            "validation": {"source": "file://inputs/few-validation.jsonl"},
            "maxLength": 128,
        },
        "stages": [{"name": "top", "layers": {"first": 28, "last": 29}, "epochs": 2}],
        "training": {
            "learningRate": 2e-4,
            "batchSize": 8,
            "microBatchSize": 8,
            "optimizer": "AdamW8bit",
            "optimizerInBackward": True,
            "precision": "BF16",
        },
        "protection": {"averaging": {}},
        "evaluation": {"samples": 1},
    }
    document = {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": "little-memory"},
        "spec": spec,
    }
    manifest = tmp_path / "run.yaml"
    with manifest.open("w") as file:
        YAML(typ="safe", pure=True).dump(document, file)
    report, _ = run(manifest, tmp_path / "run")
    (stage,) = report.stages
    assert stage.validation_loss < stage.initial_validation_loss - 0.3
    averaging = report.averaging
    assert averaging is not None
    assert 0 < averaging.chosen <= 1
    assert report.after.validation_loss < report.before.validation_loss - 0.3
    best = min(averaging.validation_losses)
    assert report.after.validation_loss <= best + 0.02 + 1e-6
