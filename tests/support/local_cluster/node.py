"""A node: containerd, kubelet, kube-proxy and CoreDNS in one sandbox.

CoreDNS is a process and not a pod: so it takes no image, no permissions and no time, and pods
notice nothing of it. Pods know it by the node's own address.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from local_cluster.api import Cluster
from local_cluster.binaries import provide_binaries
from local_cluster.containerd import ContainerdTools, start_containerd
from local_cluster.control_plane import answers, build_kubeconfig, kubeconfig_file
from local_cluster.debian import provide_debian
from local_cluster.node_files import DNS_READY_PORT, PROXY_PORT, write_node_files
from local_cluster.programs import provide_containerd, provide_coredns, provide_pod_program
from local_cluster.record import Processes
from local_cluster.sandbox import Sandbox, cgroup_name, make_cgroups

NODE = "node-1"
POD_IMAGE = "localhost/stagetune-pod:1"
"""The image of `pod_program/`, which every node has."""
READY_SECONDS = 120
GPU_PATHS = [f"/status/{kind}/nvidia.com~1gpu" for kind in ("capacity", "allocatable")]
NEEDED_COMMANDS = ("ip", "unshare", "nsenter", "mount", "cp")


class NodePrograms(NamedTuple):
    """Where the programs are that a cluster with a node takes."""

    kubernetes: Path
    coredns: Path
    containerd: ContainerdTools


def why_no_node() -> str | None:
    """Return why this machine cannot have a node, with the cure; None if it can."""
    cure = "or give a cluster by STAGETUNE_TEST_KUBECONFIG"
    if sys.platform != "linux":
        return f"a node needs Linux; use such a machine, {cure}"
    if os.geteuid() != 0:
        return f"a node needs root, for its namespaces and cgroups; run pytest as root, {cure}"
    if missing := [name for name in NEEDED_COMMANDS if shutil.which(name) is None]:
        return f"a node needs {', '.join(missing)}; install iproute2 and util-linux, {cure}"
    return None


def provide_node_programs(tell: Callable[[str], None]) -> NodePrograms:
    """Return the programs, making them first where they are not there yet.

    Raises BinariesUnavailableError where that cannot be done.
    """
    containerd = ContainerdTools(
        provide_containerd(tell), provide_pod_program(tell), provide_debian(tell)
    )
    return NodePrograms(provide_binaries(tell), provide_coredns(tell), containerd)


def start_node(
    programs: NodePrograms, processes: Processes, sandbox: Sandbox, address: str
) -> None:
    """Start a node in the sandbox, at `address` of it, beside the control plane that is there."""
    directory = processes.directory
    make_cgroups(directory)
    server = json.loads(kubeconfig_file(directory).read_text())["clusters"][0]["cluster"]["server"]
    node_kubeconfig = directory / f"{NODE}.json"
    node_kubeconfig.write_text(json.dumps(build_kubeconfig(directory / "keys", server, NODE)))
    write_node_files(directory, address, cgroup_name(directory), NODE)

    start_containerd(programs.containerd, processes, sandbox, POD_IMAGE)
    files = directory / "node"
    kubelet = [f"--config={files / 'kubelet.json'}", f"--kubeconfig={node_kubeconfig}"]
    kubelet += [f"--hostname-override={NODE}", f"--node-ip={address}"]
    kubernetes = programs.kubernetes
    processes.start("kubelet", [*sandbox.enter, str(kubernetes / "kubelet"), *kubelet])
    proxy = [*sandbox.enter, str(kubernetes / "kube-proxy"), f"--config={files / 'proxy.json'}"]
    # It calls nft.
    processes.start("kube-proxy", proxy, programs.containerd.debian.environment)
    dns = [*sandbox.enter, str(programs.coredns), "-conf", str(files / "Corefile")]
    processes.start("coredns", dns)
    processes.wait_until(lambda: answers(address, DNS_READY_PORT, "/ready"), what="CoreDNS")
    processes.wait_until(lambda: answers(address, PROXY_PORT, "/healthz"), what="kube-proxy")


def equip_node(cluster: Cluster) -> None:
    """Wait until the node is ready, and give it a GPU for the scheduler."""
    node, deadline = f"node/{NODE}", time.monotonic() + READY_SECONDS
    while cluster.try_kubectl("get", node).returncode != 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    cluster.kubectl("wait", node, "--for=condition=Ready", f"--timeout={READY_SECONDS}s")
    # A resource that no device plugin manages: the scheduler counts it, and nothing else does.
    patch = [{"op": "add", "path": path, "value": "1"} for path in GPU_PATHS]
    cluster.kubectl("patch", node, "--subresource=status", "--type=json", "-p", json.dumps(patch))
