"""What tests of the product rely on in a cluster with a node: pods run, meet and leave nothing."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

import pytest

from local_cluster.api import Cluster
from local_cluster.node import NodePrograms
from local_cluster.node_cluster import (
    end_cluster,
    load_image,
    own_directory,
    start_node_cluster,
)
from local_cluster.oci import build_image
from local_cluster.pods import POD_SECONDS, create, pod_spec, run_pod, termination_message
from local_cluster.processes import Process, is_running, wait_until
from local_cluster.record import recorded
from local_cluster.sandbox import cgroup_folders, interface_name, remove_traces

pytestmark = pytest.mark.cluster


@pytest.fixture(autouse=True)
def _own_node(node_directory: Path | None) -> None:
    if node_directory is None:
        pytest.skip("these tests are of the tests' own node, and a cluster is given")


def test_restricted_job_with_a_gpu_runs_and_reports(
    node_cluster: Cluster, restricted_namespace: str
) -> None:
    spec = pod_spec("report", "/", "/tmp", "/var/run/secrets/kubernetes.io/serviceaccount")
    (container,) = spec["containers"]
    container["resources"]["limits"] = {"nvidia.com/gpu": 1}
    container["volumeMounts"] = [{"name": "scratch", "mountPath": "/tmp"}]
    spec["volumes"] = [{"name": "scratch", "emptyDir": {}}]
    job = create(
        node_cluster,
        restricted_namespace,
        "/apis/batch/v1/jobs",
        metadata={"name": "job"},
        spec={"backoffLimit": 0, "template": {"spec": spec}},
    )
    path = f"/apis/batch/v1/namespaces/{restricted_namespace}/jobs/job"
    wait_until(
        lambda: bool(node_cluster.request("GET", path).body["status"].get("completionTime")),
        what="end of the job",
        seconds=POD_SECONDS,
    )
    selector = f"labelSelector=batch.kubernetes.io/controller-uid={job['metadata']['uid']}"
    pods = f"/api/v1/namespaces/{restricted_namespace}/pods?{selector}"
    (pod,) = node_cluster.request("GET", pods).body["items"]
    assert termination_message(pod["status"]).splitlines() == [
        "Uid 65532",
        "Gid 65532",
        "CapEff 0000000000000000",
        "CapBnd 0000000000000000",
        "NoNewPrivs 1",
        "Seccomp 2",
        "writable:/ false",
        "writable:/tmp true",
        "writable:/var/run/secrets/kubernetes.io/serviceaccount false",
    ]


def test_second_pod_waits_for_the_only_gpu(
    node_cluster: Cluster, restricted_namespace: str
) -> None:
    for name in ("first", "second"):
        spec = pod_spec("pause")
        spec["containers"][0]["resources"]["limits"] = {"nvidia.com/gpu": 1}
        metadata = {"name": name}
        create(node_cluster, restricted_namespace, "/api/v1/pods", metadata=metadata, spec=spec)
        condition = "Ready" if name == "first" else "PodScheduled=False"
        arguments = ["wait", "-n", restricted_namespace, f"pod/{name}"]
        node_cluster.kubectl(
            *arguments, f"--for=condition={condition}", f"--timeout={POD_SECONDS}s"
        )
    arguments = ["delete", "pod", "first", "-n", restricted_namespace, "--grace-period=1"]
    node_cluster.kubectl(*arguments)
    arguments = ["wait", "-n", restricted_namespace, "pod/second", "--for=condition=Ready"]
    node_cluster.kubectl(*arguments, f"--timeout={POD_SECONDS}s")


def test_pod_reaches_a_service_by_its_name(
    node_cluster: Cluster, restricted_namespace: str
) -> None:
    spec = pod_spec("serve", ":8080", "hello")
    spec["containers"][0]["readinessProbe"] = {
        "httpGet": {"path": "/", "port": 8080},
        "periodSeconds": 1,
    }
    labels = {"app": "server"}
    create(
        node_cluster,
        restricted_namespace,
        "/api/v1/pods",
        metadata={"name": "server", "labels": labels},
        spec=spec,
    )
    create(
        node_cluster,
        restricted_namespace,
        "/api/v1/services",
        metadata={"name": "greeter"},
        spec={"selector": labels, "ports": [{"port": 80, "targetPort": 8080}]},
    )
    url = f"http://greeter.{restricted_namespace}.svc/"
    client = pod_spec("fetch", url, f"{POD_SECONDS}s")
    assert run_pod(node_cluster, restricted_namespace, "client", client) == "hello"
    # From the machine, by way of the API server.
    proxy = f"/api/v1/namespaces/{restricted_namespace}/services/greeter:80/proxy/"
    assert node_cluster.kubectl("get", "--raw", proxy) == "hello"


@pytest.mark.parametrize("mode", ["ReadWriteOnce", "ReadWriteMany"])
def test_claim_survives_its_pod(
    node_cluster: Cluster, restricted_namespace: str, mode: str
) -> None:
    create(
        node_cluster,
        restricted_namespace,
        "/api/v1/persistentvolumeclaims",
        metadata={"name": "data"},
        spec={"accessModes": [mode], "resources": {"requests": {"storage": "1Gi"}}},
    )
    writer = pod_spec("write", "/claim/note", "kept", claim="data")
    run_pod(node_cluster, restricted_namespace, "writer", writer)
    node_cluster.kubectl("delete", "pod", "writer", "-n", restricted_namespace)
    reader = pod_spec("read", "/claim/note", claim="data")
    assert run_pod(node_cluster, restricted_namespace, "reader", reader) == "kept"


def test_pod_outside_the_level_is_refused(node_cluster: Cluster, restricted_namespace: str) -> None:
    spec = pod_spec("pause")
    del spec["containers"][0]["securityContext"]
    path = f"/api/v1/namespaces/{restricted_namespace}/pods"
    answer = node_cluster.request("POST", path, {"metadata": {"name": "root"}, "spec": spec})
    assert answer.status == HTTPStatus.FORBIDDEN
    assert 'violates PodSecurity "restricted:latest"' in answer.message


def test_logs_of_a_pod_are_read(node_cluster: Cluster, restricted_namespace: str) -> None:
    run_pod(node_cluster, restricted_namespace, "reporter", pod_spec("report"))
    logs = node_cluster.kubectl("logs", "reporter", "-n", restricted_namespace)
    assert "Uid 65532" in logs


def test_image_is_loaded_while_the_node_runs(
    node_cluster: Cluster,
    node_programs: NodePrograms,
    node_directory: Path,
    restricted_namespace: str,
    tell: Callable[[str], None],
) -> None:
    name = "localhost/stagetune-report:1"
    archive, digest = build_image(node_programs.containerd.pod, "report")
    written: list[Path] = []

    def write_archive(path: Path, _: list[str]) -> None:
        path.write_bytes(archive)
        written.append(path)

    load_image(node_programs, node_directory, tell, name, digest, write_archive)
    spec = pod_spec(image=name)
    assert "Uid 65532" in run_pod(node_cluster, restricted_namespace, "reporter", spec)
    # The next run of the tests finds it in the store, and this one already has it.
    written.clear()
    load_image(node_programs, node_directory, tell, name, digest, write_archive)
    assert written == []


def test_ended_cluster_leaves_nothing(
    node_programs: NodePrograms, tell: Callable[[str], None], tmp_path: Path
) -> None:
    directory = own_directory("ended")
    try:
        kubeconfig = start_node_cluster(node_programs, directory, tell)
        with Cluster(kubeconfig, node_programs.kubernetes / "kubectl", tmp_path) as cluster:
            pod = pod_spec("pause")
            create(cluster, "default", "/api/v1/pods", metadata={"name": "pause"}, spec=pod)
            cluster.kubectl(
                "wait", "pod/pause", "--for=condition=Ready", f"--timeout={POD_SECONDS}s"
            )
        namespace = pid_namespace(first_process(directory).number)
        inside = processes_in(namespace)
        assert any("containerd-shim" in command for command in inside.values())
        assert any((path / "kubepods").exists() for path in cgroup_folders(directory))
        assert device_exists(directory)
        assert mounts_of(directory) == []
    finally:
        end_cluster(directory)
    assert processes_in(namespace) == {}
    # A cgroup with a process in it, a container's, could not have been removed.
    assert cgroup_folders(directory) == []
    assert not device_exists(directory)
    assert mounts_of(directory) == []
    assert not directory.exists()


def test_node_ends_with_the_one_that_started_it(
    node_programs: NodePrograms, tmp_path: Path
) -> None:
    directory = tmp_path / "sandbox"
    program = f"""
        import os, signal, subprocess
        from pathlib import Path
        from local_cluster.record import Processes
        from local_cluster.sandbox import connect_sandbox, start_sandbox
        processes = Processes(Path({str(directory)!r}), ends_with_parent=True)
        sandbox = start_sandbox(processes, Path({str(node_programs.containerd.pod)!r}))
        connect_sandbox(processes.directory, sandbox)
        number = sandbox.first.number
        Path({str(tmp_path / "namespace")!r}).write_text(os.readlink(f"/proc/{{number}}/ns/pid"))
        # As a container's shim does, it leaves the process that started it.
        shim = "setsid sleep 300 > /dev/null 2>&1 &"
        subprocess.run([*sandbox.enter, "sh", "-c", shim], check=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    starter = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(starter, env=environment, check=False, timeout=POD_SECONDS)
    assert done.returncode == -signal.SIGKILL
    first = first_process(directory)
    wait_until(lambda: not is_running(first), what="end of the node", seconds=POD_SECONDS)
    assert processes_in((tmp_path / "namespace").read_text()) == {}
    remove_traces(directory)
    assert not device_exists(directory)
    assert mounts_of(directory) == []


def first_process(directory: Path) -> Process:
    """Return the first process of the sandbox that was started in this folder."""
    return next(process for process in recorded(directory) if process.name == "first process")


def pid_namespace(number: int) -> str:
    """Return what tells a process's PID namespace from others."""
    return str(Path(f"/proc/{number}/ns/pid").readlink())


def processes_in(namespace: str) -> dict[int, str]:
    """Return the numbers and commands of the processes in a PID namespace, not those below it."""
    found = {}
    for path in Path("/proc").iterdir():
        # Those that may not be looked at are none of ours.
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if path.name.isdigit() and pid_namespace(int(path.name)) == namespace:
                found[int(path.name)] = (path / "cmdline").read_text(errors="replace")
    # One that has ended and that its parent has not asked about yet has no command any more.
    return {number: command for number, command in found.items() if command}


def device_exists(directory: Path) -> bool:
    """Return whether the machine has the network device that leads to this folder's sandbox."""
    return Path("/sys/class/net", interface_name(directory)).exists()


def mounts_of(directory: Path) -> list[str]:
    """Return the machine's mounts that have to do with this folder or with any pod."""
    signs = (str(directory), "/var/lib/kubelet", "/run/containerd")
    mounts = Path("/proc/mounts").read_text().splitlines()
    return [mount for mount in mounts if any(sign in mount for sign in signs)]
