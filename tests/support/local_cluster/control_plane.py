"""A control plane in one folder: started whole or not at all, and ended without a trace.

The folder keeps who was started in `processes.json` from the first process on, so that whoever
finds the folder can end them, also after the program that began was killed.
"""

import base64
import http.client
import json
import random
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from local_cluster.processes import (
    Process,
    end_process,
    is_running,
    start_process,
    wait_until,
)

HOST = "127.0.0.1"
ADVERTISED_ADDRESS = "192.0.2.1"
"""Where pods would find the API server, which refuses a loopback address for it. There are none,
so it is one of RFC 5737's addresses for documentation."""
SERVICE_NETWORK = "10.96.0.0/16"
SERVER_NAMES = (
    HOST,
    ADVERTISED_ADDRESS,
    "10.96.0.1",
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
)
PORTS = range(20000, 32000)
"""Below the ports that Linux gives to outgoing connections, which come and go all the time."""
START_SECONDS = 120
END_SECONDS = 15
ACCOUNT_PATH = "/api/v1/namespaces/default/serviceaccounts/default"
"""What the controller manager makes first for every namespace."""


def start_control_plane(binaries: Path, directory: Path, *, ends_with_parent: bool = True) -> Path:
    """Start a control plane that keeps everything in `directory`; return its kubeconfig.

    Returns when the API server is ready and controller manager and scheduler work. If that does
    not come about, ends what was started and raises ProcessEndedError or TimeoutError.
    """
    for folder in ("keys", "logs", "etcd"):
        (directory / folder).mkdir(parents=True)
    try:
        _Start(binaries, directory, ends_with_parent).run()
    except BaseException:
        _end_processes(directory)
        raise
    return kubeconfig_file(directory)


def kubeconfig_file(directory: Path) -> Path:
    """Return the file with which kubectl and other clients find the control plane."""
    return directory / "kubeconfig.json"


def is_whole(directory: Path) -> bool:
    """Return whether a control plane was started in `directory` and all of it is running."""
    processes = _recorded(directory)
    return kubeconfig_file(directory).exists() and all(map(is_running, processes))


def end_control_plane(directory: Path) -> None:
    """End what was started in `directory`, the last one first, and remove the folder."""
    _end_processes(directory)
    shutil.rmtree(directory, ignore_errors=True)


def _end_processes(directory: Path) -> None:
    for process in reversed(_recorded(directory)):
        end_process(process, patience_seconds=END_SECONDS)


def _recorded(directory: Path) -> list[Process]:
    record = directory / "processes.json"
    if not record.exists():
        return []
    return [Process(**entry) for entry in json.loads(record.read_text())]


class _Start:
    """One start of a control plane, step by step."""

    def __init__(self, binaries: Path, directory: Path, ends_with_parent: bool) -> None:
        self.binaries = binaries
        self.directory = directory
        self.ends_with_parent = ends_with_parent
        self.keys = directory / "keys"
        self.processes: list[Process] = []

    def run(self) -> None:
        command = [str(self.binaries / "certificates"), str(self.keys), *SERVER_NAMES]
        subprocess.run(command, check=True)
        etcd, peers, server, manager, scheduler = _free_ports(5)
        admin = self._client_context()
        config = self.directory / "unfinished.json"
        config.write_text(json.dumps(self._kubeconfig(server)))

        self._start("etcd", self._etcd_options(etcd, peers))
        self._await("etcd", lambda: _answers(etcd, "/health"))
        self._start("kube-apiserver", self._server_options(server, etcd))
        self._await("API server", lambda: _answers(server, "/readyz", admin))
        options = [
            f"--kubeconfig={config}",
            f"--bind-address={HOST}",
            "--leader-elect=false",
            # By default a client waits to ask for no more than 20 a second, also at the start.
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
            *self._serving_options(),
        ]
        self._start(
            "kube-controller-manager",
            [*options, f"--secure-port={manager}", *self._manager_options()],
        )
        self._start("kube-scheduler", [*options, f"--secure-port={scheduler}"])
        self._await("scheduler", lambda: _answers(scheduler, "/healthz", admin))
        self._await("controller manager", lambda: _answers(server, ACCOUNT_PATH, admin))
        config.rename(kubeconfig_file(self.directory))

    def _start(self, name: str, options: Sequence[str]) -> None:
        process = start_process(
            name,
            [str(self.binaries / name), *options],
            self.directory / "logs" / f"{name}.log",
            ends_with_parent=self.ends_with_parent,
        )
        self.processes.append(process)
        entries = [process._asdict() for process in self.processes]
        (self.directory / "processes.json").write_text(json.dumps(entries, indent=2) + "\n")

    def _await(self, what: str, holds: Callable[[], bool]) -> None:
        wait_until(holds, what=what, seconds=START_SECONDS, processes=self.processes)

    def _etcd_options(self, port: int, peers: int) -> list[str]:
        return [
            f"--data-dir={self.directory / 'etcd'}",
            f"--listen-client-urls=http://{HOST}:{port}",
            f"--advertise-client-urls=http://{HOST}:{port}",
            f"--listen-peer-urls=http://{HOST}:{peers}",
            f"--initial-advertise-peer-urls=http://{HOST}:{peers}",
            f"--initial-cluster=default=http://{HOST}:{peers}",
            # What a crash of the machine would lose is lost with the cluster anyhow.
            "--unsafe-no-fsync",
        ]

    def _server_options(self, port: int, etcd: int) -> list[str]:
        return [
            f"--etcd-servers=http://{HOST}:{etcd}",
            f"--bind-address={HOST}",
            f"--secure-port={port}",
            f"--advertise-address={ADVERTISED_ADDRESS}",
            f"--service-cluster-ip-range={SERVICE_NETWORK}",
            "--authorization-mode=Node,RBAC",
            f"--client-ca-file={self.keys / 'ca.crt'}",
            *self._serving_options(),
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={self.keys / 'service-accounts.pub'}",
            f"--service-account-signing-key-file={self.keys / 'service-accounts.key'}",
        ]

    def _serving_options(self) -> list[str]:
        return [
            f"--tls-cert-file={self.keys / 'apiserver.crt'}",
            f"--tls-private-key-file={self.keys / 'apiserver.key'}",
        ]

    def _manager_options(self) -> list[str]:
        return [
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={self.keys / 'service-accounts.key'}",
            f"--root-ca-file={self.keys / 'ca.crt'}",
        ]

    def _client_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.keys / "ca.crt"))
        context.load_cert_chain(self.keys / "admin.crt", self.keys / "admin.key")
        return context

    def _kubeconfig(self, port: int) -> dict[str, object]:
        def content(name: str) -> str:
            return base64.b64encode((self.keys / name).read_bytes()).decode()

        cluster = {
            "server": f"https://{HOST}:{port}",
            "certificate-authority-data": content("ca.crt"),
        }
        user = {
            "client-certificate-data": content("admin.crt"),
            "client-key-data": content("admin.key"),
        }
        name = "stagetune-test"
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": name, "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
            "current-context": name,
        }


def _free_ports(number: int) -> list[int]:
    """Return ports that nobody listens on. Another program may still be faster to take one."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            # As servers do: a port whose last connection was just closed is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        found.append(port)
        if len(found) == number:
            return found
    raise OSError(f"no free port from {PORTS.start} to {PORTS.stop - 1}")


def _answers(port: int, path: str, context: ssl.SSLContext | None = None) -> bool:
    """Return whether a GET of `path` gives 200."""
    if context is None:
        connection = http.client.HTTPConnection(HOST, port, timeout=5)
    else:
        connection = http.client.HTTPSConnection(HOST, port, timeout=5, context=context)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
