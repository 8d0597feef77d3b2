"""The quick start itself: the real model and the real question set, as the README runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_SECONDS = 3000


def command(*arguments: str, cwd: Path) -> str:
    """Run a command with every processor, as a user would, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.real_model
def test_quick_start_teaches_the_facts_and_forgets_little(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    root = pytestconfig.rootpath
    command("examples/quickstart/build_inputs.py", cwd=root)
    manifest = "examples/quickstart/finance-qa.yaml"
    run_directory = tmp_path / "finance-qa"
    output = command("-m", "stagetune", "run", manifest, "--run-dir", str(run_directory), cwd=root)
    for title in ("Before and after", "Sample answers", "Stages"):
        assert title in output

    report = json.loads((run_directory / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert [stage["name"] for stage in report["stages"]] == ["layers-0-14", "layers-15-29"]
    assert {stage["state"] for stage in report["stages"]} == {"Succeeded"}
    losses = [stage["validationLoss"] for stage in report["stages"]]
    assert losses == sorted(losses, reverse=True)
    assert after["validationLoss"] == pytest.approx(losses[-1], rel=1e-3)
    assert after["validationLoss"] < 0.2 * before["validationLoss"]
    assert after["exactMatch"] > before["exactMatch"] + 0.3
    assert after["generalLoss"] < before["generalLoss"] + 0.3
    assert after["klToBase"] > 0
    assert len(report["samples"]) == 3
    assert report["totalSeconds"] > sum(stage["seconds"] for stage in report["stages"])
    for stage in report["stages"]:
        assert stage["peakMemoryBytes"] > stage["trainableParameters"] * 16

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(report["export"])
    model = AutoModelForCausalLM.from_pretrained(report["export"])
    question = [{"role": "user", "content": report["samples"][0]["question"]}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.strip() == report["samples"][0]["after"]
