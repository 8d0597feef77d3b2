"""Pods that stand by for the next task: made early, given their file in time, let go otherwise."""

from collections.abc import Mapping
from typing import Any

import pytest

from fake_cluster import Ending, fails, stands_by, succeeds
from fake_operator import STAGES, Operator, Posted, begun, first_stage_runs
from stagetune_api import names
from stagetune_api.names import TrainerExitCode
from stagetune_api.report import FailureClass
from stagetune_api.stage import StageConfig
from stagetune_api.status import StageState
from stagetune_operator.errors import UnavailableError
from stagetune_operator.views import Object

URL = {"progress_url": "http://operator:8080"}
NO_GPU: Mapping[str, Any] = {"spec.runtime": {"resources": {"limits": {"memory": "8Gi"}}}}
FIRST, SECOND = (f"finance-qa-{stage}" for stage in STAGES)


def near_the_end(
    edits: Mapping[str, Any] | None = None, *, seconds: float = 40.0, **settings: Any
) -> Operator:
    """Return an operator over a run whose first stage has only `seconds` left."""
    operator = first_stage_runs(NO_GPU if edits is None else edits, **{**URL, **settings})
    post(operator, STAGES[0], seconds)
    operator.settle()
    return operator


def post(operator: Operator, task: str, seconds: float) -> None:
    """Let the pod at `task` say how many seconds it has left."""
    operator.progress = {task: Posted(newest_pod(operator, task)["metadata"]["uid"], 3, seconds)}


def newest_pod(operator: Operator, task: str) -> Object:
    pods = operator.cluster.of_kind("Pod")
    return [pod for pod in pods if pod["metadata"]["labels"][names.LABEL_TASK] == task][-1]


def offered(operator: Operator, pod: Object) -> StageConfig | None:
    text = operator.cluster.stage_file_for(pod["metadata"]["uid"])
    return None if text is None else StageConfig.model_validate_json(text)


def conditions(operator: Operator) -> dict[str, tuple[str, str]]:
    return {item.type: (item.status, item.reason) for item in operator.status.conditions}


def end_first_stage(operator: Operator) -> None:
    operator.cluster.advance({STAGES[1]: waits})


def waits(config: StageConfig, pod: Object) -> Ending:
    raise AssertionError(f"{config.task} has begun")


def test_next_pod_is_made_in_the_last_minute_of_a_stage_and_not_before() -> None:
    operator = near_the_end(seconds=61.0)
    assert operator.jobs[-1] == FIRST
    post(operator, STAGES[0], 60.0)
    operator.settle()
    assert operator.jobs[-2:] == [FIRST, SECOND]
    first, second = operator.status.stages
    assert (first.state, second.state, second.attempts) == ("Running", "Pending", 0)
    operator.settle()
    assert operator.jobs[-2:] == [FIRST, SECOND]


def test_pod_that_stands_by_is_bound_to_the_node_and_knows_all_but_the_output_before_it() -> None:
    operator = near_the_end()
    template = operator.cluster.of_kind("Job")[-1]["spec"]["template"]
    affinity = template["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchFields"][0]["values"] == ["node-1"]
    text = template["metadata"]["annotations"][names.ANNOTATION_STAGE_CONFIG]
    forecast = StageConfig.model_validate_json(text)
    assert forecast.stage is not None
    assert forecast.stage.directory == STAGES[1]
    assert forecast.chain == []
    awaited = f"{URL['progress_url']}/apis/stagetune.io/v1alpha1/namespaces/team-a/runs/finance-qa"
    arguments = template["spec"]["containers"][0]["args"]
    assert f"--await={awaited}/tasks/{STAGES[1]}/stage" in arguments


def test_pod_that_stands_by_gets_its_file_once_its_task_is_due() -> None:
    operator = near_the_end()
    operator.cluster.start_pods()
    operator.settle()
    pod = newest_pod(operator, STAGES[1])
    assert stands_by(pod)
    assert offered(operator, pod) is None
    end_first_stage(operator)
    operator.settle()
    operator.reconcile()
    given = offered(operator, pod)
    assert given is not None
    output = operator.status.stages[0].checkpoint
    assert output is not None
    assert [parent.digest for parent in given.chain] == [output.digest]
    assert operator.jobs[-1] == SECOND
    assert operator.status.stages[1].state is StageState.RUNNING
    operator.cluster.give_files()
    post(operator, STAGES[1], 1000.0)
    operator.reconcile()
    assert offered(operator, pod) is None
    assert operator.finish().state == "Succeeded"


def test_operator_that_is_replaced_offers_the_file_again() -> None:
    operator = near_the_end()
    operator.cluster.start_pods()
    end_first_stage(operator)
    operator.settle()
    operator.restart()
    operator.reconcile()
    assert offered(operator, newest_pod(operator, STAGES[1])) is not None


def test_evaluation_stands_by_for_the_last_stage() -> None:
    operator = near_the_end()
    operator.cluster.start_pods()
    end_first_stage(operator)
    operator.settle()
    operator.reconcile()
    operator.cluster.give_files()
    post(operator, STAGES[1], 5.0)
    operator.settle()
    assert operator.jobs[-1] == "finance-qa-evaluate"
    assert operator.finish().state == "Succeeded"
    assert operator.jobs[-2:] == ["finance-qa-evaluate", "finance-qa-export"]


@pytest.mark.parametrize(
    ("edits", "settings"),
    [
        ({}, URL),
        ({"spec.runtime": {"standby": "Never"}}, URL),
        ({"spec.runtime": {"priorityClassName": "high"}}, URL),
        ({"spec.runtime": {"processesPerNode": 2}}, URL),
        (NO_GPU, {"progress_url": ""}),
    ],
    ids=["gpu", "never", "priority", "processes", "nobody-to-ask"],
)
def test_no_pod_stands_by(edits: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    operator = near_the_end(edits, **settings)
    assert operator.jobs[-1] == FIRST
    assert operator.finish().state == "Succeeded"


def test_pod_with_a_gpu_stands_by_where_the_manifest_says_so() -> None:
    resources = {"limits": {"nvidia.com/gpu": 1, "memory": "8Gi"}}
    operator = near_the_end({"spec.runtime": {"resources": resources, "standby": "Always"}})
    assert operator.jobs[-1] == SECOND


def test_stage_that_fails_lets_the_next_pod_go_and_that_counts_for_nothing() -> None:
    operator = near_the_end({"spec.runtime": {"maxRetries": 1}})
    operator.cluster.start_pods()
    failing = fails(FailureClass.INTERNAL, TrainerExitCode.INTERNAL)
    operator.cluster.advance({STAGES[0]: failing, STAGES[1]: waits})
    operator.settle()
    assert SECOND not in operator.jobs
    status = operator.finish()
    assert status.state == "Succeeded"
    assert status.stages[0].attempts == 2
    assert status.stages[1].attempts - status.stages[1].attempts_before == 1
    assert status.stages[1].disruptions == 0


def test_suspended_run_keeps_no_pod_that_stands_by() -> None:
    operator = near_the_end()
    operator.cluster.start_pods()
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(suspend=True))
    operator.settle()
    assert operator.jobs == ["finance-qa-prepare"]
    assert operator.status.stages[1].state is StageState.PENDING
    operator.cluster.edit_run("finance-qa", lambda spec: spec.update(suspend=False))
    assert operator.finish().state == "Succeeded"


def test_failed_run_keeps_no_pod_that_stands_by() -> None:
    operator = near_the_end({"spec.runtime": {"maxRetries": 0}})
    operator.cluster.start_pods()
    failing = fails(FailureClass.INTERNAL, TrainerExitCode.INTERNAL)
    operator.cluster.advance({STAGES[0]: failing, STAGES[1]: waits})
    operator.settle()
    assert operator.status.state == "Failed"
    assert SECOND not in operator.jobs


def test_pod_without_room_beside_the_one_at_work_gets_the_room_that_it_leaves() -> None:
    operator = near_the_end()
    operator.cluster.start_pods()
    stored = lacks_room(operator, STAGES[1])
    end_first_stage(operator)
    operator.settle()
    assert operator.jobs[-1] == SECOND
    assert operator.status.stages[1].state is StageState.QUEUED
    has_room(stored)
    operator.settle()
    operator.reconcile()
    assert offered(operator, newest_pod(operator, STAGES[1])) is not None
    assert operator.finish().state == "Succeeded"


def test_pod_that_finds_no_room_on_its_node_makes_way_for_one_that_is_bound_to_none() -> None:
    operator = near_the_end()
    operator.cluster.start_pods()
    lacks_room(operator, STAGES[1])
    end_first_stage(operator)
    operator.settle()
    operator.clock += 19.0
    assert operator.reconcile() == pytest.approx(1.0)
    assert operator.jobs[-1] == SECOND
    operator.clock += 1.0
    operator.settle()
    assert operator.jobs[-1] == f"{SECOND}-2"
    assert not is_bound(operator.cluster.of_kind("Job")[-1])
    assert operator.finish().state == "Succeeded"


def lacks_room(operator: Operator, task: str) -> Object:
    """Let the pod at `task` be one that no node takes."""
    stored = operator.cluster.objects["Pod", newest_pod(operator, task)["metadata"]["name"]]
    stored["status"] = {
        "phase": "Pending",
        "conditions": [{"type": "PodScheduled", "status": "False", "message": "no room"}],
    }
    return stored


def has_room(stored: Object) -> None:
    state = {"running": {"startedAt": "2026-01-01T01:00:00Z"}}
    container = {"name": names.TRAINER_CONTAINER, "state": state}
    stored["status"] = {"phase": "Running", "containerStatuses": [container]}


def is_bound(job: Object) -> bool:
    affinity = job["spec"]["template"]["spec"].get("affinity", {}).get("nodeAffinity", {})
    return "requiredDuringSchedulingIgnoredDuringExecution" in affinity


def test_pod_that_dies_while_it_stands_by_fails_nothing() -> None:
    operator = near_the_end({"spec.runtime": {"maxRetries": 0}})
    operator.cluster.start_pods()
    pod = newest_pod(operator, STAGES[1])
    stored = operator.cluster.objects["Pod", pod["metadata"]["name"]]
    operator.cluster._end_pod(stored, Ending(exit_code=137, reason="OOMKilled"))
    operator.settle()
    status = operator.finish()
    assert status.state == "Succeeded"
    assert status.stages[1].attempts - status.stages[1].attempts_before == 1


@pytest.mark.parametrize("name", ["layers-2-3", "renamed"])
def test_pod_of_another_plan_is_let_go(name: str) -> None:
    operator = near_the_end()
    operator.cluster.start_pods()
    stage = {"name": name, "layers": {"first": 2, "last": 3}, "learningRate": 7e-6}
    first = {"name": "layers-0-1", "layers": {"first": 0, "last": 1}}

    def edit(spec: Object) -> None:
        spec.pop("schedule")
        spec["stages"] = [first, stage]

    operator.progress = {}
    operator.cluster.edit_run("finance-qa", edit)
    operator.settle()
    assert SECOND not in operator.jobs
    assert operator.finish().state == "Succeeded"


def test_pod_made_by_another_spec_of_pods_is_let_go() -> None:
    operator = near_the_end()
    operator.cluster.start_pods()
    operator.cluster.edit_run(
        "finance-qa", lambda spec: spec["runtime"].update(nodeSelector={"disk": "fast"})
    )
    end_first_stage(operator)
    operator.settle()
    assert operator.jobs[-1] == f"{SECOND}-2"
    template = operator.cluster.of_kind("Job")[-1]["spec"]["template"]
    assert template["spec"]["nodeSelector"] == {"disk": "fast"}
    assert operator.finish().state == "Succeeded"


def test_pods_stand_by_in_a_run_that_is_done_again() -> None:
    kept = {"spec.storage": {"size": "10Gi", "retain": "Everything"}}
    operator = begun({**NO_GPU, **kept}, **URL)
    assert operator.finish().state == "Succeeded"

    def order(spec: Object) -> None:
        spec["retry"] = {"number": 1, "fromStage": "layers-0-1"}

    operator.cluster.edit_run("finance-qa", order)
    operator.settle()
    operator.cluster.start_pods()
    operator.settle()
    post(operator, STAGES[0], 10.0)
    operator.settle()
    assert operator.jobs[-1] == f"{SECOND}-2"
    operator.cluster.start_pods()
    operator.cluster.advance({STAGES[1]: waits})
    operator.settle()
    operator.reconcile()
    assert operator.jobs[-1] == f"{SECOND}-2"
    assert offered(operator, newest_pod(operator, STAGES[1])) is not None
    assert operator.finish().state == "Succeeded"


@pytest.mark.parametrize("remains", [True, False], ids=["its-end-is-seen", "it-is-gone"])
def test_accepted_pod_that_is_disrupted_is_followed_by_one_that_is_bound_to_no_node(
    remains: bool,
) -> None:
    operator = near_the_end({"spec.runtime": {"maxRetries": 0}})
    operator.cluster.start_pods()
    end_first_stage(operator)
    operator.settle()
    operator.reconcile()
    operator.cluster.give_files()
    operator.cluster.advance(lambda config, pod: Ending(exit_code=137, is_disrupted=True))
    operator.settle()
    if not remains:
        operator.cluster.drain(STAGES[1])
    operator.cluster.start_pods()
    lacks_room(operator, STAGES[1])
    operator.settle()
    operator.clock += 20.0
    operator.settle()
    assert operator.jobs[-1] == f"{SECOND}-2"
    assert not is_bound(operator.cluster.of_kind("Job")[-1])
    status = operator.finish()
    assert (status.state, status.stages[1].disruptions) == ("Succeeded", 1)


def test_pod_that_may_not_be_made_early_is_made_in_time() -> None:
    operator = first_stage_runs(NO_GPU, **URL)
    operator.cluster.deny = lambda manifest: (
        "exceeded quota" if manifest["metadata"]["name"] == SECOND else None
    )
    post(operator, STAGES[0], 10.0)
    operator.settle()
    assert conditions(operator)["Ready"] == conditions(first_stage_runs(NO_GPU))["Ready"]
    assert operator.jobs[-1] == FIRST
    writes = len(operator.cluster.writes)
    operator.reconcile()
    assert len(operator.cluster.writes) == writes
    operator.cluster.deny = lambda manifest: None
    assert operator.finish().state == "Succeeded"


def test_server_that_cannot_make_a_pod_early_keeps_no_status_from_being_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operator = first_stage_runs(NO_GPU, **URL)
    create = operator.cluster.create

    async def fails_for_it(manifest: Object) -> Object:
        if manifest["metadata"]["name"] == SECOND:
            raise UnavailableError("the webhook does not answer")
        return await create(manifest)

    monkeypatch.setattr(operator.cluster, "create", fails_for_it)
    post(operator, STAGES[0], 10.0)
    operator.settle()
    assert operator.status.stages[0].step == 3
    assert operator.jobs[-1] == FIRST


def test_stage_that_says_that_it_is_done_has_no_pod_made_for_a_moment() -> None:
    assert near_the_end(seconds=0.0).jobs[-1] == FIRST


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_operator_killed_at_any_write_leaves_the_same_end(after: bool) -> None:
    for number in range(1, 100):
        operator = begun(NO_GPU, **URL)
        operator.cluster.crash_at, operator.cluster.crash_after = number, after
        status = finish_with_posts(operator)
        assert status.state == "Succeeded"
        assert [stage.attempts - stage.attempts_before for stage in status.stages] == [1, 1]
        if operator.cluster.crash_at is not None:
            return
    raise AssertionError("every run was crashed")


def finish_with_posts(operator: Operator) -> Any:
    """Bring a run to its end whose stages always have ten seconds left."""

    class Near(dict[str, Any]):
        def get(self, task: str, default: Any = None) -> Any:
            pods = [
                pod
                for pod in operator.cluster.of_kind("Pod")
                if pod["metadata"]["labels"][names.LABEL_TASK] == task and not stands_by(pod)
            ]
            return Posted(pods[-1]["metadata"]["uid"], 3, 10.0) if pods else default

    operator.progress = Near()
    return operator.finish(succeeds)
