"""kopf's watches on a real API server: what they bring, what they take, and how they end."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

import kopf
import pytest
from ruamel.yaml import YAML as Yaml

from local_cluster import api
from local_cluster.processes import wait_until
from manifest_cases import edited
from stagetune_api import names
from stagetune_operator.cluster import Cluster
from stagetune_operator.connection import KUBECONFIG_VARIABLE, connect, open_watch_session
from stagetune_operator.handlers import build_registry, build_settings, list_taker
from stagetune_operator.keys import RunKey
from stagetune_operator.resources import Collection
from stagetune_operator.store import Store
from stagetune_operator.sweep import Sweeper
from stagetune_operator.watches import Watches

pytestmark = pytest.mark.control_plane

Object = dict[str, Any]
MANAGED = {names.LABEL_MANAGED_BY: names.MANAGED_BY}


class Site:
    """A namespace, and what the watches said of it."""

    def __init__(self, tests: api.Cluster, namespace: str) -> None:
        self.tests = tests
        self.namespace = namespace
        self.store = Store()
        self.looks: list[RunKey] = []
        self.gaps = 0
        self.has_closed = False
        self.watches: Watches

    async def send(self, method: str, path: str, body: Any = None) -> Object:
        answer = await asyncio.to_thread(self.tests.request, method, path, body)
        assert answer.status in (HTTPStatus.OK, HTTPStatus.CREATED), answer.message
        found: Object = answer.body
        return found

    async def create_run(self, name: str) -> Object:
        document = edited({"metadata.name": name, "metadata.namespace": self.namespace})
        return await self.send("POST", Collection.RUNS.path(self.namespace), document)

    async def create_job(self, name: str, labels: dict[str, str]) -> Object:
        container = {"name": "trainer", "image": "registry.example/trainer"}
        pod = {
            "metadata": {"labels": labels},
            "spec": {"restartPolicy": "Never", "containers": [container]},
        }
        body = {"metadata": {"name": name, "labels": labels}, "spec": {"template": pod}}
        return await self.send("POST", Collection.JOBS.path(self.namespace), body)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not holds():
                await asyncio.sleep(0.02)

    @asynccontextmanager
    async def watched(
        self, *namespaces: str, page_size: int = 100, takes_lists: bool = True
    ) -> AsyncIterator[Cluster]:
        """Watch as the operator does, until the end of the block."""
        settings = build_settings()
        settings.watching.chunk_size = page_size
        take_list = list_taker(self.store, self.looks.append)

        def count_gap() -> None:
            self.gaps += 1

        async def close() -> None:
            self.has_closed = True

        paths = [
            where.path(namespace)
            for where in (Collection.RUNS, Collection.JOBS, Collection.PODS)
            for namespace in namespaces or (None,)
        ]
        self.watches = Watches(paths, on_gap=count_gap)
        async with connect() as client:
            registry = build_registry(
                store=self.store,
                look_at=self.looks.append,
                open_session=lambda: open_watch_session(
                    client,
                    on_list=self.watches.note_list,
                    on_watch=self.watches.note_watch,
                    on_refusal=self.watches.note_refusal,
                    take_list=take_list if takes_lists else lambda page: page,
                ),
                close=close,
            )
            stop = asyncio.Event()
            watching = asyncio.create_task(
                kopf.operator(
                    registry=registry,
                    settings=settings,
                    clusterwide=not namespaces,
                    namespaces=namespaces,
                    standalone=True,
                    stop_flag=stop,
                )
            )
            try:
                await self.until(lambda: self.watches.are_open)
                yield Cluster(client)
            finally:
                stop.set()
                async with asyncio.timeout(15):
                    await watching


@pytest.fixture
def site(cluster: api.Cluster, crd: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv(KUBECONFIG_VARIABLE, str(cluster.kubeconfig))
    metadata = {"generateName": "stagetune-watch-"}
    made = cluster.request("POST", "/api/v1/namespaces", {"metadata": metadata})
    assert made.status == HTTPStatus.CREATED, made.message
    name = made.body["metadata"]["name"]
    yield Site(cluster, name)
    cluster.request("DELETE", f"/api/v1/namespaces/{name}")


def visit(main: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await main()

    asyncio.run(run())


@pytest.mark.parametrize("namespaced", [True, False])
def test_runs_and_what_belongs_to_them_come_in_and_go_out(site: Site, namespaced: bool) -> None:
    key = RunKey(site.namespace, "finance")

    async def main() -> None:
        await site.create_run("finance")
        async with site.watched(*([site.namespace] if namespaced else [])):
            await site.until(lambda: site.store.snapshot(key).run is not None)
            labels = {**MANAGED, names.LABEL_RUN: "finance"}
            job = await site.create_job("finance-prepare", labels)
            await site.create_job("unrelated", {names.LABEL_RUN: "finance"})
            await site.until(lambda: bool(site.store.snapshot(key).pods))
            snapshot = site.store.snapshot(key)
            assert [item["metadata"]["uid"] for item in snapshot.jobs] == [job["metadata"]["uid"]]
            assert {seen for seen in site.looks if seen.namespace == site.namespace} == {key}

            await site.send("DELETE", Collection.RUNS.path(site.namespace, "finance"))
            await site.until(lambda: site.store.snapshot(key).run is None)
        assert site.has_closed
        assert site.gaps == 0

    visit(main)


def test_all_that_there_is_is_known_once_the_watches_are_open(site: Site) -> None:
    async def main() -> None:
        for number in range(3):
            await site.create_run(f"run-{number}")
            labels = {**MANAGED, names.LABEL_RUN: f"run-{number}"}
            await site.create_job(f"run-{number}-prepare", labels)
        async with site.watched(site.namespace, page_size=2):
            # At once: the queue begins now, and would make the Jobs that it does not know of.
            keys = site.store.keys()
            assert [len(site.store.snapshot(key).jobs) for key in keys] == [1, 1, 1]
            # From then on the watch tells.
            await site.create_run("run-3")
            await site.until(lambda: site.store.knows(RunKey(site.namespace, "run-3")))

    visit(main)


def test_a_list_that_only_kopf_reads_comes_to_the_handlers(site: Site) -> None:
    key = RunKey(site.namespace, "finance")

    async def main() -> None:
        await site.create_run("finance")
        job = await site.create_job("finance-prepare", {**MANAGED, names.LABEL_RUN: "finance"})
        async with site.watched(site.namespace, takes_lists=False):
            await site.until(lambda: bool(site.store.snapshot(key).jobs))
            await site.until(lambda: site.store.knows(key))
            assert site.store.snapshot(key).jobs[0]["metadata"]["uid"] == job["metadata"]["uid"]

    visit(main)


def test_what_cannot_be_read_in_a_list_hides_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, looks = Store(), list[RunKey]()
    take = list_taker(store, looks.append)
    metadata = {"name": "finance", "namespace": "team-a", "uid": "uid-1", "resourceVersion": "7"}
    items = [{"metadata": {"name": "broken"}}, {"metadata": metadata}, {"metadata": metadata}]
    page = {"kind": f"{names.KIND}List", "metadata": {"continue": "more"}, "items": items}

    assert take(page) == {**page, "items": []}
    assert looks == store.keys() == [RunKey("team-a", "finance")]
    assert "not understood" in caplog.text


def test_lists_of_anything_else_are_left_to_who_asked() -> None:
    looks: list[RunKey] = []
    page = {"kind": "NamespaceList", "items": [{"metadata": {"name": "team-a"}}]}
    assert list_taker(Store(), looks.append)(page) == page
    assert not looks


def test_nothing_is_written_to_a_run_by_watching_it(site: Site) -> None:
    async def main() -> None:
        before = await site.create_run("finance")
        async with site.watched(site.namespace):
            await site.until(lambda: bool(site.looks))
            await asyncio.sleep(0.5)
            after = await site.send("GET", Collection.RUNS.path(site.namespace, "finance"))
        assert after == before

    visit(main)


def test_what_went_away_unseen_is_swept(site: Site) -> None:
    key = RunKey(site.namespace, "finance")
    missing: list[RunKey] = []

    async def main() -> None:
        run = await site.create_run("finance")
        async with site.watched(site.namespace) as cluster:
            labels = {**MANAGED, names.LABEL_RUN: "finance"}
            job = await site.create_job("finance-prepare", labels)
            await site.until(lambda: bool(site.store.snapshot(key).pods))
            ghost = {**job["metadata"], "uid": "a-job-of-yesterday"}
            site.store.apply_job("ADDED", {**job, "metadata": ghost})
            gone = {**run["metadata"], "uid": "a-run-of-yesterday", "name": "gone"}
            site.store.apply_run("ADDED", {**run, "metadata": gone})

            await Sweeper(cluster, site.store, [site.namespace], missing.append).sweep()
            snapshot = site.store.snapshot(key)
            assert snapshot.run is not None
            assert [item["metadata"]["uid"] for item in snapshot.jobs] == [job["metadata"]["uid"]]
            assert len(snapshot.pods) == 1
            assert site.store.keys() == [key]
            assert sorted(missing) == [key, RunKey(site.namespace, "gone")]

    visit(main)


def test_what_changed_unheard_is_learned(site: Site) -> None:
    key = RunKey(site.namespace, "finance")
    changed: list[RunKey] = []

    async def main() -> None:
        run = await site.create_run("finance")
        labels = {**MANAGED, names.LABEL_RUN: "finance"}
        job = await site.create_job("finance-prepare", labels)
        await site.create_job("unrelated", {names.LABEL_RUN: "finance"})
        # No watch: the store was told of the run once, and of its Job never.
        site.store.apply_run("ADDED", run)
        path = Collection.RUNS.path(site.namespace, "finance")
        edited_run = {**run, "spec": {**run["spec"], "suspend": True}}
        await site.send("PUT", path, edited_run)
        async with connect() as client:
            sweeper = Sweeper(Cluster(client), site.store, [site.namespace], changed.append)
            await sweeper.sweep()
            snapshot = site.store.snapshot(key)
            assert snapshot.run is not None
            assert snapshot.run["spec"]["suspend"] is True
            assert [item["metadata"]["uid"] for item in snapshot.jobs] == [job["metadata"]["uid"]]
            assert changed == [key]

    visit(main)


RIGHTS = {
    "kind": "Role",
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "metadata": {"name": "watcher"},
    "rules": [
        {"apiGroups": [names.GROUP], "resources": [names.PLURAL], "verbs": ["list", "watch"]},
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["list", "watch"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]},
    ],
}


def test_with_namespaces_given_no_rights_on_the_cluster_are_needed(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"system:serviceaccount:{site.namespace}:watcher"

    async def main() -> None:
        base = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{site.namespace}"
        await site.send("POST", f"{base}/roles", RIGHTS)
        binding = {
            "metadata": {"name": "watcher"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "Role",
                "name": "watcher",
            },
            "subjects": [
                {"kind": "ServiceAccount", "name": "watcher", "namespace": site.namespace}
            ],
        }
        await site.send("POST", f"{base}/rolebindings", binding)
        accounts = f"/api/v1/namespaces/{site.namespace}/serviceaccounts"
        await site.send("POST", accounts, {"metadata": {"name": "watcher"}})
        made = await site.send("POST", f"{accounts}/watcher/token", {"spec": {}})
        config = Yaml(typ="safe").load(site.tests.kubeconfig)
        config["users"][0]["user"] = {"token": made["status"]["token"]}
        kubeconfig = tmp_path / "kubeconfig"
        with kubeconfig.open("w") as file:
            Yaml(typ="safe").dump(config, file)
        monkeypatch.setenv(KUBECONFIG_VARIABLE, str(kubeconfig))

        key = RunKey(site.namespace, "finance")
        await site.create_run("finance")
        async with site.watched(site.namespace):
            await site.until(lambda: site.store.snapshot(key).run is not None)
        with suppress(TimeoutError):
            async with asyncio.timeout(3), site.watched():
                raise AssertionError(f"{name} may watch the whole cluster")

    visit(main)


def test_the_process_gets_ready_and_ends_when_it_is_asked_to(
    site: Site, tmp_path: Path, unused_ports: list[int]
) -> None:
    progress, metrics, health = unused_ports
    environment = {
        **os.environ,
        "STAGETUNE_TRAINER_IMAGE": "registry.example/trainer",
        "STAGETUNE_NAMESPACES": site.namespace,
        "STAGETUNE_PORT_PROGRESS": str(progress),
        "STAGETUNE_PORT_METRICS": str(metrics),
        "STAGETUNE_PORT_HEALTH": str(health),
        "STAGETUNE_LOG_FORMAT": "json",
    }
    log = tmp_path / "log"
    with log.open("wb") as file:
        operator = subprocess.Popen(
            [sys.executable, "-m", "stagetune_operator"], env=environment, stderr=file
        )
    try:
        wait_until(lambda: get(health, "/readyz")[0] == 200, what="readiness", seconds=60)
        assert get(health, "/healthz")[0] == 200
        assert 'stagetune_runs{state="Pending"} 0.0' in get(metrics, "/metrics")[1]
        assert get(progress, "/")[0] == 404
        operator.send_signal(signal.SIGTERM)
        assert operator.wait(timeout=10) == 0
    finally:
        operator.kill()
        operator.wait()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[-1]["message"] == "ended"
    assert {line["level"] for line in lines} == {"INFO"}, log.read_text()


def test_the_process_says_what_is_wrong_with_its_settings() -> None:
    environment = {name: value for name, value in os.environ.items() if "STAGETUNE" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "stagetune_operator"],
        env={**environment, "STAGETUNE_WORKERS": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "STAGETUNE_TRAINER_IMAGE is required and not set" in done.stderr
    assert "STAGETUNE_WORKERS" in done.stderr


@pytest.fixture
def unused_ports() -> list[int]:
    """Three ports that nobody listens on; another program may still be faster to take one."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(3)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except OSError:
        return 0, ""
    finally:
        connection.close()
