"""The store: what the watches last said, whatever order they said it in."""

from typing import Any

import pytest

from stagetune_api import names
from stagetune_operator.keys import RunKey
from stagetune_operator.store import Snapshot, Store

KEY = RunKey("team", "finance")
Object = dict[str, Any]


def run(uid: str = "run-1", created: str = "2026-01-01T00:00:00Z", **spec: Any) -> Object:
    metadata = {"namespace": "team", "name": "finance", "uid": uid, "creationTimestamp": created}
    return {"apiVersion": names.API_VERSION, "metadata": metadata, "spec": spec}


def child(uid: str, spec: Object, run_name: str | None = "finance", **metadata: Any) -> Object:
    labels = {} if run_name is None else {names.LABEL_RUN: run_name}
    base = {"namespace": "team", "name": uid, "uid": uid, "labels": labels}
    return {"metadata": {**base, **metadata}, "spec": spec, "status": {"phase": "Running"}}


def job(uid: str = "job-1", **metadata: Any) -> Object:
    return child(uid, {"suspend": False, "template": {"spec": {"containers": []}}}, **metadata)


def pod(uid: str = "pod-1", **metadata: Any) -> Object:
    resources = {"limits": {"nvidia.com/gpu": "1"}}
    container = {"name": "trainer", "resources": resources, "env": [{"name": "A", "value": "B"}]}
    return child(uid, {"nodeName": "node-1", "containers": [container], "volumes": []}, **metadata)


def uids(objects: list[Object]) -> list[str]:
    return sorted(item["metadata"]["uid"] for item in objects)


def test_a_run_comes_with_its_jobs_and_pods() -> None:
    store = Store()
    assert not store.knows(KEY)
    assert store.apply_run(None, run()) == KEY
    assert store.knows(KEY)
    assert store.apply_job("ADDED", job("job-1")) == KEY
    assert store.apply_job("ADDED", job("job-2")) == KEY
    assert store.apply_pod("MODIFIED", pod()) == KEY
    store.apply_job("ADDED", {**job("job-3", run_name="other")})

    snapshot = store.snapshot(KEY)
    assert snapshot.run is not None
    assert uids(snapshot.jobs) == ["job-1", "job-2"]
    assert uids(snapshot.pods) == ["pod-1"]
    assert store.keys() == [KEY]


def test_of_a_run_that_was_never_heard_of_there_is_nothing() -> None:
    assert Store().snapshot(KEY) == Snapshot(run=None, jobs=[], pods=[])


def test_an_object_without_the_runs_label_is_passed_over() -> None:
    store = Store()
    assert store.apply_job("ADDED", job(run_name=None)) is None
    assert store.apply_pod("ADDED", pod(run_name=None)) is None
    assert store.pod_by_uid("pod-1") is None


def test_what_is_deleted_is_gone_and_leaves_nothing() -> None:
    store = Store()
    for apply, item in (
        (store.apply_run, run()),
        (store.apply_job, job()),
        (store.apply_pod, pod()),
    ):
        apply("ADDED", item)
        apply("DELETED", item)
        apply("DELETED", item)
    assert store.snapshot(KEY) == Snapshot(run=None, jobs=[], pods=[])
    assert store.keys() == []
    assert not store.knows(KEY)
    assert store.pod_by_uid("pod-1") is None


@pytest.mark.parametrize("late_event", ["MODIFIED", "DELETED"])
def test_a_late_event_of_a_run_before_does_not_hide_the_one_that_has_its_name_now(
    late_event: str,
) -> None:
    store = Store()
    old = run("run-1", "2026-01-01T00:00:00Z")
    new = run("run-2", "2026-01-02T00:00:00Z", suspend=True)
    store.apply_run("ADDED", old)
    store.apply_run("ADDED", new)
    store.apply_run(late_event, old)
    current = store.snapshot(KEY).run
    assert current is not None
    assert current["metadata"]["uid"] == "run-2"
    assert store.runs() == [(KEY, current)]

    store.apply_run("DELETED", old)
    assert store.keys() == [KEY]
    store.apply_run("DELETED", new)
    assert store.keys() == []


def test_what_is_never_read_is_not_kept() -> None:
    annotations = {
        names.ANNOTATION_STAGE_CONFIG: "{}" * 5000,
        "kubectl.kubernetes.io/last-applied-configuration": "{}",
        names.ANNOTATION_CONFIG_DIGEST: "sha256:1",
    }
    bulk = {"managedFields": [{"manager": "kubectl"}], "annotations": annotations}
    store = Store()
    store.apply_job("ADDED", job(**bulk))
    store.apply_pod("ADDED", pod(**bulk))
    snapshot = store.snapshot(KEY)
    for item in (*snapshot.jobs, *snapshot.pods):
        assert "managedFields" not in item["metadata"]
        assert item["metadata"]["annotations"] == {names.ANNOTATION_CONFIG_DIGEST: "sha256:1"}
    assert snapshot.jobs[0]["spec"] == {"suspend": False}
    resources = {"limits": {"nvidia.com/gpu": "1"}}
    container = {"name": "trainer", "resources": resources}
    assert snapshot.pods[0]["spec"] == {"nodeName": "node-1", "containers": [container]}


def test_the_body_of_an_event_is_left_as_it_was() -> None:
    body = pod(managedFields=[{}], annotations={names.ANNOTATION_STAGE_CONFIG: "{}"})
    Store().apply_pod("ADDED", body)
    assert body["metadata"]["managedFields"] == [{}]
    assert names.ANNOTATION_STAGE_CONFIG in body["metadata"]["annotations"]
    assert "volumes" in body["spec"]


def test_what_nobody_saw_go_can_be_forgotten_by_its_uid() -> None:
    store = Store()
    store.apply_run("ADDED", run())
    store.apply_job("ADDED", job("job-1"))
    store.apply_job("ADDED", job("job-2"))
    store.apply_pod("ADDED", pod())
    assert store.run_versions("team").keys() == store.run_versions().keys() == {"run-1"}
    assert store.run_versions("other") == {}
    assert store.job_versions().keys() == {"job-1", "job-2"}
    assert store.pod_versions().keys() == {"pod-1"}

    assert store.forget(["job-1", "pod-1", "unknown"]) == {KEY}
    snapshot = store.snapshot(KEY)
    assert uids(snapshot.jobs) == ["job-2"]
    assert snapshot.pods == []
    assert store.pod_by_uid("pod-1") is None
    assert store.forget(["run-1"]) == {KEY}
    assert store.keys() == []
    assert store.forget([]) == set()


def test_an_event_that_is_older_than_what_is_known_is_passed_over() -> None:
    store = Store()
    store.apply_job("ADDED", job("job-1", resourceVersion="9", annotations={"at": "first"}))
    store.apply_job("MODIFIED", job("job-1", resourceVersion="10", annotations={"at": "now"}))
    store.apply_job("MODIFIED", job("job-1", resourceVersion="9", annotations={"at": "late"}))
    (known,) = store.snapshot(KEY).jobs
    assert known["metadata"]["annotations"]["at"] == "now"
    assert store.job_versions() == {"job-1": 10}
    # A list brings things back to where a watch goes on from.
    store.apply_job(None, job("job-1", resourceVersion="8", annotations={"at": "listed"}))
    assert store.job_versions() == {"job-1": 8}
