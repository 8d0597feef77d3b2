"""A cluster with a node and Stagetune on it, both real images installed by Helm from the chart.

For tests, the demonstration and the benchmark of hand-overs: what they look at is the same.
"""

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from local_cluster.api import Cluster
from local_cluster.image_store import ImageStore
from local_cluster.images import image_name, provide_images
from local_cluster.node import provide_node_programs
from local_cluster.node_cluster import (
    end_cluster,
    end_leftovers,
    own_directory,
    start_node_cluster,
)
from local_cluster.programs import provide_helm
from local_cluster.volumes import make_volume, volume_folder
from stagetune_api import names

Object = dict[str, Any]
Tell = Callable[[str], None]

CHART = Path(__file__).parents[2] / "charts" / "stagetune"
SYSTEM = "stagetune-system"
NAMESPACE = "team-a"
START_SECONDS = 180
POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class StagedCluster:
    """The cluster, as somebody uses it who applies a run and looks at it."""

    cluster: Cluster
    directory: Path

    def put_inputs(self, claim: str, source: Path) -> None:
        """Make the claim `claim` in the runs' namespace, holding what is in the folder `source`."""
        folder = make_volume(
            self.cluster, self.directory, f"{NAMESPACE}-{claim}", claim=f"{NAMESPACE}/{claim}"
        )
        shutil.copytree(source, folder, dirs_exist_ok=True)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": claim, "namespace": NAMESPACE},
                "spec": {
                    "accessModes": ["ReadWriteMany"],
                    "resources": {"requests": {"storage": "1Gi"}},
                },
            }
        )

    def apply(self, document: Object) -> None:
        """Apply a document as a user does."""
        self.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(document))

    def patch(self, name: str, spec: Object) -> None:
        """Change fields of a run's spec."""
        patch = json.dumps({"spec": spec})
        self.cluster.kubectl("-n", NAMESPACE, "patch", "sft", name, "--type=merge", "-p", patch)

    def run(self, name: str) -> Object:
        """Return the run as it is."""
        path = f"/apis/{names.API_VERSION}/namespaces/{NAMESPACE}/{names.PLURAL}/{name}"
        answer = self.cluster.request("GET", path)
        if answer.status != HTTPStatus.OK:
            raise LookupError(f"{name}: {answer.message}")
        body: Object = answer.body
        return body

    def status(self, name: str) -> Object:
        """Return the run's status."""
        status: Object = self.run(name).get("status", {})
        return status

    def pods(self, name: str, task: str | None = None) -> list[Object]:
        """Return the run's pods, or those for `task`, the oldest first."""
        selector = f"{names.LABEL_RUN}={name}"
        if task is not None:
            selector += f",{names.LABEL_TASK}={task}"
        query = selector.replace("=", "%3D").replace(",", "%2C")
        path = f"/api/v1/namespaces/{NAMESPACE}/pods?labelSelector={query}"
        items: list[Object] = self.cluster.request("GET", path).body["items"]
        return sorted(items, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def await_status(
        self,
        name: str,
        holds: Callable[[Object], bool],
        *,
        what: str,
        seconds: float,
        on_change: Callable[[Object], None] = lambda status: None,
    ) -> Object:
        """Return the run's status once `holds` is true of it; raises TimeoutError, or at once
        AssertionError where the run has failed instead."""
        deadline = time.monotonic() + seconds
        last: Object = {}
        while True:
            status = self.status(name)
            if status != last:
                last = status
                on_change(status)
            if holds(status):
                return status
            if status.get("state") == "Failed":
                raise AssertionError(f"{name} failed:\n{self.describe(name)}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name}: no {what} in {seconds:g} s:\n{self.describe(name)}")
            time.sleep(POLL_SECONDS)

    def describe(self, name: str) -> str:
        """Return what a person would ask for to see why a run does not go on."""
        asked = (
            ("describe", "sft", name),
            ("get", "pods", "-o", "wide"),
            ("logs", f"--selector={names.LABEL_RUN}={name}", "--tail=30", "--prefix"),
        )
        said = [self.cluster.try_kubectl("-n", NAMESPACE, *words).stdout for words in asked]
        log = self.cluster.try_kubectl("-n", SYSTEM, "logs", "deploy/stagetune", "--tail=40").stdout
        return "\n".join([*said, log])[-12000:]

    def folder(self, name: str) -> Path:
        """Return the folder on the node that holds the run's files."""
        status = self.status(name)
        path = f"/api/v1/namespaces/{NAMESPACE}/persistentvolumeclaims/{status['claimName']}"
        volume = self.cluster.request("GET", path).body["spec"]["volumeName"]
        return volume_folder(self.directory, volume) / str(status["directory"])


@contextmanager
def staged_cluster(
    tell: Tell, owner: str, values: Mapping[str, Any] | None = None
) -> Iterator[StagedCluster]:
    """Start a cluster with a node, install Stagetune on it, and take everything away afterwards.

    `owner` tells apart the clusters of one process. Raises BinariesUnavailableError where this
    machine cannot make what it takes.
    """
    programs, helm, images = provide_node_programs(tell), provide_helm(tell), provide_images(tell)
    store = ImageStore(programs.containerd, tell)
    for image in images:
        store.add(f"docker.io/{image.name}", image.digest, image.write_archive)
    end_leftovers()
    directory = own_directory(owner)
    with ExitStack() as stack:
        stack.callback(end_cluster, directory)
        kubeconfig = start_node_cluster(programs, directory, tell)
        kubectl = programs.kubernetes / "kubectl"
        cluster = stack.enter_context(Cluster(kubeconfig, kubectl, directory))
        _install(cluster, helm, kubeconfig, directory, values or {})
        yield StagedCluster(cluster=cluster, directory=directory)


def _install(
    cluster: Cluster, helm: Path, kubeconfig: Path, directory: Path, values: Mapping[str, Any]
) -> None:
    """Install the chart as docs/install.md says, into namespaces that enforce `restricted`."""
    for name in (SYSTEM, NAMESPACE):
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        namespace = {"apiVersion": "v1", "kind": "Namespace"}
        document = {**namespace, "metadata": {"name": name, "labels": labels}}
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(document))
    image = {
        kind: {
            "repository": image_name(kind).partition(":")[0],
            "tag": image_name(kind).partition(":")[2],
            "pullPolicy": "Never",
        }
        for kind in ("operator", "trainer")
    }
    given = {
        "image": image["operator"],
        "trainer": {"image": image["trainer"]},
        "progress": {"statusSeconds": 1},
        **values,
    }
    file = directory / "values.json"
    file.write_text(json.dumps(given))
    home = directory / "helm"
    variables = {f"HELM_{what}_HOME": str(home / what) for what in ("CACHE", "CONFIG", "DATA")}
    command = [str(helm), "install", "stagetune", str(CHART), f"--namespace={SYSTEM}"]
    command += [f"--values={file}", "--wait", f"--timeout={START_SECONDS}s"]
    done = subprocess.run(
        command,
        env={**os.environ, "KUBECONFIG": str(kubeconfig), **variables},
        check=False,
        capture_output=True,
        text=True,
        timeout=START_SECONDS + 30,
    )
    if done.returncode != 0:
        pods = cluster.try_kubectl("-n", SYSTEM, "describe", "pods").stdout
        raise RuntimeError(f"helm: {done.stderr}\n{pods[-4000:]}")


def digests_of_weights(export: Path) -> dict[str, str]:
    """Return the sha256 of every file with weights in an exported folder."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(export.glob("*.safetensors"))
    }
