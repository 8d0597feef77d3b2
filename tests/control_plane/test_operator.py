"""The operator as a process, against the real API server, scheduler and Job controller.

Pods end by script (`stand_in_kubelet`), so each transition takes a moment and none is left out.
`tests/unit/test_reconcile.py` goes through every fault; here are those in which the real server's
answers decide.
"""

import asyncio
import copy
import json
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from fake_cluster import report_for
from local_cluster.api import Cluster
from manifest_cases import edited
from operator_process import OperatorProcess
from stagetune_api import names
from stagetune_api.names import TrainerExitCode
from stagetune_api.report import Failure, FailureClass, Outcome
from stagetune_api.stage import StageConfig
from stand_in_kubelet import Ended, NeverStarts, Program, Runs, StandInKubelet

pytestmark = pytest.mark.control_plane

Object = dict[str, Any]
SECONDS = 60
STAGES = ("01-layers-0-1", "02-layers-2-3")
TASKS = ("prepare", *STAGES, "evaluate", "export")
STOPPED = Ended(exit_code=int(TrainerExitCode.INTERRUPTED))


def succeed(pod: Object) -> Ended:
    text = pod["metadata"]["annotations"][names.ANNOTATION_STAGE_CONFIG]
    return Ended(message=report_for(StageConfig.model_validate_json(text)).termination_message())


def fail(pod: Object, failure_class: FailureClass, code: TrainerExitCode, message: str) -> Ended:
    text = pod["metadata"]["annotations"][names.ANNOTATION_STAGE_CONFIG]
    failure = Failure(failure_class=failure_class, exit_code=int(code), message=message)
    report = report_for(StageConfig.model_validate_json(text)).model_copy(
        update={"outcome": Outcome.FAILED, "failure": failure, "output": None, "train": None}
    )
    return Ended(exit_code=int(code), message=report.termination_message())


class World:
    """Runs in a namespace, and what their pods do."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.scripts: dict[tuple[str, str], list[Program | NeverStarts]] = {}
        self._path = f"/apis/{names.API_VERSION}/namespaces/{namespace}/{names.PLURAL}"

    def script(self, pod: Object) -> Program | NeverStarts:
        """Return what a pod does: what is next for its run and task, else it succeeds at once."""
        labels = pod["metadata"]["labels"]
        queued = self.scripts.get((labels[names.LABEL_RUN], labels[names.LABEL_TASK]))
        return queued.pop(0) if queued else Runs(then=succeed(pod))

    def apply(self, name: str, **edits: Any) -> None:
        manifest = edited(
            {
                "metadata.name": name,
                "metadata.namespace": self.namespace,
                "metadata.uid": None,
                "spec.dataset.source": "pvc://rows/finance.jsonl",
                "spec.schedule": {"layersPerStage": 2},
                "spec.runtime": {"resources": {"limits": {"nvidia.com/gpu": 1}}},
                "spec.storage": {"claimName": "shared"},
                **edits,
            }
        )
        self.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))

    def patch(self, name: str, spec: Object) -> None:
        answer = self.cluster.request(
            "PATCH", f"{self._path}/{name}", {"spec": spec}, "application/merge-patch+json"
        )
        assert answer.status == HTTPStatus.OK, answer.message

    def run(self, name: str) -> Object:
        answer = self.cluster.request("GET", f"{self._path}/{name}")
        assert answer.status == HTTPStatus.OK, answer.message
        body: Object = answer.body
        return body

    def status(self, name: str) -> Object:
        return self.run(name).get("status", {})

    def jobs(self, name: str) -> list[str]:
        path = f"/apis/batch/v1/namespaces/{self.namespace}/jobs"
        answer = self.cluster.request("GET", f"{path}?labelSelector={names.LABEL_RUN}%3D{name}")
        items = sorted(
            answer.body["items"],
            key=lambda job: (job["metadata"]["creationTimestamp"], job["metadata"]["name"]),
        )
        return [job["metadata"]["name"] for job in items]

    def await_status(self, name: str, holds: Callable[[Object], bool], what: str) -> Object:
        deadline = time.monotonic() + SECONDS
        while not holds(status := self.status(name)):
            assert time.monotonic() < deadline, f"{name}: no {what}: {json.dumps(status)[-3000:]}"
            time.sleep(0.05)
        return status

    def await_state(self, name: str, *states: str) -> Object:
        return self.await_status(
            name, lambda status: status.get("state") in states, " or ".join(states)
        )

    def events(self, name: str) -> list[Object]:
        path = f"/api/v1/namespaces/{self.namespace}/events"
        answer = self.cluster.request("GET", f"{path}?fieldSelector=involvedObject.name%3D{name}")
        items: list[Object] = answer.body["items"]
        return items


@pytest.fixture(scope="module")
def world(cluster: Cluster, crd: str, namespace: str) -> Iterator[World]:
    world = World(cluster, namespace)
    # There is no volume and no kubelet to mount one; the scheduler wants bound claims.
    for claim in ("shared", "rows"):
        bind_claim(cluster, namespace, claim)
    with StandInKubelet(cluster.kubeconfig, world.script, node="operators-node"):
        yield world


def bind_claim(cluster: Cluster, namespace: str, name: str) -> None:
    volume = f"{namespace}-{name}"
    spec = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    size = {"storage": "1Gi"}
    claim_reference = {"namespace": namespace, "name": name}
    for document in (
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": volume},
            "spec": {
                **spec,
                "capacity": size,
                "hostPath": {"path": "/nowhere"},
                "claimRef": claim_reference,
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {**spec, "resources": {"requests": size}, "volumeName": volume},
        },
    ):
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(document))


@pytest.fixture(scope="module")
def operator(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    log = tmp_path_factory.mktemp("operator") / "log.txt"
    settings = {"NAMESPACES": world.namespace, "RETRY_DELAY_SECONDS": "0.1"}
    with OperatorProcess(world.cluster.kubeconfig, log, settings) as process:
        yield process


def test_run_goes_to_its_end_and_kubectl_shows_it(world: World, operator: OperatorProcess) -> None:
    world.apply("whole")
    waited = world.cluster.kubectl(
        *("-n", world.namespace, "wait", "--for=condition=Finished", "--timeout=60s", "sft/whole")
    )
    assert "condition met" in waited
    status = world.await_state("whole", "Succeeded")
    assert set(world.jobs("whole")) == {f"whole-{task}" for task in TASKS}
    shown = world.cluster.kubectl("-n", world.namespace, "get", "sft", "whole")
    assert "Succeeded" in shown
    assert "100%" in shown
    assert "2/2" in shown
    reasons = [event["reason"] for event in world.events("whole")]
    assert {"Prepared", "Planned", "Trained", "Evaluated", "Exported", "Completed"} == set(reasons)
    described = world.cluster.kubectl("-n", world.namespace, "describe", "sft", "whole")
    assert "stage 1/2 layers-0-1 is done, validation loss 1.0000" in described
    assert all(item["observedGeneration"] == 1 for item in status["conditions"])
    assert all(stage["queuedSeconds"] >= 0 for stage in status["stages"])


def test_manifest_that_cannot_run_here_is_refused_with_all_reasons(
    world: World, operator: OperatorProcess
) -> None:
    world.apply("refused", **{"spec.storage": None, "spec.dataset.source": "file://x.jsonl"})
    status = world.await_state("refused", "Failed")
    stalled = next(item for item in status["conditions"] if item["type"] == "Stalled")
    assert stalled["status"] == "True"
    assert stalled["reason"] == "InvalidSpec"
    assert "spec.storage" in stalled["message"]
    assert "spec.dataset.source" in stalled["message"]
    assert world.jobs("refused") == []


def test_failure_is_shown_with_class_code_and_message_and_ends_the_run(
    world: World, operator: OperatorProcess
) -> None:
    world.scripts["failing", STAGES[0]] = [_Failing()]
    world.apply("failing")
    status = world.await_state("failing", "Failed")
    failure = status["stages"][0]["lastFailure"]
    assert failure["class"] == "UserError"
    assert failure["exitCode"] == 40
    assert failure["message"] == "row 7 has no answer"
    assert len(world.jobs("failing")) == 2
    described = world.cluster.kubectl("-n", world.namespace, "describe", "sft", "failing")
    assert "row 7 has no answer" in described
    world.patch("failing", {"retry": {"number": 1}})
    world.await_state("failing", "Succeeded")


class _Failing:
    """A trainer that finds a mistake in the data."""

    async def __call__(self, pod: Object, stop: asyncio.Event) -> Ended:
        return fail(pod, FailureClass.USER_ERROR, TrainerExitCode.USER_ERROR, "row 7 has no answer")


def test_drained_pod_is_replaced_by_its_job_and_not_counted(
    world: World, operator: OperatorProcess
) -> None:
    disrupted = Ended(exit_code=143, disruption="EvictionByEvictionAPI")
    world.scripts["drained", STAGES[0]] = [Runs(then=disrupted), Runs(then=STOPPED)]
    world.apply("drained")
    status = world.await_state("drained", "Succeeded")
    assert status["stages"][0]["attempts"] == 1
    assert status["stages"][0]["disruptions"] == 2
    assert len(world.jobs("drained")) == len(TASKS)


def test_out_of_memory_is_tried_again_with_half_the_micro_batch(
    world: World, operator: OperatorProcess
) -> None:
    killed = Ended(exit_code=137, reason="OOMKilled")
    world.scripts["hungry", STAGES[0]] = [Runs(then=killed)]
    training = {"learningRate": 1e-4, "batchSize": 8, "microBatchSize": 8}
    world.apply("hungry", **{"spec.training": training})
    status = world.await_state("hungry", "Succeeded")
    assert status["stages"][0]["microBatchSize"] == 4
    assert status["stages"][0]["attempts"] == 2


def test_suspension_saves_and_frees_the_pod_and_resuming_goes_on(
    world: World, operator: OperatorProcess
) -> None:
    world.scripts["paused", STAGES[0]] = [Runs(seconds=3600, on_stop=STOPPED)]
    world.apply("paused")
    world.await_state("paused", "Training")
    world.patch("paused", {"suspend": True})
    status = world.await_status(
        "paused",
        lambda status: any(
            item["type"] == "Suspended" and item["status"] == "True"
            for item in status["conditions"]
        ),
        "suspension",
    )
    assert status["state"] == "Suspended"
    assert f"paused-{STAGES[0]}" not in world.jobs("paused")
    world.patch("paused", {"suspend": False})
    status = world.await_state("paused", "Succeeded")
    assert f"paused-{STAGES[0]}-2" in world.jobs("paused")


def test_quota_is_shown_and_waited_for(world: World, operator: OperatorProcess) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "no-jobs", "namespace": world.namespace},
        "spec": {"hard": {"count/jobs.batch": "0"}},
    }
    world.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(quota))
    try:
        path = f"/api/v1/namespaces/{world.namespace}/resourcequotas/no-jobs"
        deadline = time.monotonic() + SECONDS
        while not world.cluster.request("GET", path).body.get("status", {}).get("hard"):
            assert time.monotonic() < deadline, "the quota does not come into force"
            time.sleep(0.05)
        world.apply("waiting")
        status = world.await_status(
            "waiting",
            lambda status: any(
                item["reason"] == "CannotCreate" for item in status.get("conditions", [])
            ),
            "word of the quota",
        )
        reconciling = next(i for i in status["conditions"] if i["type"] == "Reconciling")
        assert "exceeded quota: no-jobs" in reconciling["message"]
    finally:
        world.cluster.kubectl("-n", world.namespace, "delete", "quota", "no-jobs")
    # A change wakes the run before its next look.
    world.patch("waiting", {"runtime": {"maxRetries": 2}})
    world.await_state("waiting", "Succeeded")


def test_foreign_job_of_the_same_name_is_left_alone(
    world: World, operator: OperatorProcess
) -> None:
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "taken-prepare", "namespace": world.namespace},
        "spec": {
            "suspend": True,
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    "containers": [{"name": "other", "image": "other"}],
                }
            },
        },
    }
    world.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(job))
    world.apply("taken")
    status = world.await_status(
        "taken",
        lambda status: any(
            item["reason"] == "NameConflict" for item in status.get("conditions", [])
        ),
        "conflict",
    )
    assert "taken-prepare" in status["conditions"][0]["message"]
    world.cluster.kubectl("-n", world.namespace, "delete", "job", "taken-prepare")
    world.patch("taken", {"runtime": {"maxRetries": 2}})
    world.await_state("taken", "Succeeded")


def test_pending_stage_can_be_edited_and_a_started_one_cannot(
    world: World, operator: OperatorProcess
) -> None:
    stages = [
        {"name": "lower", "layers": {"first": 0, "last": 1}},
        {"name": "upper", "layers": {"first": 2, "last": 3}},
    ]
    world.scripts["edited", "01-lower"] = [Runs(seconds=3600, on_stop=STOPPED)]
    world.apply("edited", **{"spec.schedule": None, "spec.stages": stages})
    before = world.await_state("edited", "Training")
    changed = copy.deepcopy(stages)
    changed[0]["epochs"] = 2.0
    path = f"/apis/{names.API_VERSION}/namespaces/{world.namespace}/{names.PLURAL}/edited"
    answer = world.cluster.request(
        "PATCH", path, {"spec": {"stages": changed}}, "application/merge-patch+json"
    )
    assert answer.status == HTTPStatus.UNPROCESSABLE_ENTITY
    assert "a stage that has started keeps its fields" in answer.message
    changed = copy.deepcopy(stages)
    changed[1]["epochs"] = 2.0
    world.patch("edited", {"stages": changed})
    after = world.await_status(
        "edited", lambda status: status["planDigest"] != before["planDigest"], "new plan"
    )
    assert after["stages"][1]["totalSteps"] == 2 * before["stages"][1]["totalSteps"]
    world.cluster.kubectl("-n", world.namespace, "delete", "sft", "edited", "--wait=true")


def test_deleted_run_takes_its_jobs_along_also_while_the_operator_is_away(
    world: World, operator: OperatorProcess
) -> None:
    world.scripts["deleted", STAGES[0]] = [Runs(seconds=3600, on_stop=STOPPED)]
    world.apply("deleted")
    world.await_state("deleted", "Training")
    operator.kill()
    try:
        world.cluster.kubectl(
            "-n", world.namespace, "delete", "sft", "deleted", "--wait=true", "--timeout=30s"
        )
        deadline = time.monotonic() + SECONDS
        while world.jobs("deleted"):
            assert time.monotonic() < deadline, "the Jobs stay"
            time.sleep(0.1)
    finally:
        operator.start()


def test_operator_that_is_killed_goes_on_where_the_runs_are(
    world: World, operator: OperatorProcess
) -> None:
    runs = [f"survivor-{number}" for number in range(6)]
    for index, name in enumerate(runs):
        # Each has its long pod at another task, so that the kill meets every kind of it.
        task = TASKS[index % len(TASKS)]
        world.scripts[name, task] = [Lasting(2.0)]
        world.apply(name)
    for _ in range(4):
        time.sleep(0.7)
        operator.kill()
        operator.start(wait=False)
    for name in runs:
        status = world.await_state(name, "Succeeded")
        assert [stage["attempts"] for stage in status["stages"]] == [1, 1], name
        assert len(world.jobs(name)) == len(TASKS), name


class Lasting:
    """A trainer that takes its time and succeeds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def __call__(self, pod: Object, stop: asyncio.Event) -> Ended:
        await asyncio.sleep(self._seconds)
        return succeed(pod)


def test_operator_says_nothing_of_what_is_over(world: World, operator: OperatorProcess) -> None:
    world.apply("over")
    world.await_state("over", "Succeeded")
    version = world.run("over")["metadata"]["resourceVersion"]
    operator.kill()
    operator.start()
    world.apply("after")
    world.await_state("after", "Succeeded")
    assert world.run("over")["metadata"]["resourceVersion"] == version


def test_log_holds_no_errors(world: World, operator: OperatorProcess) -> None:
    text = Path(operator.log).read_text()
    assert "Traceback" not in text, text[-4000:]
    assert "Forbidden" not in text
