"""Whole stages on a tiny model: the same bits again, after any interruption, or a clear refusal."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stagetune_api import names
from stagetune_api.artifact import verify_artifact
from stagetune_api.names import TrainerExitCode
from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.report import FailureClass, Outcome, StageReport
from stagetune_api.stage import StageConfig, Task
from stagetune_trainer.loss import OutputHead
from stagetune_trainer.metrics import HistoryFile
from stagetune_trainer.run import run_task
from stop_requests import AfterChecks, NeverAsked

MakeConfig = Callable[..., StageConfig]
RunStage = Callable[..., tuple[StageReport, TrainerExitCode]]
NO_ESTIMATE = {
    "trainableParameters": 0,
    "weightsBytes": 0,
    "trainingStateBytes": 0,
    "activationBytes": 0,
    "memoryBytes": 0,
    "diskBytes": 0,
    "stepFlops": 0,
    "relativeStepFlops": 0.0,
}


def planned(index: int, first: int, last: int, **options: Any) -> dict[str, Any]:
    return {
        "index": index,
        "name": f"layers-{first}-{last}",
        "layers": {"first": first, "last": last},
        "embeddings": False,
        "head": False,
        "learningRate": 3e-3,
        "epochs": 1.0,
        "rows": {"start": 0, "end": 32},
        "steps": 8,
        "warmupSteps": 1,
        "validationInterval": 4,
        "estimate": NO_ESTIMATE,
        **options,
    }


@pytest.fixture
def run_stage(make_stage_config: MakeConfig, tmp_path: Path) -> RunStage:
    """`run_stage(stage, stop=..., chain=..., run=..., **fields)` of a run that is prepared once."""
    report, code = run_task(make_stage_config(), NeverAsked())
    assert code == TrainerExitCode.SUCCEEDED, report.failure
    assert report.facts is not None
    facts = report.facts

    def run(
        stage: Mapping[str, Any],
        *,
        stop: Any = None,
        chain: list[StageReport] | None = None,
        run: str = "run",
        attempt: int = 1,
        **fields: Any,
    ) -> tuple[StageReport, TrainerExitCode]:
        directory = tmp_path / run
        if not directory.exists():
            (directory / "prepare").parent.mkdir(parents=True)
            shutil.copytree(tmp_path / "run" / "prepare", directory / "prepare")
        outputs = [r.output for r in chain or [] if r.output is not None]
        config = make_stage_config(
            task="Train",
            stage=stage,
            attempt=attempt,
            run_directory=str(directory),
            model_directory=facts.model_directory,
            model_digest=facts.model.digest,
            data_digest=facts.data.digest,
            chain=[{"path": output.path, "digest": output.digest} for output in outputs],
            **fields,
        )
        return run_task(config, stop or NeverAsked())

    return run


def succeeded(result: tuple[StageReport, TrainerExitCode]) -> StageReport:
    report, code = result
    assert code == TrainerExitCode.SUCCEEDED, report.failure
    return report


def output_digest(report: StageReport) -> str:
    assert report.output is not None
    return report.output.digest


def weights(report: StageReport) -> dict[str, torch.Tensor]:
    assert report.output is not None
    return load_file(Path(report.output.path) / names.WEIGHTS_FILE)


def test_stage_lowers_the_loss_and_leaves_exactly_its_files(
    run_stage: RunStage, tmp_path: Path
) -> None:
    report = succeeded(run_stage(planned(0, 0, 1)))
    assert report.train is not None
    assert report.train.validation_loss < report.train.initial_validation_loss - 0.1
    root = tmp_path / "run" / "stages" / "01-layers-0-1"
    assert sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()) == [
        "fence/000001",
        "metrics.jsonl",
        "output/manifest.json",
        "output/model.safetensors",
        "report.json",
    ]
    content = verify_artifact(root / "output").content
    assert content.layers is not None
    assert (content.layers.first, content.layers.last, content.step) == (0, 1, 8)
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "Step"] == list(range(1, 9))
    assert [line["step"] for line in lines if line["kind"] == "Validation"] == [0, 4, 8]


@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_same_seed_gives_the_same_bits(method: str, run_stage: RunStage) -> None:
    fields = {"method": {"type": method}}
    first = succeeded(run_stage(planned(0, 0, 1), run="a", **fields))
    second = succeeded(run_stage(planned(0, 0, 1), run="b", **fields))
    other = succeeded(run_stage(planned(0, 0, 1), run="c", training={"seed": 8}, **fields))
    assert output_digest(first) == output_digest(second)
    assert weights(first).keys() == weights(other).keys()
    assert any(
        not torch.equal(tensor, weights(other)[name]) for name, tensor in weights(first).items()
    )


@pytest.mark.parametrize("method", ["Full", "LoRA"])
@pytest.mark.parametrize("checks", [0, 2, 5, 11, 14, 19])
def test_stopped_stage_goes_on_to_the_same_bits(
    method: str, checks: int, run_stage: RunStage
) -> None:
    """Stopped before, between and inside steps, with dropout and a best state to be kept."""
    fields: dict[str, Any] = {
        "method": {"type": method},
        "training": {"earlyStopping": {"patience": 5}},
    }
    if method == "LoRA":
        fields["method"]["lora"] = {"rank": 4, "dropout": 0.1}
    unbroken = succeeded(run_stage(planned(0, 1, 2), run="unbroken", **fields))
    report, code = run_stage(planned(0, 1, 2), run="broken", stop=AfterChecks(checks), **fields)
    assert (report.outcome, code) == (Outcome.INTERRUPTED, TrainerExitCode.INTERRUPTED)
    resumed = succeeded(run_stage(planned(0, 1, 2), run="broken", attempt=2, **fields))
    assert output_digest(resumed) == output_digest(unbroken)
    assert resumed.train is not None
    assert unbroken.train is not None
    assert resumed.train.best_step == unbroken.train.best_step
    assert resumed.train.validation_loss == unbroken.train.validation_loss
    assert resumed.train.tokens == unbroken.train.tokens


def test_resumed_history_has_every_step_once(run_stage: RunStage, tmp_path: Path) -> None:
    run_stage(planned(0, 0, 1), stop=AfterChecks(9))
    history = tmp_path / "run" / "stages" / "01-layers-0-1" / names.METRICS_FILE
    # A killed process may have written more than it saved, the last line cut anywhere.
    with history.open("a") as file:
        line = history.read_text().splitlines()[-2]
        file.write(json.dumps({**json.loads(line), "kind": "Step", "step": 7}) + '\n{"kind": "St')
    succeeded(run_stage(planned(0, 0, 1), attempt=2))
    steps = [
        json.loads(line)["step"] for line in history.read_text().splitlines() if '"Step"' in line
    ]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize(("validated", "validations"), [(0, [0]), (4, [0, 4])])
def test_history_keeps_the_validations_that_the_checkpoint_knows_of(
    validated: int, validations: list[int], tmp_path: Path
) -> None:
    history = HistoryFile(tmp_path / names.METRICS_FILE, before_write=lambda: None)

    def write(kind: ProgressKind, step: int) -> None:
        progress = Progress(
            kind=kind, task=Task.TRAIN, name="x", attempt=1, time="2026-01-01T00:00:00Z", step=step
        )
        history.write(progress)

    write(ProgressKind.VALIDATION, 0)
    for step in range(1, 5):
        write(ProgressKind.STEP, step)
    # As a checkpoint at an interval is: before the validation of its step.
    write(ProgressKind.CHECKPOINT, 4)
    write(ProgressKind.VALIDATION, 4)
    write(ProgressKind.STEP, 5)
    history.forget_after(4, validated)
    lines = [
        Progress.model_validate_json(line)
        for line in (tmp_path / names.METRICS_FILE).read_text().splitlines()
    ]
    assert [line.step for line in lines if line.kind is ProgressKind.VALIDATION] == validations
    assert [line.step for line in lines if line.kind is ProgressKind.STEP] == [1, 2, 3, 4]
    assert [line.step for line in lines if line.kind is ProgressKind.CHECKPOINT] == [4]


def test_damaged_checkpoint_is_not_used_and_the_one_before_is(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken = succeeded(run_stage(planned(0, 0, 1), run="unbroken"))
    run_stage(planned(0, 0, 1), stop=AfterChecks(10))
    run_stage(planned(0, 0, 1), stop=AfterChecks(10), attempt=2)
    checkpoints = tmp_path / "run" / "stages" / "01-layers-0-1" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000003", "step-000006"]
    file = checkpoints / "step-000006" / names.OPTIMIZER_FILE
    data = bytearray(file.read_bytes())
    data[-10] ^= 4
    file.write_bytes(data)
    capsys.readouterr()
    resumed = succeeded(run_stage(planned(0, 0, 1), attempt=3))
    said = capsys.readouterr().out
    assert "step-000006/optimizer.safetensors: is damaged" in said
    assert "going on from step 3" in said
    assert output_digest(resumed) == output_digest(unbroken)


def test_checkpoint_of_another_rate_is_not_gone_on_from(
    run_stage: RunStage, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stage(planned(0, 0, 1), stop=AfterChecks(10))
    changed = succeeded(run_stage(planned(0, 0, 1, learningRate=1e-3), attempt=2))
    fresh = succeeded(run_stage(planned(0, 0, 1, learningRate=1e-3), run="fresh"))
    assert "was made with other settings" in capsys.readouterr().out
    assert output_digest(changed) == output_digest(fresh)


def test_next_stage_begins_where_its_parent_ended(run_stage: RunStage) -> None:
    first = succeeded(run_stage(planned(0, 0, 1)))
    second = succeeded(run_stage(planned(1, 2, 3), chain=[first]))
    assert first.train is not None
    assert second.train is not None
    assert second.train.initial_validation_loss == pytest.approx(first.train.validation_loss)
    assert second.output is not None
    content = verify_artifact(Path(second.output.path)).content
    assert content.parent == output_digest(first)
    assert {name.split(".")[2] for name in weights(second)} == {"2", "3"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "remove", "swap"])
def test_damaged_parent_is_refused_by_name(
    damage: str, run_stage: RunStage, tmp_path: Path
) -> None:
    first = succeeded(run_stage(planned(0, 0, 1)))
    second = succeeded(run_stage(planned(1, 2, 3), chain=[first]))
    assert first.output is not None
    assert second.output is not None
    file = Path(first.output.path) / names.WEIGHTS_FILE
    data = file.read_bytes()
    match damage:
        case "flip":
            file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        case "truncate":
            file.write_bytes(data[:-1])
        case "zero":
            file.write_bytes(bytes(len(data)))
        case "remove":
            file.unlink()
        case "swap":
            file.write_bytes((Path(second.output.path) / names.WEIGHTS_FILE).read_bytes())
    report, code = run_stage(planned(1, 2, 3), chain=[first], attempt=2)
    assert code == TrainerExitCode.STORAGE_ERROR
    assert report.failure is not None
    assert report.failure.failure_class is FailureClass.STORAGE_ERROR
    assert str(file) in report.failure.message
    assert report.failure.artifact == str(file)
    assert json.loads(report.termination_message())["failure"]["artifact"] == str(file)


def test_chain_in_the_wrong_order_is_refused(run_stage: RunStage) -> None:
    first = succeeded(run_stage(planned(0, 0, 1)))
    second = succeeded(run_stage(planned(1, 2, 3), chain=[first]))
    report, code = run_stage(planned(2, 0, 3), chain=[second, first])
    assert code == TrainerExitCode.STORAGE_ERROR
    assert report.failure is not None
    assert "was not made from what stands before it" in report.failure.message


def test_zombie_attempt_cannot_publish(run_stage: RunStage, tmp_path: Path) -> None:
    succeeded(run_stage(planned(0, 0, 1), attempt=3))
    before = (tmp_path / "run" / "stages" / "01-layers-0-1" / names.REPORT_FILE).read_bytes()
    report, code = run_stage(planned(0, 0, 1), attempt=2)
    assert code == TrainerExitCode.FENCED
    assert report.outcome is Outcome.FAILED
    after = (tmp_path / "run" / "stages" / "01-layers-0-1" / names.REPORT_FILE).read_bytes()
    assert after == before


def test_diverging_stage_stops_before_the_step_and_publishes_nothing(
    run_stage: RunStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = OutputHead.cross_entropy_sum
    training_calls = 0

    def poisoned(self: OutputHead, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal training_calls
        training_calls += hidden.requires_grad
        factor = float("nan") if training_calls == 9 else 1.0
        return compute(self, hidden, targets) * factor

    monkeypatch.setattr(OutputHead, "cross_entropy_sum", poisoned)
    report, code = run_stage(planned(0, 0, 1))
    assert code == TrainerExitCode.DIVERGED
    assert report.failure is not None
    assert report.failure.failure_class is FailureClass.DIVERGED
    assert "step 5: loss nan" in report.failure.message
    assert "spec.training.learningRate" in report.failure.message
    root = tmp_path / "run" / "stages" / "01-layers-0-1"
    assert not (root / "output").exists()
    last = json.loads((root / names.METRICS_FILE).read_text().splitlines()[-1])
    assert last["step"] == 4


def test_patience_ends_a_stage_and_the_best_state_is_handed_on(run_stage: RunStage) -> None:
    report = succeeded(
        run_stage(
            planned(0, 0, 3, learningRate=2e-2, steps=80, epochs=10.0, validationInterval=2),
            training={"earlyStopping": {"patience": 2}, "learningRateSchedule": "Constant"},
        )
    )
    assert report.train is not None
    assert report.train.stopped_early
    assert report.train.steps < 80
    assert report.train.best_step == report.train.steps - 2 * 2
    check = succeeded(
        run_stage(planned(1, 3, 3, steps=1, learningRate=1e-9), chain=[report], attempt=1)
    )
    assert check.train is not None
    assert check.train.initial_validation_loss == pytest.approx(report.train.validation_loss)


def test_stage_that_only_does_harm_hands_on_what_it_got(run_stage: RunStage) -> None:
    report = succeeded(
        run_stage(
            planned(0, 0, 3, learningRate=1.0, warmupSteps=0, validationInterval=1, head=True),
            training={"earlyStopping": {"patience": 3}},
        )
    )
    assert report.train is not None
    assert report.train.best_step == 0
    assert report.train.validation_loss == report.train.initial_validation_loss


def test_any_split_into_micro_batches_gives_the_same_result_within_rounding(
    run_stage: RunStage,
) -> None:
    """Rows differ in their number of answer tokens, so a mean of means would differ."""
    results = [
        succeeded(run_stage(planned(0, 0, 3), run=f"m{size}", training={"microBatchSize": size}))
        for size in (1, 2, 4)
    ]
    reference = weights(results[0])
    for result in results[1:]:
        for name, tensor in weights(result).items():
            torch.testing.assert_close(tensor, reference[name], rtol=1e-3, atol=2e-5)


def test_stage_goes_on_with_smaller_micro_batches(
    run_stage: RunStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after running out of memory: the same rows, tokens and steps, within rounding."""
    unbroken = succeeded(
        run_stage(planned(0, 0, 3), run="unbroken", training={"microBatchSize": 4})
    )
    run_stage(planned(0, 0, 3), stop=AfterChecks(5), training={"microBatchSize": 4})
    capsys.readouterr()
    resumed = succeeded(run_stage(planned(0, 0, 3), attempt=2, training={"microBatchSize": 1}))
    assert "going on from step 3" in capsys.readouterr().out
    assert resumed.train is not None
    assert unbroken.train is not None
    assert (resumed.train.steps, resumed.train.tokens) == (8, unbroken.train.tokens)
    for name, tensor in weights(resumed).items():
        torch.testing.assert_close(tensor, weights(unbroken)[name], rtol=1e-3, atol=2e-5)
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / run / "stages" / "01-layers-0-3" / names.METRICS_FILE)
            .read_text()
            .splitlines()
            if '"Step"' in line
        ]
        for run in ("run", "unbroken")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_gradient_checkpointing_changes_nothing_but_memory(run_stage: RunStage) -> None:
    always = succeeded(
        run_stage(planned(0, 1, 2), run="a", training={"gradientCheckpointing": "Always"})
    )
    never = succeeded(
        run_stage(planned(0, 1, 2), run="b", training={"gradientCheckpointing": "Never"})
    )
    for name, tensor in weights(always).items():
        assert torch.equal(tensor, weights(never)[name]), name


def test_bf16_stage_trains_with_fp32_masters(run_stage: RunStage) -> None:
    report = succeeded(run_stage(planned(0, 0, 3), training={"precision": "BF16"}))
    assert report.train is not None
    assert report.train.validation_loss < report.train.initial_validation_loss - 0.1
    assert {tensor.dtype for tensor in weights(report).values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "phi3"])
@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_two_stages_train_in_every_family(
    method: str,
    family: str,
    make_stage_config: MakeConfig,
    make_tiny_model: Callable[..., Path],
) -> None:
    model = {"source": f"file://{make_tiny_model(family)}"}
    prepared, code = run_task(make_stage_config(model=model), NeverAsked())
    assert code == TrainerExitCode.SUCCEEDED, prepared.failure
    facts = prepared.facts
    assert facts is not None
    chain: list[dict[str, str]] = []
    losses = []
    for index in range(2):
        config = make_stage_config(
            task="Train",
            model=model,
            method={"type": method},
            stage=planned(index, 2 * index, 2 * index + 1),
            model_directory=facts.model_directory,
            model_digest=facts.model.digest,
            data_digest=facts.data.digest,
            chain=chain,
        )
        report = succeeded(run_task(config, NeverAsked()))
        assert report.output is not None
        assert report.train is not None
        chain.append({"path": report.output.path, "digest": report.output.digest})
        losses += [report.train.initial_validation_loss, report.train.validation_loss]
    assert losses[1] < losses[0]
    assert losses[3] < losses[2]
