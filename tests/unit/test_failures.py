"""Why a task failed, from every way in which a pod can end, and what follows from it."""

from dataclasses import replace
from typing import Any

import pytest

from stagetune_api import names
from stagetune_api.names import TrainerExitCode
from stagetune_api.report import Failure, FailureClass, Outcome, StageReport
from stagetune_api.stage import PlannedStage, RowRange, StageEstimate, Task
from stagetune_api.training_spec import LayerRange, TrainingSpec
from stagetune_operator.failures import (
    GiveUp,
    Redo,
    Retry,
    damaged_task,
    decide_remedy,
    halved,
    read_failure,
)
from stagetune_operator.stage_files import PREPARE, Step
from stagetune_operator.views import JobView, Object, PodView, view_job, view_pod


def job() -> JobView:
    return view_job(
        {
            "metadata": {
                "name": "finance-qa-prepare",
                "uid": "job",
                "labels": {names.LABEL_TASK: "prepare", names.LABEL_ATTEMPT: "1"},
                "creationTimestamp": "2026-01-01T00:00:00Z",
            },
            "status": {"conditions": [{"type": "Failed", "status": "True", "message": "limit"}]},
        }
    )


def pod(
    *,
    terminated: Object | None = None,
    phase: str = "Failed",
    created: str = "2026-01-01T00:00:01Z",
    is_disrupted: bool = False,
    **status: Any,
) -> PodView:
    """Return a pod that ended; `status` is what stands beside its containers."""
    container = {"name": names.TRAINER_CONTAINER, "state": {"terminated": terminated}}
    sidecar = {"name": "proxy", "state": {"terminated": {"exitCode": 0, "message": "bye"}}}
    disrupted = [{"type": "DisruptionTarget", "status": "True"}] if is_disrupted else []
    return view_pod(
        {
            "metadata": {
                "name": "pod-1",
                "uid": "pod",
                "creationTimestamp": created,
                "ownerReferences": [{"uid": "job", "controller": True}],
            },
            "spec": {"nodeName": "node-1"},
            "status": {
                "phase": phase,
                "conditions": disrupted,
                **({"containerStatuses": [sidecar, container]} if terminated else {}),
                **status,
            },
        }
    )


def ended(code: int, reason: str = "Error", message: str = "", **more: Any) -> PodView:
    return pod(terminated={"exitCode": code, "reason": reason, "message": message}, **more)


CASES = {
    "memory limit": (ended(137, "OOMKilled"), FailureClass.OUT_OF_MEMORY, "raise"),
    "killed": (ended(137), FailureClass.DISRUPTED, "code 137"),
    "asked to leave, too slow": (ended(143), FailureClass.DISRUPTED, "code 143"),
    "evicted": (ended(137, is_disrupted=True), FailureClass.DISRUPTED, "from outside"),
    "evicted, old kubelet": (
        pod(reason="Evicted", message="The node was low on memory."),
        FailureClass.DISRUPTED,
        "Evicted",
    ),
    "node shut down": (pod(reason="Terminated"), FailureClass.DISRUPTED, "Terminated"),
    "node lost": (pod(reason="NodeLost"), FailureClass.NODE_LOST, "node-1"),
    "refused by its node": (
        pod(reason="UnexpectedAdmissionError", message="no healthy devices present"),
        FailureClass.DISRUPTED,
        "never ran on node-1 (UnexpectedAdmissionError: no healthy devices present)",
    ),
    "bug": (ended(1, message="Traceback"), FailureClass.INTERNAL, "code 1 without a report"),
    "no such program": (
        ended(128, "ContainerCannotRun"),
        FailureClass.INTERNAL,
        "code 128 (ContainerCannotRun)",
    ),
    **{
        f"trainer's {code.name}": (ended(int(code)), found, f"code {int(code)} ({found})")
        for code, found in (
            (TrainerExitCode.USER_ERROR, FailureClass.USER_ERROR),
            (TrainerExitCode.OUT_OF_MEMORY, FailureClass.OUT_OF_MEMORY),
            (TrainerExitCode.DIVERGED, FailureClass.DIVERGED),
            (TrainerExitCode.STORAGE_FULL, FailureClass.STORAGE_FULL),
            (TrainerExitCode.STORAGE_ERROR, FailureClass.STORAGE_ERROR),
            (TrainerExitCode.INTERRUPTED, FailureClass.DISRUPTED),
            (TrainerExitCode.FENCED, FailureClass.FENCED),
            (TrainerExitCode.INTERNAL, FailureClass.INTERNAL),
        )
    },
}


@pytest.mark.parametrize("case", CASES)
def test_class_and_words_for_each_way_to_end_without_a_report(case: str) -> None:
    ending, failure_class, words = CASES[case]
    failure = read_failure(job(), [ending])
    assert failure.failure_class is failure_class
    assert words in failure.message


def test_every_exit_code_of_the_trainer_has_a_case() -> None:
    failing = set(TrainerExitCode) - {TrainerExitCode.SUCCEEDED}
    assert {f"trainer's {code.name}" for code in failing} <= set(CASES)


def test_report_counts_for_more_than_how_the_pod_ended() -> None:
    said = Failure(failure_class=FailureClass.USER_ERROR, exit_code=40, message="row 7 is wrong")
    report = StageReport(name="prepare", attempt=1, outcome=Outcome.FAILED, failure=said)
    ending = ended(137, "OOMKilled", report.termination_message())
    assert read_failure(job(), [ending]) == said


def test_end_of_the_log_is_kept_whatever_it_holds() -> None:
    text = "\ufffd\x00" + "€" * 20000
    failure = read_failure(job(), [ended(1, message=text)])
    assert failure.log_tail == "€" * 8192


def test_last_pod_counts_also_where_it_never_ran() -> None:
    first = pod(
        terminated={"exitCode": 45, "finishedAt": "2026-01-01T00:00:09Z"},
        created="2026-01-01T00:00:01Z",
    )
    last = pod(reason="OutOfcpu", created="2026-01-01T00:00:10Z")
    assert "OutOfcpu" in read_failure(job(), [last, first]).message


def test_pod_that_is_gone_leaves_the_words_of_its_job() -> None:
    failure = read_failure(job(), [])
    assert failure.failure_class is FailureClass.DISRUPTED
    assert "limit" in failure.message


NOTHING = StageEstimate(
    trainable_parameters=0,
    weights_bytes=0,
    training_state_bytes=0,
    activation_bytes=0,
    memory_bytes=0,
    disk_bytes=0,
    step_flops=0,
    relative_step_flops=0,
)
STAGE = PlannedStage(
    index=0,
    name="lower",
    layers=LayerRange(first=0, last=1),
    embeddings=False,
    head=False,
    learning_rate=1e-4,
    epochs=1,
    rows=RowRange(start=0, end=8),
    steps=4,
    warmup_steps=0,
    validation_interval=2,
    estimate=NOTHING,
)
TRAIN = Step(task=Task.TRAIN, stage=STAGE)


def remedy(
    failure_class: FailureClass,
    *,
    failures: int = 1,
    step: Step = TRAIN,
    micro_batch_size: int = 1,
    damaged: str | None = None,
    **training: Any,
) -> Retry | Redo | GiveUp:
    return decide_remedy(
        Failure(failure_class=failure_class, exit_code=1, message="it failed"),
        step,
        failures=failures,
        max_retries=3,
        delay_seconds=10,
        training=TrainingSpec(batch_size=12, micro_batch_size=6, **training),
        micro_batch_size=micro_batch_size,
        damaged=damaged,
    )


HOPELESS = {FailureClass.USER_ERROR, FailureClass.DIVERGED, FailureClass.STORAGE_FULL}


@pytest.mark.parametrize("failure_class", FailureClass)
def test_what_may_pass_is_tried_again_and_what_may_not_is_not(failure_class: FailureClass) -> None:
    first, last = remedy(failure_class), remedy(failure_class, failures=4)
    if failure_class in HOPELESS | {FailureClass.OUT_OF_MEMORY}:
        assert isinstance(first, GiveUp)
    else:
        assert first == Retry(delay_seconds=10)
        assert isinstance(last, GiveUp)
        assert "attempt 4 of 4" in last.failure.message


def test_delays_double_up_to_five_minutes() -> None:
    delays = [remedy(FailureClass.INTERNAL, failures=number) for number in (1, 2, 3)]
    assert delays == [Retry(delay_seconds=seconds) for seconds in (10, 20, 40)]
    many = decide_remedy(
        Failure(failure_class=FailureClass.INTERNAL, exit_code=1, message="it failed"),
        TRAIN,
        failures=99,
        max_retries=100,
        delay_seconds=10,
        training=TrainingSpec(),
        micro_batch_size=1,
    )
    assert many == Retry(delay_seconds=300)


def test_memory_is_saved_where_there_is_a_batch_to_cut() -> None:
    smaller = remedy(FailureClass.OUT_OF_MEMORY, micro_batch_size=6, failures=99)
    assert smaller == Retry(delay_seconds=0, micro_batch_size=3)
    assert isinstance(remedy(FailureClass.OUT_OF_MEMORY, step=PREPARE, micro_batch_size=6), GiveUp)


def test_batch_that_cannot_be_cut_is_the_end_with_a_cure() -> None:
    final = remedy(FailureClass.OUT_OF_MEMORY, micro_batch_size=12, optimizer_in_backward=True)
    assert isinstance(final, GiveUp)
    assert "lower batchSize" in final.failure.message


def test_damage_is_repaired_as_often_as_there_are_retries() -> None:
    assert remedy(FailureClass.STORAGE_ERROR, damaged="prepare") == Redo(key="prepare")
    assert isinstance(remedy(FailureClass.STORAGE_ERROR, damaged="prepare", failures=4), GiveUp)


@pytest.mark.parametrize(("size", "batch", "half"), [(6, 12, 3), (3, 12, 1), (5, 10, 2), (4, 4, 2)])
def test_half_of_a_micro_batch_divides_the_batch(size: int, batch: int, half: int) -> None:
    assert halved(size, batch) == half


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("/stagetune/runs/x-1/stages/01-lower/output/model.safetensors", "01-lower"),
        ("/stagetune/runs/x-1/stages/01-lower/checkpoints/step-000002", None),
        ("/stagetune/runs/x-1/prepare/data/train.arrow", "prepare"),
        ("/stagetune/models/0123/model.safetensors", "prepare"),
        ("/stagetune-models/0123/model.safetensors", "prepare"),
        ("/stagetune/runs/prepare-1/export/config.json", None),
        (None, None),
    ],
)
def test_damage_is_the_work_of_the_task_whose_folder_it_is_in(
    path: str | None, key: str | None
) -> None:
    failure = Failure(
        failure_class=FailureClass.STORAGE_ERROR, exit_code=44, message="", artifact=path
    )
    assert damaged_task(failure, [STAGE]) == key


def of_index(index: int, ended: PodView) -> PodView:
    return replace(ended, index=index, name=f"pod-{index}")


def reported(failure_class: FailureClass, code: int, finished: str) -> Object:
    failure = Failure(failure_class=failure_class, exit_code=code, message=f"ended {finished}")
    report = StageReport(task=Task.TRAIN, name="a", attempt=1, outcome="Failed", failure=failure)
    return {
        "exitCode": code,
        "message": report.termination_message(),
        "startedAt": "2026-01-01T00:00:02Z",
        "finishedAt": finished,
    }


def test_of_several_pods_the_one_that_says_most_is_to_blame() -> None:
    lost = pod(terminated=reported(FailureClass.INTERNAL, 47, "2026-01-01T00:01:00Z"))
    full = pod(terminated=reported(FailureClass.STORAGE_FULL, 43, "2026-01-01T00:01:02Z"))
    found = read_failure(job(), [of_index(0, lost), of_index(1, full)])
    assert found.failure_class is FailureClass.STORAGE_FULL
    killed = pod(terminated={"exitCode": 137, "reason": "OOMKilled"})
    found = read_failure(job(), [of_index(0, lost), of_index(1, killed)])
    assert found.failure_class is FailureClass.OUT_OF_MEMORY


def test_of_several_pods_with_as_much_to_say_the_first_to_end_is_to_blame() -> None:
    later = pod(terminated=reported(FailureClass.INTERNAL, 47, "2026-01-01T00:01:05Z"))
    first = pod(terminated=reported(FailureClass.INTERNAL, 47, "2026-01-01T00:01:00Z"))
    again = pod(terminated={"exitCode": 45}, created="2026-01-01T00:00:00Z", is_disrupted=True)
    pods = [of_index(1, again), of_index(0, later), of_index(1, first)]
    found = read_failure(job(), pods)
    assert found.failure_class is FailureClass.INTERNAL
    assert found.message == "ended 2026-01-01T00:01:00Z"
