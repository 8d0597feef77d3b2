"""Whole stages under protection: what it keeps, what it leaves behind, and the same bits again."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stagetune_api import names
from stagetune_api.artifact import ArtifactKind, read_manifest, verify_artifact
from stagetune_api.names import RunLayout, TrainerExitCode
from stagetune_api.report import FailureClass, Outcome, StageReport
from stagetune_api.stage import StageConfig
from stagetune_trainer.data.store import RowReader, Split, rows_path
from stagetune_trainer.protect import protection
from stagetune_trainer.run import run_task
from stop_requests import AfterChecks, NeverAsked

MakeConfig = Callable[..., StageConfig]
RunTask = Callable[..., tuple[StageReport, TrainerExitCode]]
EVERYTHING = {
    "distillation": {"weight": 0.5, "topK": 32},
    "anchor": {"weight": 0.1},
    "replay": {"ratio": 0.5, "generated": {"tokens": 400}},
}
SENTENCES = ["The moon is round and old.", "Water runs down.", "A bird has two wings.", "Snow."]


@pytest.fixture
def run(
    make_stage_config: MakeConfig,
    make_stage: Callable[..., dict[str, Any]],
    save_jsonl: Callable[..., Path],
    tmp_path: Path,
) -> RunTask:
    """`run(stage_index, protection, directory=..., ...)` of a stage of two layers.

    The directory is prepared first, with text on which forgetting is measured.
    """
    save_jsonl(tmp_path / "general.jsonl", [{"text": text} for text in SENTENCES])
    facts: dict[str, Any] = {}

    def prepared(directory: str, protection: dict[str, Any]) -> dict[str, Any]:
        if directory not in facts:
            report, code = run_task(
                make_stage_config(
                    run_directory=str(tmp_path / directory),
                    evaluation={"generalText": {"source": "file://./general.jsonl"}},
                    protection=protection,
                    attempt=0,
                ),
                NeverAsked(),
            )
            assert code == TrainerExitCode.SUCCEEDED, report.failure
            assert report.facts is not None
            facts[directory] = {
                "model_directory": report.facts.model_directory,
                "model_digest": report.facts.model.digest,
                "data_digest": report.facts.data.digest,
            }
        return facts[directory]  # type: ignore[no-any-return]

    def run_one(
        index: int,
        protection: dict[str, Any],
        *,
        directory: str = "run",
        stop: Any = None,
        chain: list[StageReport] | None = None,
        task: str = "Train",
        stage: dict[str, Any] | None = None,
        **fields: Any,
    ) -> tuple[StageReport, TrainerExitCode]:
        outputs = [report.output for report in chain or [] if report.output is not None]
        config = make_stage_config(
            task=task,
            attempt=0,
            run_directory=str(tmp_path / directory),
            stage=make_stage(index, 2 * index, 2 * index + 1, **(stage or {})),
            chain=[{"path": output.path, "digest": output.digest} for output in outputs],
            evaluation={"generalText": {"source": "file://./general.jsonl"}},
            protection=protection,
            **prepared(directory, protection),
            **fields,
        )
        return run_task(config, stop or NeverAsked())

    return run_one


def succeeded(result: tuple[StageReport, TrainerExitCode]) -> StageReport:
    report, code = result
    assert code == TrainerExitCode.SUCCEEDED, report.failure
    return report


def digest_of(report: StageReport) -> str:
    assert report.output is not None
    return report.output.digest


def kl_of(report: StageReport) -> float:
    assert report.train is not None
    assert report.train.kl_to_base is not None
    return report.train.kl_to_base


def lines(tmp_path: Path, directory: str = "run", stage: str = "01-layers-0-1") -> list[Any]:
    path = tmp_path / directory / "stages" / stage / names.METRICS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("method", ["Full", "LoRA"])
@pytest.mark.parametrize("checks", [7, 23, 40, 51, 58])
def test_stopped_stage_goes_on_to_the_same_bits_under_all_protection(
    method: str, checks: int, run: RunTask
) -> None:
    """Stopped while the base is looked at, before, between and inside steps."""
    fields: dict[str, Any] = {
        "method": {"type": method},
        "training": {"earlyStopping": {"patience": 5}},
    }
    if method == "LoRA":
        fields["method"]["lora"] = {"rank": 4, "dropout": 0.1}
    unbroken = succeeded(run(0, EVERYTHING, directory="unbroken", **fields))
    report, code = run(0, EVERYTHING, directory="broken", stop=AfterChecks(checks), **fields)
    assert (report.outcome, code) == (Outcome.INTERRUPTED, TrainerExitCode.INTERRUPTED)
    resumed = succeeded(run(0, EVERYTHING, directory="broken", **fields))
    assert digest_of(resumed) == digest_of(unbroken)
    assert resumed.train is not None
    assert unbroken.train is not None
    for field in ("tokens", "validation_loss", "general_loss", "initial_general_loss"):
        assert getattr(resumed.train, field) == getattr(unbroken.train, field), field
    assert kl_of(resumed) == kl_of(unbroken)


def test_each_step_says_all_terms_of_its_loss(run: RunTask, tmp_path: Path) -> None:
    succeeded(run(0, EVERYTHING))
    steps = [line for line in lines(tmp_path) if line["kind"] == "Step"]
    assert len(steps) == 8
    for step in steps:
        assert step["losses"].keys() == {"answers", "distillation", "anchor", "replay"}
        assert step["losses"]["answers"] == step["loss"]
    # Before the first update the model is the base.
    assert 0 <= steps[0]["losses"]["distillation"] < 1e-5
    assert 0 <= steps[0]["losses"]["anchor"] < 1e-5
    assert steps[-1]["losses"]["anchor"] > 1e-4


def test_unprotected_stage_says_one_loss_and_keeps_nothing_of_the_base_but_for_its_meter(
    run: RunTask, tmp_path: Path
) -> None:
    succeeded(run(0, {}))
    assert all("losses" not in line for line in lines(tmp_path))
    assert [path.name for path in (tmp_path / "run" / "cache").iterdir()] == ["teacher-validation"]


def test_strong_distillation_keeps_answers_nearer_to_the_base(run: RunTask) -> None:
    free = succeeded(run(0, {}, directory="free"))
    held = succeeded(run(0, {"distillation": {"weight": 100, "topK": 320}}, directory="held"))
    assert kl_of(held) < 0.4 * kl_of(free)


def test_strong_anchor_keeps_hidden_states_nearer_to_the_base(run: RunTask, tmp_path: Path) -> None:
    moved = {}
    for weight in (1e-9, 100):
        directory = f"anchor-{weight}"
        succeeded(run(0, {"anchor": {"weight": weight}}, directory=directory))
        moved[weight] = lines(tmp_path, directory)[-3]["losses"]["anchor"]
    assert 0 < moved[100] < 0.3 * moved[1e-9]


def test_replay_lowers_the_loss_on_the_replayed_text(
    run: RunTask, tmp_path: Path, save_jsonl: Callable[..., Path]
) -> None:
    save_jsonl(tmp_path / "other.jsonl", [{"text": f"{text} {text}"} for text in SENTENCES])
    last = {}
    for ratio in (1e-6, 0.9):
        replay = {"replay": {"ratio": ratio, "source": "file://./other.jsonl"}}
        directory = f"replay-{ratio}"
        succeeded(run(0, replay, directory=directory))
        steps = [line for line in lines(tmp_path, directory) if line["kind"] == "Step"]
        last[ratio] = sum(step["losses"]["replay"] for step in steps[-4:]) / 4
    assert last[0.9] < last[1e-6] - 0.05
    directory = "replay-0.9"
    rows = RowReader(rows_path(tmp_path / directory / "prepare" / "data", Split.REPLAY))
    assert len(rows) == len(SENTENCES)


@pytest.mark.parametrize("checkpointing", ["Always", "Never"])
def test_protected_bf16_stage_trains(checkpointing: str, run: RunTask) -> None:
    training = {"precision": "BF16", "gradientCheckpointing": checkpointing}
    report = succeeded(run(0, EVERYTHING, training=training))
    assert report.train is not None
    assert report.train.validation_loss < report.train.initial_validation_loss - 0.1


def test_gradient_checkpointing_changes_no_bit_under_all_protection(run: RunTask) -> None:
    weights = []
    for value in ("Always", "Never"):
        training = {"gradientCheckpointing": value}
        report = succeeded(run(0, EVERYTHING, directory=value, training=training))
        assert report.output is not None
        weights.append(load_file(Path(report.output.path) / names.WEIGHTS_FILE))
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


@pytest.mark.parametrize("damage", ["flip", "missing", "manifest", "other-data"])
def test_teacher_that_is_not_sound_is_computed_anew_with_the_same_bits(
    damage: str, run: RunTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the second stage, which has the bare base in its hands before the chain is put on it."""
    first = succeeded(run(0, EVERYTHING))
    sound = succeeded(run(1, EVERYTHING, chain=[first]))
    shutil.rmtree(tmp_path / "run" / "stages" / "02-layers-2-3")
    teacher = RunLayout(tmp_path / "run").cache / "teacher-train"
    before = verify_artifact(teacher, kind=ArtifactKind.TEACHER)
    file = teacher / names.TEACHER_FILE
    match damage:
        case "flip":
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        case "missing":
            shutil.rmtree(teacher)
        case "manifest":
            (teacher / names.MANIFEST_FILE).write_text("{}")
        case "other-data":
            shutil.rmtree(teacher)
            shutil.copytree(RunLayout(tmp_path / "run").cache / "teacher-validation", teacher)
    capsys.readouterr()
    again = succeeded(run(1, EVERYTHING, chain=[first]))
    assert ("computed anew" in capsys.readouterr().out) == (damage != "missing")
    assert verify_artifact(teacher).digest == before.digest
    assert digest_of(again) == digest_of(sound)
    assert [path.name for path in teacher.parent.iterdir() if path.name.startswith(".")] == []


def test_teacher_is_computed_once_for_all_stages(
    run: RunTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = succeeded(run(0, EVERYTHING))
    assert 'teacher-train"' in capsys.readouterr().out
    manifest = read_manifest(RunLayout(tmp_path / "run").cache / "teacher-train")
    second = succeeded(run(1, EVERYTHING, chain=[first]))
    assert 'teacher-train"' not in capsys.readouterr().out
    assert read_manifest(RunLayout(tmp_path / "run").cache / "teacher-train") == manifest
    assert kl_of(second) > 0


def test_hidden_states_go_with_their_stage_and_the_rest_with_the_run(
    run: RunTask, tmp_path: Path
) -> None:
    report, code = run(0, EVERYTHING, stop=AfterChecks(40))
    assert code is TrainerExitCode.INTERRUPTED, report
    layout = RunLayout(tmp_path / "run")
    stage = layout.stage("01-layers-0-1")
    verify_artifact(stage.anchor, kind=ArtifactKind.HIDDEN_STATES)
    done = succeeded(run(0, EVERYTHING))
    assert not stage.anchor.exists()
    assert layout.cache.exists()
    # What a stage could not remove goes with the rest.
    stage.anchor.mkdir()
    (stage.anchor / names.HIDDEN_STATES_FILE).touch()
    succeeded(run(0, EVERYTHING, chain=[done], task="Export", retain="Result"))
    assert not layout.cache.exists()
    assert not stage.anchor.exists()
    assert stage.output.exists()


def test_hidden_states_that_cannot_be_removed_do_not_fail_the_stage(
    run: RunTask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a network file system, which keeps a folder whose files are open."""
    still_open: list[bool] = []

    def refuse(directory: Path) -> None:
        maps = Path("/proc/self/maps").read_text()
        still_open.append(f"{directory}/{names.HIDDEN_STATES_FILE}" in maps)
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(protection, "shutil", SimpleNamespace(rmtree=refuse))
    report = succeeded(run(0, {"anchor": {"weight": 0.1}}))
    assert report.output is not None
    assert still_open == [False]
    assert "anchor could not be removed" in capsys.readouterr().out


def test_checkpoint_under_other_protection_is_not_gone_on_from(
    run: RunTask, capsys: pytest.CaptureFixture[str]
) -> None:
    run(0, {"anchor": {"weight": 0.1}}, stop=AfterChecks(40))
    capsys.readouterr()
    changed = succeeded(run(0, {"anchor": {"weight": 0.2}}))
    assert "was made with other settings" in capsys.readouterr().out
    fresh = succeeded(run(0, {"anchor": {"weight": 0.2}}, directory="fresh"))
    assert digest_of(changed) == digest_of(fresh)


@pytest.mark.parametrize(("method", "top_k"), [("Full", 320), ("LoRA", 320), ("Full", 64)])
def test_meters_agree_with_the_evaluation(
    method: str, top_k: int, run: RunTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what is not told apart of the vocabulary of 320."""
    monkeypatch.setattr(protection, "METER_TOP_K", top_k)
    fields = {"method": {"type": method}}
    first = succeeded(run(0, {}, **fields))
    second = succeeded(run(1, {}, chain=[first], **fields))
    evaluated = succeeded(run(1, {}, chain=[first, second], task="Evaluate", **fields)).evaluation
    assert evaluated is not None
    assert first.train is not None
    assert second.train is not None
    assert first.train.initial_general_loss == pytest.approx(evaluated.before.general_loss)
    assert second.train.initial_general_loss is None
    assert second.train.general_loss == pytest.approx(evaluated.after.general_loss, rel=1e-4)
    assert evaluated.after.kl_to_base is not None
    if top_k < 320:
        assert 0 < kl_of(second) < evaluated.after.kl_to_base
    else:
        assert kl_of(second) == pytest.approx(evaluated.after.kl_to_base, rel=5e-3)
    meters = [line for line in lines(tmp_path) if line["kind"] == "Meters"]
    assert [(line["step"], "klToBase" in line) for line in meters] == [(0, False), (8, True)]
    assert second.termination_message().count("klToBase") == 1


def test_run_without_general_text_has_the_distance_to_the_base_alone(
    make_later_config: MakeConfig, make_stage: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    report = succeeded(
        run_task(make_later_config("Train", stage=make_stage(0, 0, 1)), NeverAsked())
    )
    assert report.train is not None
    assert report.train.initial_general_loss is None
    assert report.train.general_loss is None
    assert kl_of(report) > 0
    (meters,) = [line for line in lines(tmp_path) if line["kind"] == "Meters"]
    assert "generalLoss" not in meters
    assert meters["klToBase"] == kl_of(report)


def test_stage_that_is_done_and_asked_to_leave_skips_its_meters(run: RunTask) -> None:
    # 8 steps of 2 micro-batches, 3 validations of 4 and the base's general text come before.
    report = succeeded(run(0, {}, stop=AfterChecks(8 * 2 + 3 * 4 + 3)))
    assert report.train is not None
    assert report.train.initial_general_loss is not None
    assert report.train.kl_to_base is None


def test_generated_text_is_the_same_for_the_same_seed(
    make_stage_config: MakeConfig, tmp_path: Path
) -> None:
    digests = {}
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        config = make_stage_config(
            run_directory=str(tmp_path / name), protection=EVERYTHING, training={"seed": seed}
        )
        report, code = run_task(config, NeverAsked())
        assert code is TrainerExitCode.SUCCEEDED, report.failure
        assert report.facts is not None
        assert report.facts.data.replay_tokens in (399, 400)
        rows = RowReader(rows_path(tmp_path / name / "prepare" / "data", Split.REPLAY))
        digests[name] = str([list(row.input_ids) for row in rows])
    assert digests["a"] == digests["b"] != digests["c"]


def test_text_sampled_in_another_number_format_is_other_data(
    make_stage_config: MakeConfig,
) -> None:
    """The same attempt's text is used again, and that of another precision is not."""
    digests = []
    for attempt, precision in enumerate(("FP32", "FP32", "BF16"), start=1):
        training = {"precision": precision}
        config = make_stage_config(protection=EVERYTHING, training=training, attempt=attempt)
        report, code = run_task(config, NeverAsked())
        assert code is TrainerExitCode.SUCCEEDED, report.failure
        assert report.facts is not None
        digests.append(report.facts.data.digest)
    assert digests[0] == digests[1] != digests[2]


def test_text_on_which_forgetting_is_measured_is_not_replayed_under_another_name(
    make_stage_config: MakeConfig, tmp_path: Path, save_jsonl: Callable[..., Path]
) -> None:
    save_jsonl(tmp_path / "general.jsonl", [{"text": text} for text in SENTENCES])
    shutil.copy(tmp_path / "general.jsonl", tmp_path / "copy.jsonl")
    config = make_stage_config(
        evaluation={"generalText": {"source": "file://./general.jsonl"}},
        protection={"replay": {"ratio": 0.5, "source": "file://./copy.jsonl"}},
    )
    report, code = run_task(config, NeverAsked())
    assert code is TrainerExitCode.USER_ERROR
    assert report.failure is not None
    assert report.failure.failure_class is FailureClass.USER_ERROR
    assert "spec.protection.replay.source" in report.failure.message
    assert "copy.jsonl is a file of spec.evaluation.generalText too" in report.failure.message
