"""What the runner decides before and between processes; none is started here."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fake_cluster import FACTS
from manifest_cases import edited
from stagetune.manifest_file import read_manifest_file
from stagetune.run_lock import RunIsBusyError, locked
from stagetune.run_record import changed_fields
from stagetune.status_board import StatusBoard
from stagetune_api import names
from stagetune_api.names import RunLayout
from stagetune_api.problems import InvalidManifestError, Problem, ProblemReason
from stagetune_api.report import CheckpointRef, Outcome, StageReport, StopReason, TrainResult
from stagetune_api.spec import StagedFineTune
from stagetune_api.status import ConditionReason, ConditionStatus, ConditionType, RunState
from stagetune_api.validation import parse_manifest
from stagetune_operator.plan import Plan, make_plan

WriteManifest = Callable[..., Path]


@pytest.fixture
def planned_run(write_manifest: WriteManifest, tmp_path: Path) -> RunLayout:
    layout = RunLayout(tmp_path / "run")
    layout.root.mkdir()
    manifest = read_manifest_file(write_manifest()).manifest
    (layout.root / names.RUN_MANIFEST_FILE).write_text(manifest.model_dump_json())
    layout.plan.write_text("{}")
    return layout


def test_how_often_to_save_may_change_at_any_time(
    planned_run: RunLayout, write_manifest: WriteManifest
) -> None:
    manifest = read_manifest_file(
        write_manifest(training={"checkpointIntervalSeconds": 77})
    ).manifest
    assert changed_fields(manifest, planned_run) == []


def test_every_changed_field_is_named_with_both_values(
    planned_run: RunLayout, write_manifest: WriteManifest
) -> None:
    manifest = read_manifest_file(
        write_manifest(method={"type": "LoRA"}, dataset={"maxLength": 32})
    ).manifest
    problems = changed_fields(manifest, planned_run)
    assert [problem.path for problem in problems] == [
        "spec.dataset.maxLength",
        "spec.method.type",
    ]
    assert "is 32, and was 64" in problems[0].message


def test_damaged_record_of_a_planned_run_is_refused_by_name(
    planned_run: RunLayout, write_manifest: WriteManifest
) -> None:
    path = planned_run.root / names.RUN_MANIFEST_FILE
    path.write_text(path.read_text()[:-20])
    with pytest.raises(InvalidManifestError) as caught:
        changed_fields(read_manifest_file(write_manifest()).manifest, planned_run)
    assert caught.value.problems[0].path == str(path)
    assert "another metadata.name" in str(caught.value)


def test_damaged_status_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text('{"state": "Trai')
    board = StatusBoard(path, on_change=lambda status: None)
    board.passed(ConditionType.VALIDATED, ConditionReason.VALID)
    assert json.loads(path.read_text())["conditions"][0]["reason"] == "Valid"


def test_refused_plan_is_shown_in_the_status(tmp_path: Path) -> None:
    board = StatusBoard(tmp_path / "status.json", on_change=lambda status: None)
    problem = Problem(
        path="spec.schedule.head", reason=ProblemReason.DOES_NOT_FIT, message="is too large"
    )
    board.refused([problem])
    assert board.status.state is RunState.FAILED
    conditions = {condition.type: condition for condition in board.status.conditions}
    assert conditions[ConditionType.PLANNED].status is ConditionStatus.FALSE
    assert conditions[ConditionType.STALLED].status is ConditionStatus.TRUE
    assert conditions[ConditionType.STALLED].reason == "DoesNotFit"
    assert "spec.schedule.head: is too large" in conditions[ConditionType.STALLED].message


def test_stage_that_is_done_again_is_shown_as_planned(tmp_path: Path) -> None:
    board = StatusBoard(tmp_path / "status.json", on_change=lambda status: None)
    manifest = parse_manifest(edited({"spec.schedule": {"layersPerStage": 2, "openTop": 1}}))
    assert isinstance(manifest, StagedFineTune)
    plan = make_plan(manifest.spec, FACTS)
    assert isinstance(plan, Plan)
    board.planned(plan.stages, plan_digest=plan.digest, model_digest="", data_digest="")
    before = board.status.stages[0]
    assert (before.layers, before.top_layers) == (plan.stages[0].layers, plan.stages[0].top_layers)
    assert before.top_layers is not None

    board.stage_done(0, report_of_a_stage(stopped_by=StopReason.PATIENCE))
    assert board.status.stages[0].stopped_by is StopReason.PATIENCE
    board.stage_reset(0)

    again = board.status.stages[0]
    assert (again.stopped_by, again.measured, again.checkpoint) == (None, None, None)


def report_of_a_stage(*, stopped_by: StopReason) -> StageReport:
    return StageReport(
        name="layers-0-1",
        attempt=1,
        outcome=Outcome.SUCCEEDED,
        output=CheckpointRef(path="x", digest="d" * 64, step=1),
        train=TrainResult(
            steps=1,
            planned_steps=2,
            stopped_early=True,
            stopped_by=stopped_by,
            best_step=1,
            loss=1.0,
            initial_validation_loss=2.0,
            validation_loss=1.0,
            trainable_parameters=1,
            tokens=1,
            tokens_per_second=1.0,
            train_seconds=1.0,
        ),
    )


def test_waiting_for_the_lock_ends_when_asked_to(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    said: list[str] = []
    with (
        locked(path, wait_seconds=0, on_wait=said.append),
        pytest.raises(RunIsBusyError),
        locked(path, wait_seconds=3600, on_wait=said.append, gives_up=lambda: bool(said)),
    ):
        pass
    assert len(said) == 1
    assert "waiting for another process" in said[0]
