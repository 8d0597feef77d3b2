"""What the commands print, to whom, and how they exit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from manifest_cases import EXAMPLES
from stagetune.__main__ import main
from stagetune.display import PlainDisplay
from stagetune.local_run import RunInterruptedError, run_locally
from stagetune.manifest_file import ManifestFile, read_manifest_file
from stagetune.run_record import changed_fields
from stagetune_api.names import RUN_MANIFEST_FILE, ExitCode, RunLayout
from stagetune_api.problems import InvalidManifestError
from stagetune_api.status import format_duration

WriteManifest = Callable[..., Path]
QWEN = ["examples/qwen2.5-7b-finance.yaml"]
QWEN_FACTS = [
    "--model-config",
    "examples/qwen2.5-7b-instruct.config.json",
    "--rows",
    "5000",
    "--tokens-per-row",
    "200",
]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.chdir(pytestconfig.rootpath)


def test_validate_says_all_that_is_wrong_with_lines_and_cures(
    write_manifest: WriteManifest, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(
        training={"batchSize": 5, "microBatchSize": 2, "typo": 1},
        serve={"replicas": 1},
        schedule={"layersPerStage": 1},
    )
    assert main(["validate", str(manifest)]) == ExitCode.INVALID
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 4
    text = manifest.read_text().splitlines()
    typo_line = next(i for i, line in enumerate(text, 1) if "typo" in line)
    assert f"spec.training.typo (line {typo_line}): UnknownField: there is no such field" in (
        captured.err
    )
    assert "spec.serve" in captured.err
    assert "NotYetSupported" in captured.err
    assert "spec.training.microBatchSize" in captured.err
    assert "spec.schedule.layersPerStage" in captured.err


def test_validate_accepts_every_example_for_its_runner(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(EXAMPLES) >= 2
    for example in EXAMPLES:
        on_cluster = read_manifest_file(example).manifest.spec.storage is not None
        runner, other = ("cluster", "local") if on_cluster else ("local", "cluster")
        assert main(["validate", str(example)]) == ExitCode.DONE
        assert main(["validate", str(example), "--runner", runner]) == ExitCode.DONE
        assert main(["validate", str(example), "--runner", other]) == ExitCode.INVALID
    output = capsys.readouterr().out
    assert output.count(" is valid.") == output.count(" is valid for ") == len(EXAMPLES)


@pytest.mark.parametrize(
    ("runner", "expected"),
    [
        (["--runner", "cluster"], "is valid for cluster runs."),
        ([], "is valid."),
    ],
)
def test_validate_accepts_a_cluster_manifest_for_a_cluster(
    runner: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", *QWEN, *runner]) == ExitCode.DONE
    assert expected in capsys.readouterr().out


def test_validate_says_what_keeps_a_manifest_from_one_machine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["validate", *QWEN, "--runner", "local"]) == ExitCode.INVALID
    captured = capsys.readouterr()
    assert captured.out == ""
    text = Path(QWEN[0]).read_text().splitlines()
    line = next(number for number, text in enumerate(text, 1) if "source: pvc://" in text)
    assert captured.err == (
        f"spec.dataset.source (line {line}): Conflict: pvc://datasets/finance.jsonl is a claim on "
        "a cluster; use file://, hf:// or ms:// here\n"
    )


def test_validate_says_what_keeps_a_manifest_from_a_cluster(
    write_manifest: WriteManifest, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = str(write_manifest())
    assert main(["validate", manifest]) == ExitCode.DONE
    assert main(["validate", manifest, "--runner", "local"]) == ExitCode.DONE
    assert "is valid for local runs." in capsys.readouterr().out
    assert main(["validate", manifest, "--runner", "cluster"]) == ExitCode.INVALID
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == [
        "spec.model.source",
        "spec.dataset.source",
        "spec.evaluation.generalText.source",
        "spec.storage",
    ]


def test_validate_says_first_what_is_wrong_everywhere(
    write_manifest: WriteManifest, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = str(write_manifest(training={"batchSize": 5, "microBatchSize": 2}, storage={}))
    assert main(["validate", manifest, "--runner", "cluster"]) == ExitCode.INVALID
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == [
        "spec.training.microBatchSize",
        "spec.storage.size",
    ]


def test_runner_is_cluster_or_local(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["validate", *QWEN, "--runner", "Cluster"])
    assert caught.value.code == ExitCode.INVALID
    assert "cluster" in capsys.readouterr().err


def test_run_refuses_what_only_a_cluster_can_run_before_it_writes(
    write_manifest: WriteManifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(
        model={"source": "pvc://models/base"},
        dataset={"source": "pvc://rows/rows.jsonl"},
        suspend=True,
    )
    directory = tmp_path / "runs" / "tiny"
    assert main(["run", str(manifest), "--run-dir", str(directory)]) == ExitCode.INVALID
    errors = capsys.readouterr().err.splitlines()
    text = manifest.read_text().splitlines()
    assert [line.split(":")[0] for line in errors] == [
        f"{path} (line {next(n for n, text in enumerate(text, 1) if value in text)})"
        for path, value in (
            ("spec.model.source", "pvc://models/base"),
            ("spec.dataset.source", "pvc://rows/rows.jsonl"),
            ("spec.suspend", "suspend"),
        )
    ]
    assert not directory.parent.exists()


def test_run_from_python_refuses_the_same(write_manifest: WriteManifest, tmp_path: Path) -> None:
    file = read_manifest_file(write_manifest(suspend=True))
    by_hand = ManifestFile(path=file.path, manifest=file.manifest)
    with pytest.raises(InvalidManifestError) as caught:
        run_locally(by_hand, tmp_path / "run")
    assert [problem.path for problem in caught.value.problems] == ["spec.suspend"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ""),
        (
            {"runtime": {"queueName": "team-a"}, "storage": {"size": "1Gi"}},
            "On clusters only, without effect here: spec.runtime, spec.storage.\n",
        ),
        (
            {"retry": {"number": 1}},
            "On clusters only, without effect here: spec.retry.\n",
        ),
        ({"runtime": {"engine": "DeepSpeed", "deepspeed": {"zeroStage": 3}}}, ""),
    ],
)
def test_run_says_which_sections_count_on_clusters_only(
    changes: dict[str, Any],
    expected: str,
    write_manifest: WriteManifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    begun = []

    def begin(*arguments: object) -> Path:
        begun.append(arguments)
        raise RunInterruptedError("nothing was at work")

    # The first thing that a run does once nothing speaks against it.
    monkeypatch.setattr("stagetune.local_run._Run.to_its_end", begin)
    manifest = str(write_manifest(**changes))
    code = main(["run", manifest, "--run-dir", str(tmp_path / "run")])
    assert (code, len(begun)) == (ExitCode.INTERRUPTED, 1)
    assert capsys.readouterr().out == expected


def test_what_counts_on_clusters_only_may_change_in_a_planned_run(
    write_manifest: WriteManifest, tmp_path: Path
) -> None:
    layout = RunLayout(tmp_path / "run")
    layout.root.mkdir()
    before = read_manifest_file(write_manifest(runtime={"maxRetries": 1})).manifest
    (layout.root / RUN_MANIFEST_FILE).write_text(before.model_dump_json(exclude_none=True))
    layout.plan.write_text("{}")
    on_clusters: dict[str, Any] = {
        "runtime": {"maxRetries": 2, "resources": {"limits": {"nvidia.com/gpu": 1}}},
        "storage": {"claimName": "runs"},
        "retry": {"number": 1},
        "suspend": True,
    }
    after = read_manifest_file(write_manifest(**on_clusters)).manifest
    assert changed_fields(after, layout) == []
    after = read_manifest_file(write_manifest(**on_clusters, export={"dtype": "FP32"})).manifest
    assert [problem.path for problem in changed_fields(after, layout)] == ["spec.export.dtype"]


def test_status_of_a_cluster_shows_stages_that_wait(
    tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = YAML(typ="safe").load(pytestconfig.rootpath / "tests/data/golden/status.yaml")
    golden["stages"][1]["state"] = "Queued"
    RunLayout(tmp_path).status.write_text(json.dumps(golden))
    assert main(["status", str(tmp_path)]) == ExitCode.DONE
    assert "Queued" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "is not YAML at line"),
        ("kind: Job\n", "holds 0 documents of kind StagedFineTune"),
        ("kind: StagedFineTune\n---\nkind: StagedFineTune\n", "holds 2 documents"),
        ("a: 1\na: 2\n", "is not YAML"),
        ("- 1\n- 2\n", "holds 0 documents"),
    ],
)
def test_file_that_is_no_manifest_is_refused_by_name(
    text: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "manifest.yaml"
    path.write_text(text)
    with pytest.raises(InvalidManifestError) as caught:
        read_manifest_file(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_missing_file_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "nowhere.yaml"]) == ExitCode.INVALID
    assert "nowhere.yaml" in capsys.readouterr().err


def test_learning_rate_is_a_number_as_kubectl_reads_it(
    write_manifest: WriteManifest, tmp_path: Path
) -> None:
    manifest = write_manifest()
    text = manifest.read_text().replace("learningRate: 0.003", "learningRate: 3e-3")
    assert "3e-3" in text
    manifest.write_text(text)
    assert read_manifest_file(manifest).manifest.spec.training.learning_rate == 3e-3


def test_plan_shows_every_stage_of_a_model_known_by_its_config_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", *QWEN, *QWEN_FACTS]) == ExitCode.DONE
    output = capsys.readouterr().out
    for name in ("layers-0-3", "layers-12-15", "layers-24-27"):
        assert name in output
    assert "Assumed: 5000 rows (given)" in output


def test_plan_as_json_and_yaml_is_the_same_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *QWEN, *QWEN_FACTS, "-o", "json"]) == ExitCode.DONE
    as_json = json.loads(capsys.readouterr().out)
    assert main(["plan", *QWEN, *QWEN_FACTS, "-o", "yaml"]) == ExitCode.DONE
    as_yaml = YAML(typ="safe", pure=True).load(capsys.readouterr().out)
    assert as_json == as_yaml
    assert len(as_json["stages"]) == 7


def test_plan_says_how_many_blocks_are_added(
    write_manifest: WriteManifest, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    method = {"type": "Expand", "expand": {"layersPerBlock": 1}}
    run_directory = str(tmp_path / "none")
    assert main(["plan", str(write_manifest()), "--run-dir", run_directory]) == ExitCode.DONE
    assert "added" not in capsys.readouterr().out
    manifest = str(write_manifest(method=method))
    assert main(["plan", manifest, "--run-dir", run_directory]) == ExitCode.DONE
    assert "in 4 layers and 0 M in 4 blocks that are added" in capsys.readouterr().out


def test_plan_says_everything_that_it_has_to_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *QWEN]) == ExitCode.INVALID
    errors = capsys.readouterr().err
    assert "--model-config" in errors
    assert "--rows" in errors


def test_plan_of_local_files_counts_them(
    write_manifest: WriteManifest, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["plan", str(write_manifest()), "--run-dir", str(tmp_path / "none")]
    assert main([*arguments, "-o", "json"]) == ExitCode.DONE
    plan = json.loads(capsys.readouterr().out)
    assert plan["summary"]["trainRows"] == 32
    assert [stage["name"] for stage in plan["stages"]] == ["layers-0-1", "layers-2-3"]


def test_status_of_no_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == ExitCode.FAILED
    assert "There is no run in" in capsys.readouterr().err


def test_status_as_json_is_the_status_on_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from stagetune.status_board import StatusBoard
    from stagetune_api.status import ConditionReason, RunState

    board = StatusBoard(RunLayout(tmp_path).status, on_change=lambda status: None)
    board.enter(RunState.PREPARING, ConditionReason.PREPARING)
    assert main(["status", str(tmp_path), "-o", "json"]) == ExitCode.DONE
    shown = json.loads(capsys.readouterr().out)
    assert shown["state"] == "Preparing"
    assert shown == json.loads(RunLayout(tmp_path).status.read_text())
    assert main(["status", str(tmp_path)]) == ExitCode.DONE
    assert "Preparing" in capsys.readouterr().out


def test_plain_display_says_where_in_the_run_a_line_belongs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rich.console import Console

    from stagetune_api.progress import Progress, ProgressKind
    from stagetune_api.stage import Task
    from stagetune_api.status import StagedFineTuneStatus

    with PlainDisplay(Console(width=200)) as listeners:
        listeners.on_status(StagedFineTuneStatus(stage="2/4 layers-8-15"))
        progress = Progress(
            kind=ProgressKind.STEP,
            task=Task.TRAIN,
            name="layers-8-15",
            attempt=1,
            time="2026-01-01T00:00:00Z",
            step=3,
            total_steps=10,
            loss=1.25,
            tokens_per_second=99.6,
            eta_seconds=75,
        )
        listeners.on_progress(progress)
    assert capsys.readouterr().out == (
        "2/4 layers-8-15: step 3/10 loss 1.2500 100 tokens/s ETA 1m15s\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (60, "1m00s"), (3725, "1h02m")]
)
def test_durations_are_written_as_people_write_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_help_and_wrong_usage_exit_as_usual(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    with pytest.raises(SystemExit) as caught:
        main(["plan", *QWEN, "--rows", "0"])
    assert caught.value.code == 2
    assert "0 is below 1" in capsys.readouterr().err
