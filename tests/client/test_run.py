"""`stagetune run` with real processes: to the end, again, killed anywhere, on damaged files."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stagetune.run_report import RunReport
from stagetune_api import names
from stagetune_api.artifact import verify_artifact
from stagetune_api.names import ExitCode, RunLayout
from stagetune_api.report import FailureClass
from stagetune_api.stage import PlannedStage, StageConfig
from stagetune_api.status import ConditionStatus, ConditionType, RunState, StagedFineTuneStatus
from stagetune_operator.plan import Plan

WriteManifest = Callable[..., Path]
TIMEOUT_SECONDS = 900


def start(manifest: Path, run_directory: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "stagetune", "run", str(manifest), "--run-dir", str(run_directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(manifest: Path, run_directory: Path) -> tuple[int, str]:
    process = start(manifest, run_directory)
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    return process.returncode, output


def done(manifest: Path, run_directory: Path) -> str:
    code, output = run(manifest, run_directory)
    assert code == ExitCode.DONE, output
    return output


def status_of(run_directory: Path) -> StagedFineTuneStatus:
    return StagedFineTuneStatus.model_validate_json(RunLayout(run_directory).status.read_bytes())


def exported(run_directory: Path) -> dict[str, torch.Tensor]:
    return load_file(run_directory / "export" / names.WEIGHTS_FILE)


def assert_same_weights(first: Path, second: Path) -> None:
    expected, found = exported(first), exported(second)
    assert expected.keys() == found.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    assert different == []


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, workspace: Path) -> dict[str, Path]:
    """Where runs that nothing has disturbed are kept, by method."""
    return {}


@pytest.fixture
def finished(
    unbroken: dict[str, Path],
    write_manifest: WriteManifest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """`finished(**spec) -> Path` of a copy of a finished run with that manifest."""

    def make(**spec: Any) -> Path:
        key = json.dumps(spec, sort_keys=True)
        if key not in unbroken:
            directory = tmp_path_factory.mktemp("unbroken") / "run"
            done(write_manifest(**spec), directory)
            unbroken[key] = directory
        return unbroken[key]

    return make


@pytest.fixture
def moved(finished: Callable[..., Path], tmp_path: Path) -> Path:
    """A finished run, moved with its base models to another place."""
    source = finished()
    shutil.copytree(source.parent / "_models", tmp_path / "_models")
    return Path(shutil.copytree(source, tmp_path / "run"))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


def steps_done(run_directory: Path, stage: int) -> int:
    path = RunLayout(run_directory).status
    if not path.exists():
        return -1
    status = status_of(run_directory)
    return status.stages[stage].step if len(status.stages) > stage else -1


def trainer_of(process: "subprocess.Popen[str]") -> int | None:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0]) if children else None


def test_run_in_two_processes_is_done_for_one_process_too(
    write_manifest: WriteManifest, tmp_path: Path
) -> None:
    training = {"microBatchSize": 2}
    two = write_manifest(training=training, runtime={"processesPerNode": 2})
    output = done(two, tmp_path / "run")
    assert "without effect" not in output
    report = RunReport.model_validate_json((tmp_path / "run" / "report.json").read_bytes())
    assert report.after.validation_loss < report.before.validation_loss - 0.05
    log = (tmp_path / "run" / "stages" / "01-layers-0-1" / "log.txt").read_text()
    assert "Traceback" not in log

    done(write_manifest(training=training), tmp_path / "run")
    layout = RunLayout(tmp_path / "run")
    attempts = [list(layout.stage(s.directory).fence.iterdir()) for s in _stages_of(layout)]
    assert [len(found) for found in attempts] == [1, 1]


def _stages_of(layout: RunLayout) -> list[PlannedStage]:
    return Plan.model_validate_json(layout.plan.read_bytes()).stages


def test_run_goes_from_manifest_to_a_folder_that_transformers_loads(
    finished: Callable[..., Path], workspace: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_directory = finished()
    report = RunReport.model_validate_json((run_directory / "report.json").read_bytes())
    assert [stage.name for stage in report.stages] == ["layers-0-1", "layers-2-3"]
    assert report.after.validation_loss < report.before.validation_loss
    assert report.after.kl_to_base is not None
    assert report.after.kl_to_base > 0
    assert report.before.kl_to_base is None
    assert report.before.general_loss is not None
    assert report.stages[0].peak_memory_bytes > 0

    model = AutoModelForCausalLM.from_pretrained(report.export)
    base = AutoModelForCausalLM.from_pretrained(workspace / "model")
    changed = {
        name.split(".")[2]
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, base.state_dict()[name])
    }
    assert changed == {"0", "1", "2", "3"}
    assert AutoTokenizer.from_pretrained(report.export).chat_template
    card = (Path(report.export) / "README.md").read_text()
    assert f"{report.after.validation_loss:.4f}" in card
    assert "layers-2-3" in card

    status = status_of(run_directory)
    assert status.state is RunState.SUCCEEDED
    conditions = {condition.type: condition.status for condition in status.conditions}
    assert conditions[ConditionType.READY] is ConditionStatus.TRUE
    assert conditions[ConditionType.FINISHED] is ConditionStatus.TRUE
    assert conditions[ConditionType.STALLED] is ConditionStatus.FALSE


def test_evaluated_model_is_the_exported_one(finished: Callable[..., Path]) -> None:
    """The report's loss is recomputed from the exported folder with plain transformers."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    run_directory = finished()
    report = RunReport.model_validate_json((run_directory / "report.json").read_bytes())
    model = AutoModelForCausalLM.from_pretrained(report.export)
    files = sorted((run_directory / "prepare" / "data").rglob("validation*.arrow"))
    files = files or sorted((run_directory / "prepare" / "data" / "validation").glob("*.arrow"))
    rows = Dataset.from_file(str(files[0]))
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"])[1:]
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += int((labels != -100).sum())
    assert report.after.validation_loss == pytest.approx(total / count, rel=1e-5)


def test_finished_run_is_inert(
    finished: Callable[..., Path], write_manifest: WriteManifest
) -> None:
    run_directory = finished()
    before = {
        path: path.stat().st_mtime_ns
        for path in run_directory.rglob("*")
        if path.is_file() and path.suffix in (".safetensors", ".arrow", ".jsonl")
    }
    output = done(write_manifest(), run_directory)
    assert "Before and after" in output
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("method", ["Full", "LoRA"])
@pytest.mark.parametrize("victim", ["trainer", "command", "both"])
def test_killed_run_goes_on_to_the_same_bits(
    method: str,
    victim: str,
    finished: Callable[..., Path],
    write_manifest: WriteManifest,
    tmp_path: Path,
) -> None:
    spec = {"method": {"type": method}}
    manifest, run_directory = write_manifest(**spec), tmp_path / "run"
    process = start(manifest, run_directory)
    wait_until(lambda: steps_done(run_directory, 1) >= 3, "the second stage")
    trainer = trainer_of(process)
    assert trainer is not None
    if victim != "command":
        os.kill(trainer, signal.SIGKILL)
    if victim != "trainer":
        process.kill()
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    if victim == "trainer":
        assert process.returncode == ExitCode.FAILED, output
        assert "signal 9" in output
    done(manifest, run_directory)
    assert_same_weights(finished(**spec), run_directory)


def processes_naming(path: Path) -> list[int]:
    found = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(path).encode() in command.read_bytes():
                found.append(int(command.parent.name))
    return found


def test_ctrl_c_saves_and_leaves_and_the_same_command_goes_on(
    finished: Callable[..., Path], write_manifest: WriteManifest, tmp_path: Path
) -> None:
    manifest, run_directory = write_manifest(), tmp_path / "run"
    process = start(manifest, run_directory)
    wait_until(lambda: steps_done(run_directory, 0) >= 2, "the first stage")
    # As a terminal does it: the whole foreground group gets the signal.
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == ExitCode.INTERRUPTED, output
    assert "Stopped: saved. The same command goes on from there." in output
    # Nor the process of the second stage, which was standing by.
    assert (run_directory / "stages" / "02-layers-2-3" / "forecast.json").exists()
    assert processes_naming(run_directory) == []
    assert status_of(run_directory).state is RunState.INTERRUPTED
    assert list((run_directory / "stages" / "01-layers-0-1" / "checkpoints").glob("step-*"))
    done(manifest, run_directory)
    assert_same_weights(finished(), run_directory)


@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "remove", "swap"])
def test_damaged_output_is_named_and_made_again(
    damage: str, finished: Callable[..., Path], write_manifest: WriteManifest, moved: Path
) -> None:
    run_directory, manifest = moved, write_manifest()
    stages = run_directory / "stages"
    file = stages / "01-layers-0-1" / "output" / names.WEIGHTS_FILE
    data = file.read_bytes()
    match damage:
        case "flip":
            file.write_bytes(data[:-3] + bytes([data[-3] ^ 8]) + data[-2:])
        case "truncate":
            file.write_bytes(data[: len(data) // 2])
        case "zero":
            file.write_bytes(bytes(len(data)))
        case "remove":
            file.unlink()
        case "swap":
            other = stages / "02-layers-2-3" / "output" / names.WEIGHTS_FILE
            keep = file.read_bytes()
            file.write_bytes(other.read_bytes())
            other.write_bytes(keep)
    output = done(manifest, run_directory)
    assert f"{file}: " in output
    verify_artifact(stages / "01-layers-0-1" / "output")
    verify_artifact(stages / "02-layers-2-3" / "output")
    assert list((stages / "01-layers-0-1").glob(".output.bad-*"))
    assert_same_weights(finished(), run_directory)


def test_damaged_data_and_base_model_are_prepared_again(
    finished: Callable[..., Path], write_manifest: WriteManifest, moved: Path
) -> None:
    run_directory, manifest = moved, write_manifest()
    done(manifest, run_directory)  # prepare has looked at the moved run
    shutil.rmtree(run_directory / "stages" / "02-layers-2-3")
    rows = next((run_directory / "prepare" / "data").rglob("*.arrow"))
    rows.write_bytes(rows.read_bytes()[:-8])
    model = next((moved.parent / "_models").rglob("model.safetensors"))
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    output = done(manifest, run_directory)
    assert "preparing again" in output
    assert_same_weights(finished(), run_directory)


def test_moved_run_is_as_finished_as_before(moved: Path, write_manifest: WriteManifest) -> None:
    """Prepare looks again, since the manifest has moved too; nothing else is done again."""

    def attempts() -> list[Path]:
        return sorted(path for path in moved.rglob("fence/*") if "prepare" not in path.parts)

    before = attempts()
    assert before
    done(write_manifest(), moved)
    assert attempts() == before


def test_changed_manifest_of_a_planned_run_is_refused_with_every_field(
    finished: Callable[..., Path], write_manifest: WriteManifest
) -> None:
    run_directory = finished()
    changed = write_manifest(training={"learningRate": 1e-3}, schedule={"epochsPerStage": 1})
    code, output = run(changed, run_directory)
    assert code == ExitCode.INVALID
    assert "spec.training.learning_rate" not in output
    assert "spec.training.learningRate: Conflict: is 0.001, and was 0.003" in output
    assert "spec.schedule.epochsPerStage: Conflict: is 1.0, and was 2.0" in output


def test_bad_row_fails_the_run_with_its_line_before_anything_is_trained(
    write_manifest: WriteManifest, workspace: Path, tmp_path: Path
) -> None:
    rows = (workspace / "rows.jsonl").read_text().splitlines()
    rows[6] = '{"query": "and this?", "response": ""}'
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    manifest = write_manifest(dataset={"source": "file://bad.jsonl"})
    code, output = run(manifest, tmp_path / "run")
    assert code == ExitCode.FAILED
    assert "bad.jsonl" in output
    assert "7" in output
    assert "maxInvalidRatio" in output
    assert not (tmp_path / "run" / "stages").exists()
    failure = status_of(tmp_path / "run").last_failure
    assert failure is not None
    assert failure.failure_class is FailureClass.USER_ERROR
    # The cure works in the same run: nothing was planned yet.
    allowed = write_manifest(dataset={"source": "file://bad.jsonl", "maxInvalidRatio": 0.1})
    done(allowed, tmp_path / "run")


def test_two_commands_do_not_work_on_one_run(
    write_manifest: WriteManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stagetune import local_run
    from stagetune.manifest_file import read_manifest_file
    from stagetune.run_lock import RunIsBusyError, locked

    monkeypatch.setattr(local_run, "_LOCK_WAIT_SECONDS", 0.0)
    lock = RunLayout(tmp_path / "run").lock
    with (
        locked(lock, wait_seconds=0, on_wait=lambda text: None),
        pytest.raises(RunIsBusyError, match="another process works in"),
    ):
        local_run.run_locally(read_manifest_file(write_manifest()), tmp_path / "run")


def test_adapter_export_is_loaded_by_peft_and_answers_as_the_merged_one(
    finished: Callable[..., Path], workspace: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    method = {"type": "LoRA", "lora": {"rank": 4, "alpha": 12.0}}
    merged = AutoModelForCausalLM.from_pretrained(finished(method=method) / "export")
    adapter_run = finished(method=method, export={"format": "Adapter"})
    base = AutoModelForCausalLM.from_pretrained(workspace / "model")
    ids = torch.arange(5, 45).reshape(2, 20)
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(base, adapter_run / "export")(input_ids=ids).logits
        expected = merged(input_ids=ids).logits
    assert not torch.allclose(plain, expected, atol=1e-4)
    torch.testing.assert_close(tuned, expected, rtol=1e-4, atol=1e-5)
    config = json.loads((adapter_run / "export" / "adapter_config.json").read_text())
    assert config["r"] == 4


def test_next_process_stands_by_before_its_task_is_due(finished: Callable[..., Path]) -> None:
    run_directory = finished()
    layout = RunLayout(run_directory)
    first, second = (layout.stage(stage.directory) for stage in _stages_of(layout))
    assert not first.forecast.exists()
    for follower, done_before in ((second, 1), (layout.task("evaluate"), 2)):
        forecast = StageConfig.model_validate_json(follower.forecast.read_bytes())
        given = StageConfig.model_validate_json(follower.config.read_bytes())
        assert (len(forecast.chain), len(given.chain)) == (done_before - 1, done_before)
        assert given.forecast() == forecast


def test_no_process_stands_by_where_the_manifest_says_so(
    finished: Callable[..., Path], write_manifest: WriteManifest, tmp_path: Path
) -> None:
    output = done(write_manifest(runtime={"standby": "Never"}), tmp_path / "run")
    assert "without effect" not in output
    assert not list((tmp_path / "run").rglob("forecast.json"))
    assert_same_weights(finished(), tmp_path / "run")
