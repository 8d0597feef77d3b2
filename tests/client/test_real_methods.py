"""Every method that is not the quick start's, in whole runs: on a tiny model and on a real one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

TIMEOUT_SECONDS = 900
METHODS: dict[str, dict[str, Any]] = {
    "QLoRA": {"type": "QLoRA", "lora": {"rank": 8}},
    "Expand": {"type": "Expand", "expand": {"layersPerBlock": 2}},
    "DoRA": {"type": "LoRA", "lora": {"rank": 8, "dora": True}},
}
RATES = {"QLoRA": 1e-3, "Expand": 1e-3, "DoRA": 1e-3}


def command(*arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


def manifest_method(manifest: Path) -> str:
    document = YAML(typ="safe", pure=True).load(manifest)
    kind: str = document["spec"]["method"]["type"]
    return kind


def report_of(manifest: Path, run_directory: Path) -> dict[str, Any]:
    command("-m", "stagetune", "run", str(manifest), "--run-dir", str(run_directory))
    report: dict[str, Any] = json.loads((run_directory / "report.json").read_text())
    assert {stage["state"] for stage in report["stages"]} == {"Succeeded"}
    last, after = report["stages"][-1]["validationLoss"], report["after"]["validationLoss"]
    if manifest_method(manifest) == "QLoRA":
        # Judged while training on 4-bit weights, and exported on the base's own.
        assert after < last * 1.01
    else:
        assert after == pytest.approx(last, rel=1e-3)
    assert report["after"]["validationLoss"] < report["before"]["validationLoss"]
    assert report["after"]["klToBase"] > 0
    return report


@pytest.mark.parametrize("name", ["QLoRA", "Expand"])
def test_run_of_a_tiny_model_ends_in_a_folder_that_transformers_loads(
    name: str, write_manifest: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    report = report_of(write_manifest(method=METHODS[name]), tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(report["export"])
    assert len(model.model.layers) == (6 if name == "Expand" else 4)
    assert not hasattr(model.config, "quantization_config")


@pytest.fixture(scope="module")
def real_inputs(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """The quick start's model, and a few of its rows."""
    directory = tmp_path_factory.mktemp("inputs")
    script = pytestconfig.rootpath / "examples/quickstart/build_inputs.py"
    command(str(script), "--output", str(directory))
    for name, count in (("train", 64), ("validation", 24)):
        path = directory / f"{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    return directory


@pytest.mark.real_model
@pytest.mark.parametrize("name", METHODS)
def test_real_model_learns_by_every_method(
    name: str, real_inputs: Path, write_manifest: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = next((real_inputs / "model").iterdir())
    manifest = write_manifest(
        model={"source": f"file://{model}"},
        dataset={
            "source": f"file://{real_inputs / 'train.jsonl'}",
            "validation": {
                "fraction": None,
                "source": f"file://{real_inputs / 'validation.jsonl'}",
            },
            "maxLength": 128,
        },
        method=METHODS[name],
        schedule=None,
        stages=[{"name": "top", "layers": {"first": 24, "last": 29}}],
        training={
            "learningRate": RATES[name],
            "batchSize": 8,
            "microBatchSize": 8,
            "validationsPerEpoch": 1,
        },
        evaluation={"exactMatch": None, "generalText": None, "samples": 1},
    )
    report = report_of(manifest, tmp_path / "run")
    assert report["after"]["validationLoss"] < 0.95 * report["before"]["validationLoss"]
    tokenizer = AutoTokenizer.from_pretrained(report["export"])
    exported = AutoModelForCausalLM.from_pretrained(report["export"])
    assert len(exported.model.layers) == (45 if name == "Expand" else 30)
    question = [{"role": "user", "content": report["samples"][0]["question"]}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = exported.generate(**inputs, max_new_tokens=64, do_sample=False)
    text = tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.strip() == report["samples"][0]["after"]
