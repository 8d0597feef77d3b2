"""Whole runs through the reconciler, against a cluster in memory: every transition, every fault."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest

from fake_cluster import (
    FACTS,
    CrashError,
    Ending,
    Script,
    fails,
    report_for,
    succeeds,
)
from fake_operator import (
    CLUSTER,
    STAGES,
    TASKS,
    Operator,
    Posted,
    begun,
    first_stage_runs,
)
from manifest_cases import edited
from stagetune_api import names
from stagetune_api.facts import GradientFacts
from stagetune_api.names import TrainerExitCode
from stagetune_api.report import AveragingResult, FailureClass, Timings
from stagetune_api.stage import StageConfig, Task
from stagetune_api.status import StagedFineTuneStatus
from stagetune_api.training_spec import LayerRange
from stagetune_operator.records import read_status
from stagetune_operator.views import Object


def conditions(status: StagedFineTuneStatus) -> dict[str, str]:
    return {item.type.value: item.status.value for item in status.conditions}


def once(script: Script) -> Script:
    """Return a script that is followed once and succeeds from then on."""
    used: list[str] = []

    def first(config: StageConfig, pod: Object) -> Ending:
        if used:
            return succeeds(config, pod)
        used.append("once")
        return script(config, pod)

    return first


def test_run_goes_from_its_manifest_to_its_export_one_job_after_the_other() -> None:
    operator = begun()
    status = operator.finish()
    assert operator.jobs == [f"finance-qa-{task}" for task in TASKS]
    assert status.state == "Succeeded"
    assert status.progress == "100%"
    assert [stage.state for stage in status.stages] == ["Succeeded", "Succeeded"]
    assert conditions(status) == {
        "Ready": "True",
        "Succeeded": "True",
        "Reconciling": "False",
        "Stalled": "False",
        "Suspended": "False",
        "Finished": "True",
        "Validated": "True",
        "Prepared": "True",
        "Planned": "True",
        "Trained": "True",
        "Evaluated": "True",
        "Exported": "True",
    }
    assert [event[1] for event in operator.cluster.events] == [
        *("Prepared", "Planned", "Trained", "Trained", "Evaluated", "Exported", "Completed"),
    ]


def test_each_stage_goes_on_from_the_verified_outputs_before_it() -> None:
    operator = begun()
    operator.finish()
    files = {
        job["metadata"]["labels"][names.LABEL_TASK]: StageConfig.model_validate_json(
            job["spec"]["template"]["metadata"]["annotations"][names.ANNOTATION_STAGE_CONFIG]
        )
        for job in operator.cluster.of_kind("Job")
    }
    first, second = (files[task] for task in STAGES)
    assert first.chain == []
    assert [parent.digest for parent in second.chain] == [report_for(first).output.digest]  # type: ignore[union-attr]
    assert second.chain[0].path.endswith("/stages/01-layers-0-1/output")
    assert len(files["export"].chain) == 2
    assert files["export"].model_digest == "a" * 64


def test_export_is_given_the_share_that_evaluate_chose() -> None:
    operator = begun({"spec.protection": {"averaging": {}}})
    given: dict[str, float | None] = {}

    def script(config: StageConfig, pod: Object) -> Ending:
        report = report_for(config)
        given[config.task.value] = config.averaging_alpha
        if report.evaluation is not None:
            chosen = AveragingResult(alphas=[0, 0.6], validation_losses=[2, 1], chosen=0.6)
            evaluation = report.evaluation.model_copy(update={"averaging": chosen})
            report = report.model_copy(update={"evaluation": evaluation})
        return Ending(message=report.termination_message())

    status = operator.finish(script, restarts=True)
    assert status.state.value == "Succeeded"
    assert given == {"Prepare": None, "Train": None, "Evaluate": None, "Export": 0.6}
    assert status.evaluation is not None
    assert status.evaluation.averaging is not None
    assert status.evaluation.averaging.chosen == 0.6


def test_evaluation_that_is_lost_is_made_again_before_the_export() -> None:
    """A hand, or an older version, has taken the share out of the status."""
    operator = begun({"spec.protection": {"averaging": {}}})
    orders: list[str] = []

    def script(config: StageConfig, pod: Object) -> Ending:
        orders.append(config.task.value)
        report = report_for(config)
        if report.evaluation is not None and orders.count("Evaluate") > 1:
            chosen = AveragingResult(alphas=[0.6], validation_losses=[1], chosen=0.6)
            evaluation = report.evaluation.model_copy(update={"averaging": chosen})
            report = report.model_copy(update={"evaluation": evaluation})
        return Ending(message=report.termination_message())

    status = operator.finish(script)
    assert status.state.value == "Succeeded"
    assert orders[-3:] == ["Evaluate", "Evaluate", "Export"]


def test_gpu_is_taken_by_stages_alone() -> None:
    operator = begun()
    operator.finish()
    limits = {
        job["metadata"]["labels"][names.LABEL_TASK]: job["spec"]["template"]["spec"]["containers"][
            0
        ]["resources"]["limits"]
        for job in operator.cluster.of_kind("Job")
    }
    assert limits["prepare"] == {"memory": "8Gi"}
    assert limits["export"] == {"memory": "8Gi"}
    assert limits[STAGES[0]] == {"nvidia.com/gpu": "1", "memory": "8Gi"}


def test_operator_that_is_replaced_between_any_two_passes_changes_nothing() -> None:
    unbroken, restarted = begun(), begun()
    expected = unbroken.finish()
    assert restarted.finish(restarts=True) == expected
    assert restarted.jobs == unbroken.jobs
    assert restarted.cluster.writes == unbroken.cluster.writes


def _timeless(status: StagedFineTuneStatus) -> StagedFineTuneStatus:
    """Return `status` without what the fake cluster's clock makes of one more call."""
    blank = {"queued_seconds": None, "gpu_seconds": None}
    stages = [stage.model_copy(update=blank) for stage in status.stages]
    return status.model_copy(update={"stages": stages})


def _num_writes() -> int:
    operator = begun()
    operator.finish()
    return len(operator.cluster.writes)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_operator_killed_at_any_write_leaves_the_same_end(after: bool) -> None:
    expected = begun()
    end = expected.finish()
    for number in range(1, _num_writes() + 1):
        operator = begun()
        operator.cluster.crash_at = number
        operator.cluster.crash_after = after
        assert _timeless(operator.finish()) == _timeless(end), f"killed at write {number}"
        assert operator.jobs == expected.jobs, f"killed at write {number}"
        # Beside the write that is done again, nothing is done twice but events, which may be lost.
        assert len(operator.cluster.writes) <= len(expected.cluster.writes) + 3


def test_finished_run_is_inert() -> None:
    operator = begun()
    operator.finish()
    writes = len(operator.cluster.writes)
    for job in operator.cluster.of_kind("Job"):
        del operator.cluster.objects["Job", job["metadata"]["name"]]
    operator.restart()
    operator.settle()
    assert len(operator.cluster.writes) == writes


def test_edit_of_a_finished_run_moves_the_observed_generation_and_nothing_else() -> None:
    operator = begun()
    before = operator.finish()
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(suspend=True))
    operator.settle()
    assert operator.status.observed_generation == 2
    assert all(item.observed_generation == 2 for item in operator.status.conditions)
    assert operator.status.state == before.state


@pytest.mark.parametrize(
    ("failure_class", "code"),
    [
        (FailureClass.USER_ERROR, TrainerExitCode.USER_ERROR),
        (FailureClass.DIVERGED, TrainerExitCode.DIVERGED),
        (FailureClass.STORAGE_FULL, TrainerExitCode.STORAGE_FULL),
    ],
)
def test_what_another_attempt_would_repeat_is_not_tried_again(
    failure_class: FailureClass, code: TrainerExitCode
) -> None:
    operator = begun()
    status = operator.finish({STAGES[0]: fails(failure_class, code, "row 7 is wrong")})
    assert operator.jobs == ["finance-qa-prepare", f"finance-qa-{STAGES[0]}"]
    assert status.state == "Failed"
    assert conditions(status)["Stalled"] == "True"
    assert conditions(status)["Finished"] == "True"
    failure = status.stages[0].last_failure
    assert failure is not None
    assert (failure.failure_class, failure.exit_code, failure.message) == (
        failure_class,
        int(code),
        "row 7 is wrong",
    )
    assert operator.observer.failures == [failure_class]


def test_failure_that_may_pass_is_tried_again_as_often_as_the_manifest_allows() -> None:
    operator = begun({"spec.runtime": {"maxRetries": 2}})
    status = operator.finish({STAGES[0]: fails(FailureClass.INTERNAL, TrainerExitCode.INTERNAL)})
    assert operator.jobs[1:] == [f"finance-qa-{STAGES[0]}{suffix}" for suffix in ("", "-2", "-3")]
    assert status.state == "Failed"
    assert status.stages[0].attempts == 3
    assert "attempt 3 of 3" in (status.stages[0].last_failure or pytest.fail("no failure")).message


def test_retry_waits_longer_each_time() -> None:
    operator = begun(retry_delay_seconds=10)
    operator.settle()
    operator.cluster.advance()
    operator.settle()
    operator.cluster.advance(fails(FailureClass.INTERNAL, TrainerExitCode.INTERNAL))
    assert operator.reconcile() == pytest.approx(10)
    assert operator.status.conditions[2].reason == "Retrying"
    operator.clock += 10
    operator.settle()
    operator.cluster.advance(fails(FailureClass.INTERNAL, TrainerExitCode.INTERNAL))
    assert operator.reconcile() == pytest.approx(20)


def test_out_of_memory_is_tried_again_with_half_the_micro_batch() -> None:
    operator = begun(
        {"spec.training": {"learningRate": 1e-4, "batchSize": 12, "microBatchSize": 6}}
    )
    sizes: list[int] = []

    def script(config: StageConfig, pod: Object) -> Ending:
        sizes.append(config.training.micro_batch_size)
        if config.training.micro_batch_size > 1:
            return Ending(exit_code=137, reason="OOMKilled")
        return succeeds(config, pod)

    status = operator.finish({STAGES[0]: script})
    assert sizes == [6, 3, 1]
    assert status.state == "Succeeded"
    assert [stage.micro_batch_size for stage in status.stages] == [1, None]


def test_out_of_memory_with_the_smallest_micro_batch_is_the_end_with_a_cure() -> None:
    operator = begun()

    def script(config: StageConfig, pod: Object) -> Ending:
        return Ending(exit_code=137, reason="OOMKilled")

    status = operator.finish({STAGES[0]: script})
    assert status.state == "Failed"
    failure = status.stages[0].last_failure
    assert failure is not None
    assert failure.failure_class is FailureClass.OUT_OF_MEMORY
    assert "as small as it can be" in failure.message


@pytest.mark.parametrize(
    "ending",
    [
        Ending(exit_code=137, is_disrupted=True, reason="Evicted"),
        Ending(exit_code=int(TrainerExitCode.INTERRUPTED)),
    ],
    ids=["evicted", "asked to stop"],
)
def test_disruptions_do_not_count_as_attempts(ending: Ending) -> None:
    operator = begun({"spec.runtime": {"maxRetries": 0}})
    left = [ending] * 3

    def script(config: StageConfig, pod: Object) -> Ending:
        return left.pop() if left else succeeds(config, pod)

    status = operator.finish({STAGES[0]: script})
    assert status.state == "Succeeded"
    assert (status.stages[0].attempts, status.stages[0].disruptions) == (1, 3)
    assert operator.jobs == [f"finance-qa-{task}" for task in TASKS]


def test_damaged_output_is_made_again_by_the_stage_that_made_it() -> None:
    operator = begun()
    blames_first = fails(
        FailureClass.STORAGE_ERROR,
        TrainerExitCode.STORAGE_ERROR,
        "model.safetensors is damaged",
        artifact="/stagetune/runs/x/stages/01-layers-0-1/output/model.safetensors",
    )
    status = operator.finish({STAGES[1]: once(blames_first)})
    assert operator.jobs == [
        "finance-qa-prepare",
        f"finance-qa-{STAGES[0]}",
        f"finance-qa-{STAGES[1]}",
        f"finance-qa-{STAGES[0]}-2",
        f"finance-qa-{STAGES[1]}-2",
        "finance-qa-evaluate",
        "finance-qa-export",
    ]
    assert status.state == "Succeeded"


def test_stage_made_again_with_another_result_is_followed_by_all_that_came_of_it() -> None:
    operator = begun()
    results = ["d" * 64, "e" * 64]

    def first_stage(config: StageConfig, pod: Object) -> Ending:
        report = report_for(config, digest=results.pop(0))
        return Ending(message=report.termination_message())

    blames_first = fails(
        FailureClass.STORAGE_ERROR,
        TrainerExitCode.STORAGE_ERROR,
        artifact="/stagetune/runs/x/stages/01-layers-0-1/output/model.safetensors",
    )
    status = operator.finish({STAGES[0]: first_stage, "evaluate": once(blames_first)})
    assert operator.jobs[-5:] == [
        "finance-qa-evaluate",
        f"finance-qa-{STAGES[0]}-2",
        f"finance-qa-{STAGES[1]}-2",
        "finance-qa-evaluate-2",
        "finance-qa-export",
    ]
    assert status.state == "Succeeded"


def test_damage_that_comes_again_is_not_repaired_for_ever() -> None:
    operator = begun({"spec.runtime": {"maxRetries": 2}})
    blames_first = fails(
        FailureClass.STORAGE_ERROR,
        TrainerExitCode.STORAGE_ERROR,
        artifact="/stagetune/runs/x/stages/01-layers-0-1/output/model.safetensors",
    )
    status = operator.finish({STAGES[1]: blames_first})
    assert status.state == "Failed"
    assert len(operator.jobs) < 10


def test_suspension_ends_the_job_and_resuming_makes_another_that_does_not_count() -> None:
    operator = begun({"spec.runtime": {"maxRetries": 0}})
    operator.settle()
    operator.cluster.advance()
    operator.settle()
    operator.cluster.start_pods()
    operator.settle()
    assert operator.status.state == "Training"
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(suspend=True))
    operator.settle()
    assert operator.status.state == "Suspended"
    assert conditions(operator.status)["Suspended"] == "True"
    assert operator.jobs == ["finance-qa-prepare"]
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(suspend=False))
    status = operator.finish()
    assert status.state == "Succeeded"
    assert operator.jobs[1:3] == [f"finance-qa-{STAGES[0]}-2", f"finance-qa-{STAGES[1]}"]


def test_run_that_is_applied_suspended_makes_nothing_until_it_is_resumed() -> None:
    operator = begun({"spec.suspend": True})
    operator.settle()
    assert operator.status.state == "Suspended"
    assert operator.cluster.of_kind("Job") == []
    assert operator.cluster.of_kind("PersistentVolumeClaim") == []
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(suspend=False))
    assert operator.finish().state == "Succeeded"


def test_order_begins_a_failed_run_again_where_it_failed() -> None:
    operator = begun({"spec.runtime": {"maxRetries": 0}})
    failed = operator.finish({STAGES[1]: fails(FailureClass.INTERNAL, TrainerExitCode.INTERNAL)})
    assert failed.state == "Failed"
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(retry={"number": 1}))
    status = operator.finish()
    assert status.state == "Succeeded"
    assert status.retry_number == 1
    assert operator.jobs[2:4] == [f"finance-qa-{STAGES[1]}", f"finance-qa-{STAGES[1]}-2"]


@pytest.mark.parametrize(
    ("retain", "first"),
    # With Result the export has removed the tokenised rows, which prepare makes once more.
    [("Everything", []), ("Result", ["finance-qa-prepare-2"])],
)
def test_order_with_a_stage_begins_a_finished_run_again_from_there(
    retain: str, first: list[str]
) -> None:
    operator = begun({"spec.storage": {"size": "10Gi", "retain": retain}})
    operator.finish()
    order = {"number": 3, "fromStage": "layers-0-1"}
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(retry=order))
    assert operator.finish().state == "Succeeded"
    assert operator.jobs[5:] == [
        *first,
        f"finance-qa-{STAGES[0]}-2",
        f"finance-qa-{STAGES[1]}-2",
        "finance-qa-evaluate-2",
        "finance-qa-export-2",
    ]
    writes = len(operator.cluster.writes)
    operator.restart()
    operator.settle()
    assert len(operator.cluster.writes) == writes


def test_order_for_a_stage_that_is_not_there_is_told_and_changes_nothing() -> None:
    operator = begun()
    operator.finish()
    order = {"number": 1, "fromStage": "layers-9-9"}
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(retry=order))
    operator.settle()
    status = operator.status
    assert status.state == "Succeeded"
    validated = next(item for item in status.conditions if item.type == "Validated")
    assert validated.status == "False"
    assert "layers-9-9" in validated.message
    assert "layers-0-1" in validated.message


def test_order_that_is_given_while_the_run_works_is_met_when_it_succeeds() -> None:
    operator = begun()
    operator.settle()
    order = {"number": 1, "fromStage": "layers-0-1"}
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(retry=order))
    assert operator.finish().state == "Succeeded"
    assert operator.jobs == [f"finance-qa-{task}" for task in TASKS]


def test_order_that_was_there_from_the_beginning_is_none() -> None:
    operator = begun({"spec.retry": {"number": 5, "fromStage": "layers-0-1"}})
    assert operator.finish().state == "Succeeded"
    assert len(operator.jobs) == len(TASKS)


EXPLICIT = [
    {"name": "lower", "layers": {"first": 0, "last": 1}, "epochs": 1.0},
    {"name": "upper", "layers": {"first": 2, "last": 3}, "epochs": 1.0},
]


def _with_first_stage_running() -> Operator:
    operator = begun({"spec.schedule": None, "spec.stages": copy.deepcopy(EXPLICIT)})
    operator.settle()
    operator.cluster.advance()
    operator.settle()
    operator.cluster.start_pods()
    operator.settle()
    return operator


def test_stage_that_has_not_started_can_be_edited() -> None:
    operator = _with_first_stage_running()
    before = operator.status

    def change(spec: Object) -> None:
        spec["stages"][1]["epochs"] = 3.0

    operator.cluster.edit_run("finance-qa", change)
    operator.settle()
    after = operator.status
    assert after.plan_digest != before.plan_digest
    assert after.stages[0] == before.stages[0]
    assert after.stages[1].total_steps == 3 * before.stages[1].total_steps
    assert operator.finish().state == "Succeeded"


def test_started_stage_that_is_edited_all_the_same_stops_the_run_until_it_is_undone() -> None:
    operator = _with_first_stage_running()

    def change(epochs: float) -> Callable[[Object], None]:
        return lambda spec: spec["stages"][0].update(epochs=epochs)

    operator.cluster.edit_run("finance-qa", change(2.0))
    operator.settle()
    assert conditions(operator.status)["Stalled"] == "True"
    assert "lower" in operator.status.conditions[0].message
    operator.cluster.edit_run("finance-qa", change(1.0))
    assert operator.finish().state == "Succeeded"
    assert operator.jobs == [
        f"finance-qa-{task}" for task in ("prepare", "01-lower", "02-upper", "evaluate", "export")
    ]


def test_run_that_is_stopped_by_an_edit_can_be_suspended() -> None:
    operator = _with_first_stage_running()

    def change(spec: Object) -> None:
        spec["stages"][0]["epochs"] = 2.0
        spec["suspend"] = True

    operator.cluster.edit_run("finance-qa", change)
    operator.settle()
    assert operator.jobs == ["finance-qa-prepare"]
    assert conditions(operator.status)["Stalled"] == "True"
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(suspend=False))
    operator.cluster.edit_run("finance-qa", lambda spec: spec["stages"][0].update(epochs=1.0))
    assert operator.finish().state == "Succeeded"


def test_wrong_manifest_makes_nothing_and_says_everything() -> None:
    operator = begun({"spec.storage": None, "spec.dataset.source": "file://rows.jsonl"})
    operator.settle()
    status = operator.status
    assert operator.cluster.writes == [("update", "StagedFineTune/status"), ("create", "Event")]
    assert conditions(status)["Validated"] == "False"
    assert conditions(status)["Stalled"] == "True"
    message = status.conditions[0].message
    assert "spec.storage" in message
    assert "spec.dataset.source" in message

    def correct(spec: Object) -> None:
        spec["storage"] = {"size": "1Gi"}
        spec["dataset"]["source"] = "pvc://rows/finance.jsonl"

    operator.cluster.edit_run("finance-qa", correct)
    assert operator.finish().state == "Succeeded"


def test_plan_that_cannot_be_made_is_told_and_can_be_corrected() -> None:
    operator = begun({"spec.schedule": {"layersPerStage": 9}})
    operator.finish()
    assert operator.jobs == ["finance-qa-prepare"]
    assert operator.status.state == "Failed"
    assert "layersPerStage" in operator.status.conditions[0].message
    operator.cluster.edit_run(
        "finance-qa", lambda spec: spec.update(schedule={"layersPerStage": 2})
    )
    assert operator.finish().state == "Succeeded"
    assert len(operator.jobs) == len(TASKS)


def test_data_that_is_edited_before_there_is_a_plan_is_prepared_again() -> None:
    operator = begun()
    operator.settle()
    operator.cluster.start_pods()

    def change(spec: Object) -> None:
        spec["dataset"]["maxLength"] = 128

    operator.cluster.edit_run("finance-qa", change)
    assert operator.finish().state == "Succeeded"
    assert operator.jobs[0] == "finance-qa-prepare-2"


def test_quota_is_shown_and_waited_for() -> None:
    operator = begun()
    operator.settle()
    operator.cluster.advance()
    operator.cluster.deny = lambda manifest: (
        "exceeded quota: gpus" if manifest["kind"] == "Job" else None
    )
    assert operator.reconcile() == pytest.approx(30)
    status = operator.status
    assert status.state == "Queued"
    reconciling = next(item for item in status.conditions if item.type == "Reconciling")
    assert reconciling.reason == "CannotCreate"
    assert "exceeded quota: gpus" in reconciling.message
    operator.cluster.deny = lambda manifest: None
    assert operator.finish().state == "Succeeded"
    assert len(operator.jobs) == len(TASKS)


def test_job_of_somebody_else_with_the_same_name_is_left_alone() -> None:
    operator = begun()
    foreign = {
        "kind": "Job",
        "metadata": {"name": "finance-qa-prepare", "namespace": "team-a"},
        "spec": {"suspend": True},
    }
    operator.cluster.objects["Job", "finance-qa-prepare"] = operator.cluster._stored(foreign)
    operator.reconcile()
    assert operator.status.conditions[0].reason == "NameConflict"
    assert "finance-qa-prepare" in operator.status.conditions[0].message
    del operator.cluster.objects["Job", "finance-qa-prepare"]
    assert operator.finish().state == "Succeeded"


def test_stale_watch_leads_to_no_second_job() -> None:
    operator = begun()
    operator.settle()
    old = list(copy.deepcopy(list(operator.cluster.objects.values())))
    operator.cluster.advance()
    operator.settle()
    jobs = operator.jobs
    operator.cluster.stale = [item for item in old if item["kind"] != "Job"]
    operator.restart()
    operator.settle()
    assert operator.jobs == jobs


def test_job_that_is_deleted_by_hand_is_made_again() -> None:
    operator = begun()
    operator.settle()
    operator.cluster.advance()
    operator.settle()
    del operator.cluster.objects["Job", f"finance-qa-{STAGES[0]}"]
    status = operator.finish()
    assert status.state == "Succeeded"
    assert status.stages[0].attempts == 2


def test_report_that_is_lost_is_asked_for_again() -> None:
    operator = begun()
    status = operator.finish({STAGES[0]: once(lambda config, pod: Ending(message="not a report"))})
    assert status.state == "Succeeded"
    assert status.stages[0].attempts == 2


def test_image_that_cannot_be_pulled_is_told_at_once_and_fails_in_the_end() -> None:
    operator = begun(image_patience_seconds=600)
    operator.settle()
    operator.cluster.start_pods()
    pod = next(item for (kind, _), item in operator.cluster.objects.items() if kind == "Pod")
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    pod["status"]["phase"] = "Pending"
    pod["status"]["containerStatuses"][0]["state"] = {"waiting": waiting}
    assert operator.reconcile() == pytest.approx(600)
    assert operator.status.conditions[0].reason == "ImageError"
    assert "no such image" in operator.status.conditions[0].message
    operator.clock += 600
    operator.settle()
    assert operator.status.state == "Failed"
    assert operator.cluster.of_kind("Job") == []


def test_queue_admits_jobs_by_ending_their_suspension() -> None:
    operator = begun({"spec.runtime": {"queueName": "team-a"}})
    operator.settle()
    (job,) = operator.cluster.of_kind("Job")
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"][names.LABEL_QUEUE] == "team-a"
    assert operator.status.state == "Queued"
    assert "team-a" in operator.status.conditions[0].message
    operator.cluster.objects["Job", "finance-qa-prepare"]["spec"]["suspend"] = False
    operator.cluster.start_pods()
    operator.settle()
    assert operator.status.state == "Preparing"


def test_last_post_of_a_pod_that_is_suspended_is_kept() -> None:
    operator = first_stage_runs()
    operator.cluster.keep_deleted = True
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(suspend=True))
    operator.settle()
    pod = operator.cluster.of_kind("Pod")[-1]
    operator.progress = {STAGES[0]: Posted(pod["metadata"]["uid"], 7)}
    operator.clock += 100
    operator.settle()
    assert operator.status.stages[0].step == 7


def test_progress_is_shown_but_not_written_with_every_post() -> None:
    operator = begun(progress_status_seconds=30)
    operator.settle()
    operator.cluster.advance()
    operator.settle()
    operator.cluster.start_pods()
    operator.settle()
    pod = operator.cluster.of_kind("Pod")[-1]
    writes = len(operator.cluster.writes)
    operator.progress = {STAGES[0]: Posted(pod["metadata"]["uid"], 1)}
    assert operator.reconcile() == pytest.approx(30)
    assert len(operator.cluster.writes) == writes
    operator.clock += 30
    operator.reconcile()
    status = operator.status
    assert status.stages[0].step == 1
    assert (status.loss, status.eta, status.stage) == ("2.5000", "1m01s", "1/2 layers-0-1")
    assert len(operator.cluster.writes) == writes + 1
    operator.progress = {STAGES[0]: Posted("another pod", 3)}
    operator.clock += 30
    operator.settle()
    assert operator.status.stages[0].step == 1


def test_operator_writes_at_most_eight_times_for_a_stage() -> None:
    short, long = begun(), begun({"spec.schedule": {"layersPerStage": 1}})
    short.finish()
    long.finish()
    for_two_stages = len(long.cluster.writes) - len(short.cluster.writes)
    assert for_two_stages / 2 <= 8


def test_deleted_run_is_left_alone() -> None:
    operator = begun()
    operator.settle()
    run = operator.cluster.objects["StagedFineTune", "finance-qa"]
    run["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    writes = len(operator.cluster.writes)
    operator.cluster.advance()
    assert operator.reconcile() is None
    assert len(operator.cluster.writes) == writes


def test_claim_outlives_its_run_unless_nothing_is_retained() -> None:
    kept, gone = begun(), begun({"spec.storage": {"size": "1Gi", "retain": "Nothing"}})
    for operator in (kept, gone):
        operator.settle()
    (claim,) = kept.cluster.of_kind("PersistentVolumeClaim")
    assert "ownerReferences" not in claim["metadata"]
    (claim,) = gone.cluster.of_kind("PersistentVolumeClaim")
    assert claim["metadata"]["ownerReferences"][0]["kind"] == names.KIND


def test_claim_that_is_there_already_is_used_and_none_is_made() -> None:
    operator = begun({"spec.storage": {"claimName": "mine"}})
    operator.settle()
    assert operator.cluster.of_kind("PersistentVolumeClaim") == []
    (job,) = operator.cluster.of_kind("Job")
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in job["spec"]["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    assert claims == ["mine", "rows"]


def test_status_of_a_newer_version_can_be_read() -> None:
    operator = begun()
    expected = operator.finish()
    run = operator.cluster.objects["StagedFineTune", "finance-qa"]
    run["status"]["invention"] = {"of": "later"}
    run["status"]["stages"][0]["invention"] = 1
    run["status"]["conditions"].append({"type": "Invented", "status": "True"})
    assert read_status(run).stages == expected.stages


def test_damage_that_comes_again_with_other_digests_is_not_repaired_for_ever() -> None:
    operator = begun({"spec.runtime": {"maxRetries": 2}})
    digests = (f"{number:x}".rjust(64, "d") for number in range(1000))

    def first_stage(config: StageConfig, pod: Object) -> Ending:
        """Give another result each time, as a GPU does."""
        return Ending(message=report_for(config, digest=next(digests)).termination_message())

    blames_first = fails(
        FailureClass.STORAGE_ERROR,
        TrainerExitCode.STORAGE_ERROR,
        artifact="/stagetune/runs/x/stages/01-layers-0-1/output/model.safetensors",
    )
    status = operator.finish({STAGES[0]: first_stage, STAGES[1]: blames_first})
    assert status.state == "Failed"
    assert len(operator.jobs) < 10


@pytest.mark.parametrize("is_away", [False, True], ids=["edited", "taken out and put back"])
def test_stage_that_is_edited_after_an_order_is_trained_anew(is_away: bool) -> None:
    kept = {"size": "10Gi", "retain": "Everything"}
    stages = copy.deepcopy(EXPLICIT)
    operator = begun({"spec.schedule": None, "spec.stages": stages, "spec.storage": kept})
    operator.finish()
    order = {"number": 1, "fromStage": "lower"}
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(retry=order))
    operator.settle()
    assert operator.status.stages[1].state == "Pending"
    if is_away:
        operator.cluster.edit_run("finance-qa", lambda spec: spec["stages"].pop())
        operator.settle()
        assert len(operator.status.stages) == 1
    upper = {**EXPLICIT[1], "epochs": 3.0}
    operator.cluster.edit_run(
        "finance-qa", lambda spec: spec.update(stages=[*spec["stages"][:1], upper])
    )
    status = operator.finish()
    assert status.state == "Succeeded"
    assert "finance-qa-02-upper-2" in operator.jobs
    trained = operator.cluster.objects["Job", "finance-qa-02-upper-2"]
    text = trained["spec"]["template"]["metadata"]["annotations"][names.ANNOTATION_STAGE_CONFIG]
    stage = StageConfig.model_validate_json(text).stage
    assert stage is not None
    assert stage.epochs == 3.0


def test_refusal_that_is_worded_anew_each_time_is_waited_for_all_the_same() -> None:
    operator = begun()
    counted = iter(range(1000))
    operator.cluster.deny = lambda manifest: f"request {next(counted)} was denied"
    operator.settle()
    assert operator.status.state == "Queued"
    asked = next(counted)
    operator.clock += 29
    operator.settle()
    assert next(counted) == asked + 1
    operator.clock += 2
    operator.settle()
    assert next(counted) > asked + 2
    operator.cluster.deny = lambda manifest: None
    assert operator.finish().state == "Succeeded"


def test_corrected_manifest_is_not_kept_waiting_by_an_earlier_refusal() -> None:
    operator = begun()
    operator.cluster.deny = lambda manifest: (
        "too large" if manifest["kind"] == "PersistentVolumeClaim" else None
    )
    operator.settle()
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(storage={"claimName": "mine"}))
    operator.settle()
    assert operator.jobs == ["finance-qa-prepare"]


def test_refused_first_stage_leaves_the_plan_to_be_seen() -> None:
    operator = begun()
    operator.settle()
    operator.cluster.advance()
    operator.cluster.deny = lambda manifest: "quota" if manifest["kind"] == "Job" else None
    operator.settle()
    assert conditions(operator.status)["Planned"] == "True"
    assert len(operator.status.stages) == 2
    assert [stage.attempts for stage in operator.status.stages] == [0, 0]


def test_finished_run_of_a_much_newer_version_is_inert() -> None:
    operator = begun()
    operator.finish()
    stored = operator.cluster.objects["StagedFineTune", "finance-qa"]["status"]
    stage = stored["stages"][0]
    stored["stages"] = [
        {**stage, "name": f"s{number}", "invention": 1, "other": {"of": "later"}}
        for number in range(100)
    ]
    before = copy.deepcopy(operator.cluster.writes)
    operator.restart()
    operator.settle()
    assert operator.cluster.writes[len(before) :] in ([], [("update", "StagedFineTune/status")])
    assert operator.status.state == "Succeeded"
    assert len(operator.status.stages) == 100


def test_attempt_that_does_not_survive_its_suspension_does_not_count() -> None:
    operator = first_stage_runs({"spec.runtime": {"maxRetries": 0}})
    operator.cluster.keep_deleted = True
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(suspend=True))
    operator.settle()
    job = f"finance-qa-{STAGES[0]}"
    assert "deletionTimestamp" in operator.cluster.objects["Job", job]["metadata"]
    operator.cluster.advance(lambda config, pod: Ending(exit_code=137, reason="Error"))
    operator.settle()
    assert operator.status.state == "Suspended"
    assert conditions(operator.status)["Suspended"] == "True"
    operator.cluster.keep_deleted = False
    del operator.cluster.objects["Job", job]
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(suspend=False))
    assert operator.finish().state == "Succeeded"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_operator_killed_while_it_suspends_a_run_counts_no_failure(
    number: int, after: bool
) -> None:
    operator = first_stage_runs({"spec.runtime": {"maxRetries": 0}})
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(suspend=True))
    operator.cluster.crash_at = len(operator.cluster.writes) + number
    operator.cluster.crash_after = after
    with contextlib.suppress(CrashError):
        operator.settle()
    operator.cluster.crash_at = None
    operator.restart()
    operator.settle()
    assert operator.status.state == "Suspended"
    assert operator.status.stages[0].state == "Interrupted"
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(suspend=False))
    operator.settle()
    assert operator.status.stages[0].attempts_before == 1
    assert operator.finish().state == "Succeeded"


def test_number_of_any_size_fits_its_column() -> None:
    operator = first_stage_runs()
    pod = operator.cluster.of_kind("Pod")[-1]
    post = Posted(pod["metadata"]["uid"], 1)
    post.loss = 1e300
    operator.progress = {STAGES[0]: post}
    operator.clock += 1000
    operator.settle()
    assert operator.status.loss == "1.000e+300"


def test_edit_that_changes_nothing_of_the_plan_is_at_rest() -> None:
    rate = {"learningRate": 1e-4}
    operator = begun({"spec.schedule": None, "spec.stages": copy.deepcopy(EXPLICIT)})
    operator.settle()
    operator.cluster.advance()
    operator.settle()
    operator.cluster.edit_run("finance-qa", lambda spec: spec["stages"][1].update(rate))
    operator.settle()
    assert operator.finish().state == "Succeeded"


def test_stage_that_is_missing_in_the_status_is_found_again() -> None:
    operator = first_stage_runs()
    operator.cluster.objects["StagedFineTune", "finance-qa"]["status"]["stages"].pop(0)
    operator.settle()
    assert [stage.name for stage in operator.status.stages] == ["layers-0-1", "layers-2-3"]
    assert operator.finish().state == "Succeeded"
    assert len(operator.jobs) == len(TASKS)


@pytest.mark.parametrize("number", range(1, 7))
def test_status_that_is_wiped_by_hand_is_made_again_from_what_is_there(number: int) -> None:
    operator = begun()
    for _ in range(number):
        operator.settle()
        operator.cluster.advance()
    operator.cluster.objects["StagedFineTune", "finance-qa"]["status"] = {}
    operator.restart()
    assert operator.finish().state == "Succeeded"
    assert operator.jobs == [f"finance-qa-{task}" for task in TASKS]


def test_job_that_vanishes_each_time_is_not_made_for_ever() -> None:
    operator = begun({"spec.runtime": {"maxRetries": 0}})
    for _ in range(10):
        operator.settle()
        for name in operator.jobs:
            del operator.cluster.objects["Job", name]
    status = operator.status
    assert status.state == "Failed"
    (prepare,) = status.tasks
    assert prepare.attempts == 4
    assert prepare.last_failure is not None
    assert "finance-qa-prepare-4 is gone" in prepare.last_failure.message


def test_next_stage_does_not_wait_until_the_job_takes_note_of_a_good_end() -> None:
    operator = first_stage_runs()
    operator.cluster.are_jobs_late = True
    operator.cluster.advance()
    operator.settle()
    assert operator.jobs[-1] == f"finance-qa-{STAGES[1]}"
    operator.cluster.are_jobs_late = False
    assert operator.finish().state == "Succeeded"
    assert len(operator.jobs) == len(TASKS)


def test_pod_that_has_failed_is_not_queued_while_its_job_takes_note() -> None:
    operator = first_stage_runs()
    operator.cluster.are_jobs_late = True
    writes = len(operator.cluster.writes)
    operator.cluster.advance(fails(FailureClass.INTERNAL, TrainerExitCode.INTERNAL))
    operator.settle()
    assert operator.status.state == "Training"
    assert len(operator.cluster.writes) == writes
    operator.cluster.are_jobs_late = False
    assert operator.finish().state == "Succeeded"


def test_job_that_a_queue_takes_back_is_shown_as_queued() -> None:
    operator = begun({"spec.runtime": {"queueName": "team-a"}})
    operator.settle()
    job = operator.cluster.objects["Job", "finance-qa-prepare"]
    job["spec"]["suspend"] = False
    operator.cluster.start_pods()
    operator.settle()
    job["spec"]["suspend"] = True
    operator.settle()
    assert operator.status.state == "Queued"
    assert "team-a" in operator.status.conditions[0].message
    assert "saves and leaves" in operator.status.conditions[0].message
    for name in [name for kind, name in operator.cluster.objects if kind == "Pod"]:
        del operator.cluster.objects["Pod", name]
    operator.settle()
    assert "waits to be admitted" in operator.status.conditions[0].message
    job["spec"]["suspend"] = False
    operator.cluster.start_pods()
    operator.settle()
    assert operator.status.state == "Preparing"
    assert operator.jobs == ["finance-qa-prepare"]


def test_job_that_a_person_suspends_is_said_to_be() -> None:
    operator = first_stage_runs()
    operator.cluster.objects["Job", f"finance-qa-{STAGES[0]}"]["spec"]["suspend"] = True
    operator.settle()
    message = operator.status.conditions[0].message
    assert operator.status.state == "Queued"
    assert "None" not in message
    assert f"finance-qa-{STAGES[0]}" in message


def test_smaller_micro_batches_do_not_use_up_the_retries() -> None:
    operator = begun(
        {
            "spec.training": {"learningRate": 1e-4, "batchSize": 4, "microBatchSize": 4},
            "spec.runtime": {"maxRetries": 1},
        }
    )
    left = [fails(FailureClass.INTERNAL, TrainerExitCode.INTERNAL)]

    def script(config: StageConfig, pod: Object) -> Ending:
        if config.training.micro_batch_size > 1:
            return Ending(exit_code=137, reason="OOMKilled")
        return left.pop()(config, pod) if left else succeeds(config, pod)

    status = operator.finish({STAGES[0]: script})
    assert status.state == "Succeeded"
    assert (status.stages[0].attempts, status.stages[0].micro_batch_size) == (4, 1)


def test_run_that_is_applied_anew_waits_for_what_is_left_of_the_one_before() -> None:
    operator = begun()
    operator.settle()
    operator.cluster.start_pods()
    del operator.cluster.objects["StagedFineTune", "finance-qa"]
    operator.settle()
    manifest = edited(CLUSTER)
    manifest["metadata"]["uid"] = "11111111-5d8f-4c9a-9a52-0d8f7c1d9a11"
    operator.cluster.add_run(manifest)
    operator.settle()
    assert conditions(operator.status)["Stalled"] == "False"
    assert "finance-qa-prepare" in operator.status.conditions[0].message
    del operator.cluster.objects["Job", "finance-qa-prepare"]
    status = operator.finish()
    assert status.state == "Succeeded"
    assert status.tasks[0].disruptions == 0


def test_plan_that_is_deleted_is_made_again() -> None:
    operator = first_stage_runs()
    plan = operator.status.plan_digest
    for name in [name for kind, name in operator.cluster.objects if kind == "ConfigMap"]:
        del operator.cluster.objects["ConfigMap", name]
    operator.restart()
    operator.settle()
    assert len(operator.cluster.of_kind("ConfigMap")) == 1
    assert operator.finish().plan_digest == plan
    assert len(operator.jobs) == len(TASKS)


@pytest.mark.parametrize(
    ("old", "new"), [("{", "["), ('"digest": "', '"digest": "0')], ids=["no JSON", "another plan"]
)
def test_plan_that_cannot_be_used_is_made_again_and_followed(old: str, new: str) -> None:
    operator = first_stage_runs()
    (name,) = [name for kind, name in operator.cluster.objects if kind == "ConfigMap"]
    data = operator.cluster.objects["ConfigMap", name]["data"]
    data[names.PLAN_FILE] = data[names.PLAN_FILE].replace(old, new, 1)
    operator.restart()
    status = operator.finish()
    assert [stage.name for stage in status.stages] == ["layers-0-1", "layers-2-3"]
    assert status.state == "Succeeded"
    assert len(operator.jobs) == len(TASKS)


@pytest.mark.parametrize("order", [{"number": 1}, {"number": 1, "fromStage": "layers-2-3"}])
def test_order_is_obeyed_though_the_plan_is_gone(order: Object) -> None:
    operator = begun({"spec.runtime": {"maxRetries": 0}})
    operator.finish({STAGES[1]: fails(FailureClass.INTERNAL, TrainerExitCode.INTERNAL)})
    for name in [name for kind, name in operator.cluster.objects if kind == "ConfigMap"]:
        del operator.cluster.objects["ConfigMap", name]
    operator.restart()
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(retry=order))
    status = operator.finish()
    assert status.state == "Succeeded"
    assert f"finance-qa-{STAGES[1]}-2" in operator.jobs


def test_report_of_a_trainer_that_ended_well_counts_whatever_became_of_its_job() -> None:
    operator = begun()
    operator.settle()
    operator.cluster.advance()
    job = operator.cluster.objects["Job", "finance-qa-prepare"]
    job["status"]["conditions"] = [{"type": "Failed", "status": "True", "message": "a sidecar"}]
    assert operator.finish().state == "Succeeded"
    assert len(operator.jobs) == len(TASKS)


def test_annotations_and_reports_that_make_no_sense_stop_nothing() -> None:
    operator = first_stage_runs()
    job = operator.cluster.objects["Job", f"finance-qa-{STAGES[0]}"]
    job["metadata"]["annotations"] = {
        names.ANNOTATION_INPUTS: "[",
        names.ANNOTATION_MICRO_BATCH_SIZE: "many",
    }

    def script(config: StageConfig, pod: Object) -> Ending:
        timings = Timings(start_time="yesterday", first_step_time="just now")
        report = report_for(config).model_copy(update={"timings": timings})
        return Ending(message=report.termination_message())

    assert operator.finish({STAGES[0]: script}).state == "Succeeded"
    assert len(operator.jobs) == len(TASKS)


def test_order_for_a_stage_that_is_not_there_leaves_a_failed_run_as_it_is() -> None:
    operator = begun()
    before = operator.finish({STAGES[0]: fails(FailureClass.DIVERGED, TrainerExitCode.DIVERGED)})
    order = {"number": 1, "fromStage": "layers-9-9"}
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(retry=order))
    operator.settle()
    assert {**conditions(before), "Validated": "False"} == conditions(operator.status)


def test_edit_that_is_refused_moves_the_observed_generation_of_a_finished_run() -> None:
    operator = begun()
    before = operator.finish()
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(storage=None))
    operator.settle()
    status = operator.status
    assert all(item.observed_generation == 2 for item in status.conditions)
    assert {**conditions(before), "Validated": "False"} == conditions(status)
    assert "spec.storage" in next(c.message for c in status.conditions if c.type == "Validated")


def _running_pod(operator: Operator) -> Object:
    """Return the stored pod that is at work."""
    pods = [item for (kind, _), item in operator.cluster.objects.items() if kind == "Pod"]
    return next(pod for pod in pods if pod["status"]["phase"] == "Running")


def test_pod_that_other_containers_keep_from_ending_is_said_to_be() -> None:
    operator = first_stage_runs()
    pod = _running_pod(operator)
    times = {"startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T01:00:00Z"}
    state = {"terminated": {"exitCode": 0, **times}}
    sidecar = {"name": "istio-proxy", "state": {"running": {}}}
    trainer = {**pod["status"]["containerStatuses"][0], "state": state}
    pod["status"]["containerStatuses"] = [sidecar, trainer]
    operator.settle()
    message = operator.status.conditions[0].message
    assert f"other containers keep {pod['metadata']['name']} from ending" in message

    pod["status"]["containerStatuses"] = [trainer]
    operator.settle()
    assert "other containers" not in operator.status.conditions[0].message


def test_pod_that_cannot_leave_a_lost_node_is_said_to_be_and_no_second_job_is_made() -> None:
    operator = first_stage_runs()
    pod = _running_pod(operator)
    pod["metadata"]["deletionTimestamp"] = "2026-01-01T01:00:00Z"
    pod["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True"}]
    jobs = operator.jobs
    operator.settle()
    message = operator.status.conditions[0].message
    assert pod["metadata"]["name"] in message
    assert "node-1" in message
    operator.clock += 1000
    operator.settle()
    assert operator.jobs == jobs
    operator.cluster.advance(lambda config, pod: Ending(exit_code=137, is_disrupted=True))
    status = operator.finish()
    assert status.state == "Succeeded"
    assert status.stages[0].disruptions == 1


@pytest.mark.parametrize("state", [{}, {"waiting": {"reason": "ContainerCreating"}}])
def test_pod_that_does_not_start_says_where_the_reason_is(state: Object) -> None:
    """A Secret that is not there, or a volume that cannot be mounted: the kubelet's events alone
    say so."""
    operator = begun()
    operator.settle()
    assert "kubectl describe job finance-qa-prepare" in operator.status.conditions[0].message
    operator.cluster.start_pods()
    pod = _running_pod(operator)
    pod["status"] |= {
        "phase": "Pending",
        "containerStatuses": [{"name": "trainer", "state": state}],
    }
    operator.settle()
    message = operator.status.conditions[0].message
    assert f"kubectl describe pod {pod['metadata']['name']}" in message


def test_edit_of_the_data_counts_no_attempt_at_preparing() -> None:
    operator = begun({"spec.runtime": {"maxRetries": 0}})
    for length in (128, 256, 512, 1024, 64):
        operator.settle()
        operator.cluster.start_pods()
        operator.cluster.edit_run(
            "finance-qa", lambda spec, length=length: spec["dataset"].update(maxLength=length)
        )
    status = operator.finish()
    assert status.state == "Succeeded"
    assert operator.jobs[0] == "finance-qa-prepare-6"


OWN_BATCHES: dict[str, Any] = {
    "spec.schedule": None,
    "spec.stages": [
        {"name": "lower", "layers": {"first": 0, "last": 1}},
        {"name": "upper", "layers": {"first": 2, "last": 3}, "batchSize": 12, "microBatchSize": 6},
    ],
}


def test_out_of_memory_halves_a_stages_own_micro_batch() -> None:
    operator = begun(OWN_BATCHES)
    sizes: list[tuple[int, int]] = []

    def script(config: StageConfig, pod: Object) -> Ending:
        sizes.append((config.training.batch_size, config.training.micro_batch_size))
        if config.training.micro_batch_size > 1:
            return Ending(exit_code=137, reason="OOMKilled")
        return succeeds(config, pod)

    status = operator.finish({"01-lower": script, "02-upper": script})

    assert sizes == [(16, 1), (12, 6), (12, 3), (12, 1)]
    assert status.state == "Succeeded"
    assert [stage.micro_batch_size for stage in status.stages] == [None, 1]


def test_status_says_which_layers_at_the_top_a_stage_opens_too() -> None:
    status = begun({"spec.schedule": {"layersPerStage": 1, "openTop": 1}}).finish()

    opened = [(stage.layers, stage.top_layers) for stage in status.stages]
    top = LayerRange(first=3, last=3)
    assert opened == [
        (LayerRange(first=0, last=0), top),
        (LayerRange(first=1, last=1), top),
        (LayerRange(first=2, last=3), None),
    ]


def test_edited_stage_forgets_the_micro_batch_that_memory_ran_out_down_to() -> None:
    operator = begun(OWN_BATCHES)
    refused: list[tuple[int, int]] = []

    def too_large(config: StageConfig, pod: Object) -> Ending:
        refused.append((config.training.batch_size, config.training.micro_batch_size))
        if config.training.micro_batch_size > 3:
            return Ending(exit_code=137, reason="OOMKilled")
        return fails(FailureClass.DIVERGED, TrainerExitCode.DIVERGED)(config, pod)

    assert operator.finish({"02-upper": too_large}).stages[1].micro_batch_size == 3
    again = {"number": 1, "fromStage": "lower"}
    upper = {**OWN_BATCHES["spec.stages"][1], "batchSize": 8, "microBatchSize": 2}
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(retry=again))
    operator.settle()
    operator.cluster.edit_run(
        "finance-qa", lambda spec: spec.update(stages=[spec["stages"][0], upper])
    )
    trained: list[tuple[int, int]] = []

    def script(config: StageConfig, pod: Object) -> Ending:
        trained.append((config.training.batch_size, config.training.micro_batch_size))
        return succeeds(config, pod)

    status = operator.finish({"02-upper": script})

    assert (refused, trained) == ([(12, 6), (12, 3)], [(8, 2)])
    assert status.stages[1].micro_batch_size is None


def test_a_run_follows_the_profile_that_its_prepare_reports() -> None:
    operator = begun({"spec.schedule": {"layersPerStage": 1, "order": "GradientNorm"}})
    asked: list[Any] = []

    def script(config: StageConfig, pod: Object) -> Ending:
        asked.append((config.task, config.gradient_norm is not None))
        if config.task is not Task.PREPARE:
            return succeeds(config, pod)
        profile = GradientFacts(relative_norms=[0.01, 1.0, 3.0, 2.0], rows=8, tokens=512)
        facts = FACTS.model_copy(update={"gradients": profile})
        report = report_for(config).model_copy(update={"facts": facts})
        return Ending(message=report.termination_message())

    status = operator.finish(script)

    assert [stage.name for stage in status.stages] == ["layers-2", "layers-3", "layers-1"]
    assert status.state == "Succeeded"
    assert asked[0] == (Task.PREPARE, True)
    assert not any(wanted for _, wanted in asked[1:])


TWO_PODS = {
    **CLUSTER,
    "spec.runtime": {"resources": {"limits": {"nvidia.com/gpu": 2}}, "nodes": 2},
    "spec.storage": {"size": "10Gi", "accessMode": "ReadWriteMany"},
}


def pods_of_task(operator: Operator, task: str) -> list[Object]:
    pods = operator.cluster.of_kind("Pod")
    return [pod for pod in pods if pod["metadata"]["labels"][names.LABEL_TASK] == task]


def test_stage_on_two_nodes_has_two_pods_that_find_each_other() -> None:
    operator = begun(TWO_PODS)
    status = operator.finish()
    assert status.state == "Succeeded"
    assert [len(pods_of_task(operator, task)) for task in TASKS] == [1, 2, 2, 1, 1]

    (service,) = operator.cluster.of_kind("Service")
    assert service["spec"]["clusterIP"] == "None"
    created = [what for verb, what in operator.cluster.writes if verb == "create"]
    name = service["metadata"]["name"]
    assert created.index(f"Service/{name}") < created.index("Job/finance-qa-01-layers-0-1")
    for pod in pods_of_task(operator, STAGES[0]):
        labels = pod["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
    jobs = {job["metadata"]["name"]: job["spec"] for job in operator.cluster.of_kind("Job")}
    spec = jobs["finance-qa-01-layers-0-1"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == name
    (coordinator,) = [
        item["value"]
        for item in pod["containers"][0]["env"]
        if item["name"] == names.COORDINATOR_VARIABLE
    ]
    assert coordinator == f"finance-qa-01-layers-0-1-0.{name}"
    assert "completionMode" not in jobs["finance-qa-prepare"]


def test_gpus_of_all_pods_are_counted() -> None:
    runtime = {"resources": {"limits": {"nvidia.com/gpu": 2}}, "nodes": 1}
    one = begun({**TWO_PODS, "spec.runtime": runtime}).finish()
    two = begun(TWO_PODS).finish()
    for alone, both in zip(one.stages, two.stages, strict=True):
        assert alone.gpu_seconds is not None
        assert both.gpu_seconds is not None
        assert both.gpu_seconds > 1.9 * alone.gpu_seconds > 0


def test_failure_of_any_pod_ends_the_attempt_with_what_it_said() -> None:
    lost = fails(FailureClass.INTERNAL, TrainerExitCode.INTERNAL, "connection closed by peer")
    full = fails(FailureClass.STORAGE_FULL, TrainerExitCode.STORAGE_FULL, "no space left")

    def script(config: StageConfig, pod: Object) -> Ending:
        is_first = pod["metadata"]["labels"].get(names.LABEL_POD_INDEX) == "0"
        return (lost if is_first else full)(config, pod)

    operator = begun(TWO_PODS)
    status = operator.finish({STAGES[0]: script})
    assert status.state == "Failed"
    failure = status.stages[0].last_failure
    assert failure is not None
    assert failure.failure_class is FailureClass.STORAGE_FULL
    assert status.stages[0].attempts == 1


def test_pod_that_no_node_takes_is_shown_though_the_first_one_runs() -> None:
    operator = begun(TWO_PODS)
    operator.settle()
    operator.cluster.advance()
    operator.settle()
    operator.cluster.start_pods()
    name = pods_of_task(operator, STAGES[0])[1]["metadata"]["name"]
    second = operator.cluster.objects["Pod", name]
    second["status"] = {
        "phase": "Pending",
        "conditions": [{"type": "PodScheduled", "status": "False", "message": "no GPU is free"}],
    }
    operator.settle()
    assert operator.status.state == "Queued"
    messages = [condition.message for condition in operator.status.conditions]
    assert any("no GPU is free" in message for message in messages)


@pytest.mark.parametrize("crash_after", [False, True])
def test_operator_that_dies_beside_the_service_makes_it_once(crash_after: bool) -> None:
    operator = begun(TWO_PODS)
    wanted = begun(TWO_PODS)
    wanted.finish()
    number = next(
        index
        for index, (verb, what) in enumerate(wanted.cluster.writes, start=1)
        if verb == "create" and what.startswith("Service/")
    )
    operator.cluster.crash_at, operator.cluster.crash_after = number, crash_after
    assert operator.finish().state == "Succeeded"
    assert len(operator.cluster.of_kind("Service")) == 1
    assert operator.jobs == wanted.jobs
