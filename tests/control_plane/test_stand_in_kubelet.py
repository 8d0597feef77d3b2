"""The stand-in node: the real scheduler and Job controller take it for one."""

import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import pytest

from local_cluster.api import Cluster
from stand_in_kubelet import Ended, NeverStarts, Program, Runs, StandInKubelet

pytestmark = pytest.mark.control_plane

Object = dict[str, Any]
SECONDS = 30
shut_down: set[str] = set()
"""Jobs that have lost a pod to the node's shutdown."""


def script(pod: Object) -> Program | NeverStarts:
    """Do what the pod's annotation says."""
    match pod["metadata"]["annotations"]["test/program"]:
        case "succeeds":
            return Runs(seconds=0.2, then=Ended(message='{"outcome": "Succeeded"}'))
        case "fails":
            return Runs(then=Ended(exit_code=40, message="no such column"))
        case "is killed":
            return Runs(then=Ended(exit_code=137, reason="OOMKilled"))
        case "is shut down once" if pod["metadata"]["labels"]["job-name"] not in shut_down:
            shut_down.add(pod["metadata"]["labels"]["job-name"])
            return Runs(then=Ended(exit_code=143, disruption="TerminationByKubelet"))
        case "has no image":
            return NeverStarts()
        case "saves when asked":
            return Runs(seconds=3600, on_stop=Ended(exit_code=45, message="saved"))
        case _:
            return Runs(seconds=3600, on_stop=None)


@pytest.fixture(scope="module")
def node(cluster: Cluster) -> Iterator[StandInKubelet]:
    with StandInKubelet(cluster.kubeconfig, script) as kubelet:
        yield kubelet


class Jobs:
    """Jobs in a namespace, whose pods follow the script."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self._cluster = cluster
        self._namespace = namespace

    def create(self, program: str, **pod_spec: Any) -> str:
        container = {
            "name": "trainer",
            "image": "registry.example/trainer",
            "resources": {"limits": {"nvidia.com/gpu": 1}},
        }
        pod: Object = {
            "metadata": {"annotations": {"test/program": program}},
            "spec": {"restartPolicy": "Never", "containers": [container], **pod_spec},
        }
        ignored = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"generateName": "job-"},
            "spec": {
                "backoffLimit": 0,
                "podReplacementPolicy": "Failed",
                "podFailurePolicy": {"rules": [ignored]},
                "template": pod,
            },
        }
        path = f"/apis/batch/v1/namespaces/{self._namespace}/jobs"
        made = self._cluster.request("POST", path, job)
        assert made.status == HTTPStatus.CREATED, made.message
        name: str = made.body["metadata"]["name"]
        return name

    def get(self, name: str) -> Object:
        path = f"/apis/batch/v1/namespaces/{self._namespace}/jobs/{name}"
        job: Object = self._cluster.request("GET", path).body
        return job

    def pods(self, name: str) -> list[Object]:
        query = f"labelSelector=job-name%3D{name}"
        path = f"/api/v1/namespaces/{self._namespace}/pods?{query}"
        items: list[Object] = self._cluster.request("GET", path).body["items"]
        return sorted(items, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def await_condition(self, name: str, type: str) -> Object:
        def found() -> Object | None:
            conditions = self.get(name).get("status", {}).get("conditions", ())
            return next((item for item in conditions if item["type"] == type), None)

        return await_value(found, f"Job {name} {type}")

    def await_phase(self, name: str, phase: str) -> Object:
        def found() -> Object | None:
            pods = [pod for pod in self.pods(name) if pod["status"].get("phase") == phase]
            return pods[-1] if pods else None

        return await_value(found, f"pod of {name} {phase}")

    def evict(self, pod: Object) -> None:
        metadata = pod["metadata"]
        eviction = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": metadata["name"], "namespace": self._namespace},
        }
        path = f"/api/v1/namespaces/{self._namespace}/pods/{metadata['name']}/eviction"
        assert self._cluster.request("POST", path, eviction).status == HTTPStatus.CREATED


@pytest.fixture
def jobs(cluster: Cluster, namespace: str, node: StandInKubelet) -> Jobs:
    return Jobs(cluster, namespace)


def await_value(find: Callable[[], Object | None], what: str) -> Object:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        value = find()
        if value is not None:
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come within {SECONDS} s")


def terminated(pod: Object) -> Object:
    state: Object = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    return state


def test_a_job_completes(jobs: Jobs, node: StandInKubelet) -> None:
    name = jobs.create("succeeds")
    jobs.await_condition(name, "Complete")
    pod = jobs.await_phase(name, "Succeeded")
    assert pod["spec"]["nodeName"] == node.node
    assert terminated(pod)["message"] == '{"outcome": "Succeeded"}'
    assert terminated(pod)["startedAt"] <= terminated(pod)["finishedAt"]


@pytest.mark.parametrize(
    ("program", "exit_code", "reason"), [("fails", 40, "Error"), ("is killed", 137, "OOMKilled")]
)
def test_a_job_fails_with_what_its_program_says(
    jobs: Jobs, program: str, exit_code: int, reason: str
) -> None:
    name = jobs.create(program)
    jobs.await_condition(name, "Failed")
    state = terminated(jobs.await_phase(name, "Failed"))
    assert (state["exitCode"], state["reason"]) == (exit_code, reason)


def test_a_container_without_an_image_waits(jobs: Jobs) -> None:
    name = jobs.create("has no image")

    def waiting() -> Object | None:
        for pod in jobs.pods(name):
            for container in pod["status"].get("containerStatuses", ()):
                state: Object | None = container["state"].get("waiting")
                return state
        return None

    assert await_value(waiting, "waiting container")["reason"] == "ImagePullBackOff"
    assert not jobs.get(name)["status"].get("failed")


def test_an_evicted_pod_ends_as_its_program_says_and_the_job_makes_another(jobs: Jobs) -> None:
    name = jobs.create("saves when asked")
    first = jobs.await_phase(name, "Running")
    jobs.evict(first)

    def second() -> Object | None:
        pods = jobs.pods(name)
        others = [pod for pod in pods if pod["metadata"]["uid"] != first["metadata"]["uid"]]
        return others[0] if others and others[0]["status"].get("phase") == "Running" else None

    await_value(second, "replacement")
    status = jobs.get(name)["status"]
    assert status["active"] == 1
    # The pod failure policy ignores it, so it was no failure of the Job.
    assert not status.get("conditions")
    assert not status.get("failed")


def test_a_pod_that_the_node_shuts_down_is_no_failure_of_its_job(jobs: Jobs) -> None:
    name = jobs.create("is shut down once")
    pod = jobs.await_phase(name, "Failed")
    conditions = {item["type"]: item for item in pod["status"]["conditions"]}
    assert conditions["DisruptionTarget"]["reason"] == "TerminationByKubelet"

    def replaced() -> Object | None:
        pods = jobs.pods(name)
        return pods[-1] if len(pods) > 1 else None

    await_value(replaced, "replacement")


def test_a_program_that_does_not_listen_is_killed_after_the_grace(jobs: Jobs) -> None:
    name = jobs.create("ignores everything", terminationGracePeriodSeconds=1)
    first = jobs.await_phase(name, "Running")
    jobs.evict(first)

    def gone() -> Object | None:
        uids = [pod["metadata"]["uid"] for pod in jobs.pods(name)]
        return None if first["metadata"]["uid"] in uids else {}

    await_value(gone, "end of the first pod")


def test_what_does_not_fit_the_node_is_not_started(jobs: Jobs) -> None:
    container = {
        "name": "trainer",
        "image": "registry.example/trainer",
        "resources": {"limits": {"nvidia.com/gpu": 1000}},
    }
    name = jobs.create("succeeds", containers=[container])

    def unschedulable() -> Object | None:
        for pod in jobs.pods(name):
            for condition in pod["status"].get("conditions", ()):
                if condition.get("reason") == "Unschedulable":
                    found: Object = condition
                    return found
        return None

    assert "nvidia.com/gpu" in await_value(unschedulable, "refusal")["message"]
