"""The operator's calls against a real API server: what is refused, and in which of our words."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from local_cluster import api
from manifest_cases import edited
from stagetune_api import names
from stagetune_operator.cluster import Cluster
from stagetune_operator.connection import KUBECONFIG_VARIABLE, connect, open_watch_session
from stagetune_operator.errors import (
    AlreadyExistsError,
    ConflictError,
    DeniedError,
    GoneError,
    UnavailableError,
)
from stagetune_operator.keys import RunKey
from stagetune_operator.resources import Collection

pytestmark = pytest.mark.control_plane

Object = dict[str, Any]
Visit = Callable[[Cluster], Awaitable[None]]


class Site:
    """A namespace, the operator's calls into it, and the tests' own."""

    def __init__(self, tests: api.Cluster, namespace: str) -> None:
        self.tests = tests
        self.namespace = namespace
        self.writes: list[tuple[str, str]] = []

    def calls(self, visit: Visit) -> None:
        """Have `visit` make calls as the operator does."""

        async def main() -> None:
            async with connect() as client:
                await visit(Cluster(client, lambda kind, verb: self.writes.append((kind, verb))))

        asyncio.run(main())

    def send(self, method: str, path: str, body: Any = None, expected: int = 201) -> Object:
        answer = self.tests.request(method, path, body)
        assert answer.status == expected, answer.message
        found: Object = answer.body
        return found

    def core(self, plural: str) -> str:
        return f"/api/v1/namespaces/{self.namespace}/{plural}"

    def create_run(self, name: str) -> Object:
        document = edited({"metadata.name": name, "metadata.namespace": self.namespace})
        return self.send("POST", Collection.RUNS.path(self.namespace), document)

    def job(self, name: str, **metadata: Any) -> Object:
        container = {"name": "trainer", "image": "registry.example/trainer"}
        pod = {"spec": {"restartPolicy": "Never", "containers": [container]}}
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": name, "namespace": self.namespace, **metadata},
            "spec": {"suspend": True, "template": pod},
        }

    def config_map(self, name: str) -> Object:
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name, "namespace": self.namespace},
            "data": {"plan": "{}"},
        }


@pytest.fixture
def site(cluster: api.Cluster, crd: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv(KUBECONFIG_VARIABLE, str(cluster.kubeconfig))
    metadata = {"generateName": "stagetune-cluster-"}
    made = cluster.request("POST", "/api/v1/namespaces", {"metadata": metadata})
    assert made.status == HTTPStatus.CREATED, made.message
    name = made.body["metadata"]["name"]
    yield Site(cluster, name)
    cluster.request("DELETE", f"/api/v1/namespaces/{name}")


def test_what_is_not_there_is_none(site: Site) -> None:
    async def visit(cluster: Cluster) -> None:
        key = RunKey(site.namespace, "none")
        assert await cluster.read_run(key) is None
        assert await cluster.read_config_map(site.namespace, "none") is None
        assert await cluster.read_claim(site.namespace, "none") is None
        assert await cluster.list_jobs(key) == []
        assert await cluster.list_pods(key) == []

    site.calls(visit)


def test_objects_are_created_once_and_found_by_their_run(site: Site) -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "finance", "namespace": site.namespace},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }

    async def visit(cluster: Cluster) -> None:
        labels = {names.LABEL_RUN: "finance", names.LABEL_MANAGED_BY: names.MANAGED_BY}
        manifests = [
            site.job("finance-prepare", labels=labels),
            site.config_map("finance-plan"),
            claim,
        ]
        for manifest in manifests:
            made = await cluster.create(manifest)
            assert made["metadata"]["uid"]
            with pytest.raises(AlreadyExistsError, match="already exists"):
                await cluster.create(manifest)
        assert site.writes == [
            ("Job", "create"),
            ("ConfigMap", "create"),
            ("PersistentVolumeClaim", "create"),
        ]
        await cluster.create(site.job("other-prepare", labels={names.LABEL_RUN: "other"}))
        (found,) = await cluster.list_jobs(RunKey(site.namespace, "finance"))
        assert found["metadata"]["name"] == "finance-prepare"
        assert (found["apiVersion"], found["kind"]) == ("batch/v1", "Job")
        plan = await cluster.read_config_map(site.namespace, "finance-plan")
        assert plan is not None
        assert plan["data"] == {"plan": "{}"}
        assert await cluster.read_claim(site.namespace, "finance") is not None
        # The other one lacks the label of what the operator manages.
        listed = await cluster.list_versions(Collection.JOBS, site.namespace)
        assert listed == {
            found["metadata"]["uid"]: (
                RunKey(site.namespace, "finance"),
                int(found["metadata"]["resourceVersion"]),
            )
        }

    site.calls(visit)


def test_a_long_list_is_read_to_its_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagetune_operator.cluster.LIST_PAGE_SIZE", 2)

    async def visit(cluster: Cluster) -> None:
        labels = {names.LABEL_RUN: "finance", names.LABEL_MANAGED_BY: names.MANAGED_BY}
        for number in range(5):
            await cluster.create(site.job(f"finance-{number}", labels=labels))
        assert len(await cluster.list_jobs(RunKey(site.namespace, "finance"))) == 5
        assert len(await cluster.list_versions(Collection.JOBS, site.namespace)) == 5

    site.calls(visit)


def test_a_refusal_is_in_the_servers_words(site: Site) -> None:
    quota = {"metadata": {"name": "no-jobs"}, "spec": {"hard": {"count/jobs.batch": "0"}}}
    site.send("POST", site.core("resourcequotas"), quota)
    until = f"{site.core('resourcequotas')}/no-jobs"
    site.tests.kubectl(
        "wait",
        "--for=jsonpath={.status.hard}",
        "--timeout=30s",
        "-n",
        site.namespace,
        "resourcequota/no-jobs",
    )
    assert site.send("GET", until, expected=200)["status"]["hard"]

    async def visit(cluster: Cluster) -> None:
        with pytest.raises(DeniedError, match="exceeded quota: no-jobs"):
            await cluster.create(site.job("over"))
        with pytest.raises(DeniedError, match=r"metadata\.name: Invalid value"):
            await cluster.create(site.config_map("No_Name"))
        nowhere = site.config_map("plan")
        nowhere["metadata"]["namespace"] = "not-there"
        with pytest.raises(GoneError, match="not-there"):
            await cluster.create(nowhere)
        assert site.writes == []

    site.calls(visit)


def test_a_status_is_replaced_whole_and_nothing_else_is(site: Site) -> None:
    run = site.create_run("finance")
    key = RunKey(site.namespace, "finance")

    async def visit(cluster: Cluster) -> None:
        first = await cluster.write_status(
            run, {"state": "Training", "loss": "2.5", "stages": [], "eta": "2m"}
        )
        assert first["status"]["loss"] == "2.5"
        # As the store keeps it, or with a spec that somebody has changed in memory.
        tampered = {**first, "spec": {**first["spec"], "suspend": True}}
        second = await cluster.write_status(tampered, {"state": "Training"})
        live = await cluster.read_run(key)
        assert live is not None
        assert live == second
        assert live["status"] == {"state": "Training"}
        assert live["spec"] == run["spec"]
        assert live["metadata"]["generation"] == run["metadata"]["generation"]
        assert site.writes == [("StagedFineTune/status", "update")] * 2

    site.calls(visit)


def test_a_status_is_only_written_over_what_it_was_computed_from(site: Site) -> None:
    run = site.create_run("finance")
    path = Collection.RUNS.path(site.namespace, "finance")

    async def visit(cluster: Cluster) -> None:
        newer = await cluster.write_status(run, {"state": "Preparing"})
        with pytest.raises(ConflictError):
            await cluster.write_status(run, {"state": "Training"})
        with pytest.raises(DeniedError, match="retryNumber"):
            await cluster.write_status(newer, {"retryNumber": "many"})
        await asyncio.to_thread(site.send, "DELETE", path, None, 200)
        with pytest.raises(GoneError):
            await cluster.write_status(newer, {"state": "Training"})
        again = await asyncio.to_thread(site.create_run, "finance")
        assert again["metadata"]["uid"] != newer["metadata"]["uid"]
        with pytest.raises(ConflictError):
            await cluster.write_status(newer, {"state": "Training"})
        version = again["metadata"]["resourceVersion"]
        metadata = {**newer["metadata"], "resourceVersion": version}
        with pytest.raises(ConflictError):
            await cluster.write_status({**newer, "metadata": metadata}, {"state": "Training"})

    site.calls(visit)


def test_only_the_job_that_is_meant_is_deleted(site: Site) -> None:
    async def visit(cluster: Cluster) -> None:
        made = await cluster.create(site.job("finance-prepare"))
        uid = made["metadata"]["uid"]
        await cluster.delete_job(site.namespace, "finance-prepare", "00000000-0000-0000-0000-0")
        live = await asyncio.to_thread(site.tests.request, "GET", job_path)
        assert "deletionTimestamp" not in live.body["metadata"]
        assert site.writes == [("Job", "create")]

        await cluster.delete_job(site.namespace, "finance-prepare", uid)
        live = await asyncio.to_thread(site.tests.request, "GET", job_path)
        if live.status == HTTPStatus.OK:
            # Foreground: its pods go first.
            assert "foregroundDeletion" in live.body["metadata"]["finalizers"]
        await cluster.delete_job(site.namespace, "finance-prepare", uid)
        await cluster.delete_job(site.namespace, "never-was", uid)

    job_path = Collection.JOBS.path(site.namespace, "finance-prepare")
    site.calls(visit)


def test_an_event_is_posted_about_the_run_and_cut_to_size(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    run = site.create_run("finance")

    async def visit(cluster: Cluster) -> None:
        await cluster.post_event(run, "Warning", "StageFailed", "äöü" * 1000)
        missing = {**run["metadata"], "namespace": "not-there"}
        await cluster.post_event({**run, "metadata": missing}, "Normal", "Planned", "never seen")

    site.calls(visit)
    assert "event Planned of finance was not posted" in caplog.text
    (event,) = site.send("GET", site.core("events"), expected=200)["items"]
    assert event["involvedObject"]["uid"] == run["metadata"]["uid"]
    assert (event["type"], event["reason"], event["count"]) == ("Warning", "StageFailed", 1)
    assert 1000 < len(event["message"].encode()) <= 1024
    described = site.tests.kubectl("describe", "-n", site.namespace, "sft/finance")
    assert "StageFailed" in described


def test_a_token_speaks_for_its_pod_and_for_our_audience_alone(site: Site) -> None:
    site.tests.kubectl("wait", "--for=create", "-n", site.namespace, "serviceaccount/default")
    container = {"name": "trainer", "image": "registry.example/trainer"}
    pod = {"metadata": {"name": "pod-1"}, "spec": {"containers": [container]}}
    uid = site.send("POST", site.core("pods"), pod)["metadata"]["uid"]

    def token_for(audience: str | None, bound: bool = True) -> str:
        spec: Object = {"expirationSeconds": 600}
        if audience is not None:
            spec["audiences"] = [audience]
        if bound:
            reference = {"kind": "Pod", "apiVersion": "v1", "name": "pod-1", "uid": uid}
            spec["boundObjectRef"] = reference
        path = site.core("serviceaccounts/default/token")
        made = site.send("POST", path, {"spec": spec})
        token: str = made["status"]["token"]
        return token

    async def visit(cluster: Cluster) -> None:
        good = await asyncio.to_thread(token_for, names.PROGRESS_AUDIENCE)
        identity = await cluster.review_token(good, names.PROGRESS_AUDIENCE)
        assert identity is not None
        assert identity._asdict() == {
            "username": f"system:serviceaccount:{site.namespace}:default",
            "namespace": site.namespace,
            "service_account": "default",
            "pod_name": "pod-1",
            "pod_uid": uid,
        }
        assert await cluster.review_token(good, "other.example") is None
        for audience in ("other.example", None):
            other = await asyncio.to_thread(token_for, audience)
            assert await cluster.review_token(other, names.PROGRESS_AUDIENCE) is None
        assert await cluster.review_token("made.up.token", names.PROGRESS_AUDIENCE) is None
        unbound = await asyncio.to_thread(token_for, names.PROGRESS_AUDIENCE, False)
        identity = await cluster.review_token(unbound, names.PROGRESS_AUDIENCE)
        assert identity is not None
        assert (identity.pod_name, identity.pod_uid) == ("", "")

        path = f"{site.core('pods/pod-1')}?gracePeriodSeconds=0"
        await asyncio.to_thread(site.send, "DELETE", path, None, 200)
        # The server remembers good tokens for some seconds, so this may take as long.
        async with asyncio.timeout(30):
            while await cluster.review_token(good, names.PROGRESS_AUDIENCE) is not None:
                await asyncio.sleep(0.5)

    site.calls(visit)


def test_a_server_that_cannot_be_reached_is_unavailable(
    site: Site, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads(site.tests.kubeconfig.read_text())
    # Nothing listens on the port for discarding.
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    monkeypatch.setenv(KUBECONFIG_VARIABLE, str(tmp_path / "kubeconfig"))

    async def visit(cluster: Cluster) -> None:
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
            await cluster.read_run(RunKey(site.namespace, "finance"))
        assert not await cluster.is_reachable()

    site.calls(visit)


def test_a_server_that_answers_is_reachable(site: Site) -> None:
    async def visit(cluster: Cluster) -> None:
        assert await cluster.is_reachable()

    site.calls(visit)


@pytest.mark.parametrize("bypassed", [False, True])
def test_the_environment_may_name_a_proxy(
    bypassed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(f"{request.host}{request.path}")
        return web.json_response({"major": "1"})

    def ignore(path: str) -> None:
        """Take no notice."""

    async def main() -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            here = f"127.0.0.1:{runner.addresses[0][1]}"
            server = here if bypassed else "api.example"
            # Nobody listens on port 9.
            monkeypatch.setenv("http_proxy", "http://127.0.0.1:9" if bypassed else f"http://{here}")
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            named = {"name": "a", "cluster": {"server": f"http://{server}"}, "user": {}}
            context = {"name": "a", "context": {"cluster": "a", "user": "a"}}
            config = {"clusters": [named], "users": [named], "contexts": [context]}
            config |= {"current-context": "a"}
            (tmp_path / "kubeconfig").write_text(json.dumps(config))
            monkeypatch.setenv(KUBECONFIG_VARIABLE, str(tmp_path / "kubeconfig"))
            async with connect() as client:
                assert await Cluster(client).is_reachable()
                address, session = open_watch_session(
                    client, on_list=ignore, on_watch=ignore, on_refusal=ignore
                )
                async with session, session.get(f"{address}/version") as found:
                    assert await found.json() == {"major": "1"}
            assert asked == [f"{server}/version"] * 2
        finally:
            await runner.cleanup()

    asyncio.run(main())
