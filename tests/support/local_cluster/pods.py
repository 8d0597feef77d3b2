"""Pods as tests run them: made through the API, waited for, and asked for their last words."""

from http import HTTPStatus
from typing import Any

from local_cluster.api import Cluster
from local_cluster.node import POD_IMAGE
from local_cluster.oci import USER
from local_cluster.processes import wait_until

POD_SECONDS = 90
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "runAsGroup": USER,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""The security context of a container that Pod Security's level `restricted` takes."""


def pod_spec(*arguments: str, image: str = POD_IMAGE, claim: str = "") -> dict[str, Any]:
    """A pod's spec that Pod Security's level `restricted` takes, its container named `main`."""
    container: dict[str, Any] = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "Never",
        "args": list(arguments),
        "securityContext": RESTRICTED,
        "resources": {"requests": {"cpu": "50m", "memory": "32Mi"}},
    }
    spec: dict[str, Any] = {"restartPolicy": "Never", "containers": [container]}
    if claim:
        container["volumeMounts"] = [{"name": "claim", "mountPath": "/claim"}]
        reference = {"claimName": claim}
        spec["volumes"] = [{"name": "claim", "persistentVolumeClaim": reference}]
    return spec


def create(cluster: Cluster, namespace: str, path: str, **document: Any) -> dict[str, Any]:
    """Create an object below the API's `path` and return what the server keeps of it."""
    prefix, _, plural = path.rpartition("/")
    made = cluster.request("POST", f"{prefix}/namespaces/{namespace}/{plural}", document)
    assert made.status == HTTPStatus.CREATED, made.message
    body: dict[str, Any] = made.body
    return body


def run_pod(cluster: Cluster, namespace: str, name: str, spec: dict[str, Any]) -> str:
    """Run a pod to its end and return its termination message; raises if it did not succeed."""
    create(cluster, namespace, "/api/v1/pods", metadata={"name": name}, spec=spec)
    status = wait_for_end(cluster, f"/api/v1/namespaces/{namespace}/pods/{name}")
    assert status["phase"] == "Succeeded", status
    return termination_message(status)


def wait_for_end(cluster: Cluster, path: str) -> dict[str, Any]:
    """Return the status of the pod at this path once it has ended."""
    status: dict[str, Any] = {}

    def has_ended() -> bool:
        status.update(cluster.request("GET", path).body["status"])
        return status["phase"] in ("Succeeded", "Failed")

    wait_until(has_ended, what=f"end of {path}", seconds=POD_SECONDS)
    return status


def termination_message(status: dict[str, Any]) -> str:
    """Return the last words of a pod's only container."""
    (container,) = status["containerStatuses"]
    return str(container["state"]["terminated"].get("message", ""))
