"""Volumes for claims: folders of the node, as PersistentVolumes that are there beforehand.

A claim that names no class is given the default one, and takes a volume that no other has. A
volume is not used a second time, so a claim's folder is looked at as long as the cluster stands.
"""

import json
from pathlib import Path
from typing import Any

from local_cluster.api import Cluster

CLASS = "standard"
ACCESS_MODES = ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"]
NUMBER = 24


def make_storage(cluster: Cluster, directory: Path) -> None:
    """Make the default storage class, and volumes below `directory` for claims of it."""
    storage_class = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": CLASS,
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
        },
        "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "Immediate",
    }
    volumes = [_volume(directory, f"volume-{number:02}") for number in range(NUMBER)]
    _create(cluster, [storage_class, *volumes])


def make_volume(
    cluster: Cluster, directory: Path, name: str, *, size: str = "100Gi", claim: str = ""
) -> Path:
    """Make one more volume, for the claim NAMESPACE/NAME where one is given; return its folder."""
    volume = _volume(directory, name, size)
    if claim:
        namespace, _, claimed = claim.partition("/")
        volume["spec"]["claimRef"] = {"namespace": namespace, "name": claimed}
    _create(cluster, [volume])
    return volume_folder(directory, name)


def volume_folder(directory: Path, name: str) -> Path:
    """Return the folder of the volume of this name."""
    return directory / "volumes" / name


def _volume(directory: Path, name: str, size: str = "100Gi") -> dict[str, Any]:
    folder = volume_folder(directory, name)
    folder.mkdir(parents=True)
    # Kubernetes does not apply a pod's fsGroup to a hostPath.
    folder.chmod(0o777)
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": size},
            "accessModes": ACCESS_MODES,
            "storageClassName": CLASS,
            "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": {"path": str(folder), "type": "Directory"},
        },
    }


def _create(cluster: Cluster, documents: list[dict[str, Any]]) -> None:
    listed = {"apiVersion": "v1", "kind": "List", "items": documents}
    cluster.kubectl("create", "-f", "-", stdin=json.dumps(listed))
