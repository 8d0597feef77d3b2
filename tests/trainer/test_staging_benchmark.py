"""The staging benchmark runs: real processes on a tiny model, from rows to the page."""

import json
import sys
from pathlib import Path

import pytest

import staging
import staging_gpu
from staging_page import BEGIN, END
from tiny_workspace import build_workspace

TABLES = ("staging-targets", "staging-arms", "staging-stages", "staging-profile")


def write_messages(workspace: Path) -> Path:
    rows = [json.loads(line) for line in (workspace / "rows.jsonl").read_text().splitlines()]
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["query"]},
                {"role": "assistant", "content": row["response"]},
            ]
        }
        for row in rows
    ]
    path = workspace / "messages.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return path


def test_a_round_on_a_tiny_model_gives_ratios_a_profile_and_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = build_workspace(tmp_path)
    page, output = tmp_path / "page.md", tmp_path / "staging.json"
    page.write_text("".join(f"{BEGIN.format(name)}\n{END}\n" for name in TABLES))
    command = ["staging.py", "--rounds", "1", "--rows", "32", "--arms", "full,top-cached"]
    command += ["--model", str(workspace / "model"), "--data", str(write_messages(workspace))]
    command += ["--work", str(tmp_path / "work"), "--output", str(output), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", command)

    staging.main()

    found = json.loads(output.read_text())
    assert found["steps"] == 4
    assert found["ratios"]["topStageSeconds"]["wall"]["median"] > 0
    # One layer of four, without the three below it: far less than the whole model.
    assert 0 < found["ratios"]["topStageFlops"]["median"] < 0.5
    full, top = found["arms"]
    assert [process["name"] for process in full["processes"]] == ["all"]
    assert [process["name"] for process in top["processes"]] == ["below-top", "top"]
    assert all(process["fillFlops"] > 0 for process in top["processes"])
    assert all(process["peakMemoryBytes"]["median"] > 2**26 for process in top["processes"])
    profile = found["profile"]["top 1"]
    assert sum(profile["shares"].values()) == pytest.approx(1, abs=0.01)
    assert {"groupForwardGemm", "groupBackwardGemm", "headAndLoss", "optimizer", "data"} <= set(
        profile["shares"]
    )
    assert "suffix" not in profile["shares"]
    assert "full fine-tuning" in page.read_text()
    assert (tmp_path / "staging.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("name", ["full", "lora16", "layers-0-3", "layers-4-7-cached"])
def test_memory_of_a_large_model_is_measured_by_the_same_code_on_a_tiny_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "arm.json"
    command = ["staging_gpu.py", name, str(output), "--device", "cpu", "--shape", "tiny"]
    monkeypatch.setattr(sys, "argv", command)

    staging_gpu.main()

    found = json.loads(output.read_text())
    assert found["name"] == name
    assert found["peakMemoryBytes"] > 0
