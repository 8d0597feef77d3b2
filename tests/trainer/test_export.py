"""The Export task: what it needs, and what it leaves of a run with `retain: Result`."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stagetune_api import names
from stagetune_api.artifact import ArtifactKind, verify_artifact
from stagetune_api.names import TrainerExitCode
from stagetune_api.report import StageReport
from stagetune_api.stage import StageConfig
from stagetune_trainer import retention
from stagetune_trainer.run import run_task
from stop_requests import AfterChecks

MakeConfig = Callable[..., StageConfig]
Export = Callable[..., StageReport]


@pytest.fixture
def export(
    make_later_config: MakeConfig,
    make_stage: Callable[..., dict[str, Any]],
    never: Any,
    tmp_path: Path,
) -> Export:
    """`export(retain)` of a run of one stage, which was interrupted once and has a checkpoint."""
    config = make_later_config("Train", stage=make_stage(0, 0, 1))
    assert run_task(config, AfterChecks(9))[1] is TrainerExitCode.INTERRUPTED
    stage, code = run_task(config, never)
    assert code is TrainerExitCode.SUCCEEDED
    assert list((tmp_path / "run/stages/01-layers-0-1/checkpoints").iterdir())

    def run(retain: str) -> StageReport:
        config = make_later_config(
            "Export", chain=[stage], stages=[make_stage(0, 0, 1)], retain=retain
        )
        report, code = run_task(config, never)
        assert code is TrainerExitCode.SUCCEEDED, report.failure
        return report

    return run


def files(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("retain", ["Everything", "Nothing"])
def test_everything_stays_unless_told_otherwise(
    retain: str, export: Export, tmp_path: Path
) -> None:
    before = files(tmp_path / "run")
    export(retain)
    assert files(tmp_path / "run") >= before


def test_result_keeps_what_gives_the_export_again(export: Export, tmp_path: Path) -> None:
    before = files(tmp_path / "run")
    first = export("Result")
    gone = before - files(tmp_path / "run")
    assert {name.split("/step-")[0] for name in gone} == {
        "cache/teacher-validation/manifest.json",
        "cache/teacher-validation/teacher.safetensors",
        "prepare/data/manifest.json",
        "prepare/data/train/rows.arrow",
        "prepare/data/validation/rows.arrow",
        "stages/01-layers-0-1/checkpoints",
    }
    assert first.output is not None
    again = export("Result")
    assert again.output is not None
    assert again.output.digest == first.output.digest
    shutil.rmtree(tmp_path / "run" / "export")
    anew = export("Result")
    assert anew.output is not None
    assert anew.output.digest == first.output.digest
    verify_artifact(tmp_path / "run" / "export", digest=anew.output.digest)


def test_removal_that_was_interrupted_is_done_again(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = names.RunLayout(tmp_path / "run")
    checkpoints = layout.stage("01-layers-0-1").checkpoints

    class Killed(BaseException):
        pass

    def kill(path: Path) -> None:
        next(path.rglob("*.safetensors")).unlink()
        raise Killed

    monkeypatch.setattr(retention, "rmtree", kill)
    with pytest.raises(Killed):
        export("Result")
    monkeypatch.undo()
    # The export is whole, and nothing half-removed looks like something damaged.
    verify_artifact(layout.export, kind=ArtifactKind.EXPORT)
    verify_artifact(layout.data, kind=ArtifactKind.DATASET)
    assert not checkpoints.exists()
    export("Result")
    left = files(tmp_path / "run")
    assert not [name for name in left if "step-" in name or name.startswith("prepare/data/")]


def test_what_cannot_be_removed_does_not_fail_the_export(
    export: Export, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(retention, "rmtree", busy)
    export("Result")
    assert "could not be removed" in caplog.text
