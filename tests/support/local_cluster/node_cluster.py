"""A control plane and a node in one folder: started whole or not at all, ended without a trace.

Both are in one sandbox: the control plane so reaches kubelet, pods and Services as they reach it,
and is reached from the machine at the sandbox's address.
"""

import json
from collections.abc import Callable
from pathlib import Path

from local_cluster.api import Cluster
from local_cluster.binaries import cache_directory
from local_cluster.containerd import Containerd
from local_cluster.control_plane import (
    Place,
    end_control_plane,
    kubeconfig_file,
    start_control_plane,
)
from local_cluster.image_store import DIGESTS, ImageStore, WriteArchive
from local_cluster.node import NODE, POD_IMAGE, NodePrograms, equip_node, start_node
from local_cluster.oci import build_image
from local_cluster.processes import Process, is_running, this_process
from local_cluster.record import Processes, end_recorded
from local_cluster.sandbox import connect_sandbox, has_sandbox, remove_traces, start_sandbox
from local_cluster.volumes import make_storage

Tell = Callable[[str], None]


def start_node_cluster(
    programs: NodePrograms, directory: Path, tell: Tell, *, ends_with_parent: bool = True
) -> Path:
    """Start a control plane and a node that keep everything in `directory`; return a kubeconfig.

    `directory` is on the cache's file system. Returns when the node is ready and has all images of
    the store and a GPU for the scheduler, and there are volumes for claims. If that does not come
    about, ends what was started and raises ProcessEndedError, TimeoutError or OSError.
    """
    store = ImageStore(programs.containerd, tell)
    provide_pod_image(store, programs.containerd.pod)
    try:
        processes = Processes(directory, ends_with_parent=ends_with_parent)
        store.link_into(directory)
        sandbox = start_sandbox(processes, programs.containerd.pod)
        address = connect_sandbox(directory, sandbox)
        place = Place(address, advertised=address, enter=sandbox.enter, nodes=(NODE,))
        kubeconfig = start_control_plane(
            programs.kubernetes, directory, place, ends_with_parent=ends_with_parent
        )
        processes = Processes(directory, ends_with_parent=ends_with_parent)
        start_node(programs, processes, sandbox, address)
        with Cluster(kubeconfig, programs.kubernetes / "kubectl", directory / "node") as cluster:
            equip_node(cluster)
            make_storage(cluster, directory)
    except BaseException:
        end_recorded(directory)
        remove_traces(directory)
        raise
    return kubeconfig


def end_cluster(directory: Path) -> None:
    """End what was started in `directory`, with a node or without, and leave nothing of it."""
    end_recorded(directory)
    if has_sandbox(directory):
        remove_traces(directory)
    end_control_plane(directory)


def has_node(directory: Path) -> bool:
    """Return whether the cluster in `directory` is one with a node."""
    return kubeconfig_file(directory).exists() and has_sandbox(directory)


def own_directory(name: str) -> Path:
    """Return a folder for a cluster that ends with this process."""
    owner = this_process()
    return cache_directory() / f"node-of-{owner.number}-{owner.began}-{name}"


def end_leftovers() -> None:
    """Remove what is left of clusters whose owners were killed: folders and cgroups."""
    for directory in cache_directory().glob("node-of-*"):
        number, began, _ = directory.name.removeprefix("node-of-").split("-", 2)
        if not is_running(Process("owner", int(number), int(began), "")):
            end_cluster(directory)


def load_image(
    programs: NodePrograms,
    directory: Path,
    tell: Tell,
    name: str,
    digest: str,
    write_archive: WriteArchive,
) -> None:
    """Have an image in the store and on the node of the cluster that stands in `directory`.

    Does nothing where both have it. An image that is added to the store before the cluster's
    start takes no time here, and is unpacked once instead of twice.
    """
    ImageStore(programs.containerd, tell).add(name, digest, write_archive)
    record = directory / DIGESTS
    digests = json.loads(record.read_text())
    if digests.get(name) != digest:
        Containerd(programs.containerd.containerd, directory).load(name, write_archive)
        record.write_text(json.dumps({**digests, name: digest}, indent=2) + "\n")


def provide_pod_image(store: ImageStore, program: Path) -> None:
    """Have the image of the pods' program in the store."""
    # Every pod's first container runs it as it is.
    archive, digest = build_image(program, "pause")

    def write_archive(path: Path, _: list[str]) -> None:
        path.write_bytes(archive)

    store.add(POD_IMAGE, digest, write_archive)
