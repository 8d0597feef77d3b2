"""A control plane in one folder: started whole or not at all, and ended without a trace."""

import base64
import http.client
import json
import random
import shutil
import socket
import ssl
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from local_cluster.processes import is_running
from local_cluster.record import Processes, end_recorded, recorded

HOST = "127.0.0.1"
ADVERTISED_ADDRESS = "192.0.2.1"
"""Where pods would find the API server, which refuses a loopback address for it. Without a node
there are none, so it is one of RFC 5737's addresses for documentation."""
SERVICE_NETWORK = "10.96.0.0/16"
SERVER_NAMES = (
    "10.96.0.1",
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
)
PORTS = range(20000, 32000)
"""Below the ports that Linux gives to outgoing connections, which come and go all the time."""
ACCOUNT_PATH = "/api/v1/namespaces/default/serviceaccounts/default"
"""What the controller manager makes first for every namespace."""


class Place(NamedTuple):
    """Where a control plane runs and is found."""

    address: str = HOST
    """What its programs listen on."""
    advertised: str = ADVERTISED_ADDRESS
    """Where pods find the API server."""
    enter: tuple[str, ...] = ()
    """The command before each program's own that makes it run there."""
    nodes: tuple[str, ...] = ()
    """The names of the nodes that will join."""


THIS_MACHINE = Place()


def start_control_plane(
    binaries: Path,
    directory: Path,
    place: Place = THIS_MACHINE,
    *,
    ends_with_parent: bool = True,
) -> Path:
    """Start a control plane that keeps everything in `directory`; return its kubeconfig.

    Returns when the API server is ready and controller manager and scheduler work. If that does
    not come about, ends what was started and raises ProcessEndedError or TimeoutError.
    """
    for folder in ("keys", "etcd"):
        (directory / folder).mkdir(parents=True)
    processes = Processes(directory, ends_with_parent=ends_with_parent)
    try:
        _Start(binaries, processes, place).run()
    except BaseException:
        end_recorded(directory)
        raise
    return kubeconfig_file(directory)


def kubeconfig_file(directory: Path) -> Path:
    """Return the file with which kubectl and other clients find the control plane."""
    return directory / "kubeconfig.json"


def is_whole(directory: Path) -> bool:
    """Return whether a control plane was started in `directory` and all of it is running."""
    return kubeconfig_file(directory).exists() and all(map(is_running, recorded(directory)))


def end_control_plane(directory: Path) -> None:
    """End what was started in `directory`, the last one first, and remove the folder."""
    end_recorded(directory)
    shutil.rmtree(directory, ignore_errors=True)


def build_kubeconfig(keys: Path, server: str, client: str) -> dict[str, object]:
    """Return the kubeconfig with which the client of this name in `keys` speaks to `server`."""

    def content(name: str) -> str:
        return base64.b64encode((keys / name).read_bytes()).decode()

    cluster = {"server": server, "certificate-authority-data": content("ca.crt")}
    user = {
        "client-certificate-data": content(f"{client}.crt"),
        "client-key-data": content(f"{client}.key"),
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


class _Start:
    """One start of a control plane, step by step."""

    def __init__(self, binaries: Path, processes: Processes, place: Place) -> None:
        self.binaries = binaries
        self.processes = processes
        self.directory = processes.directory
        self.place = place
        self.keys = self.directory / "keys"

    def run(self) -> None:
        names = {*SERVER_NAMES, self.place.address, self.place.advertised}
        names |= {f"node={name}" for name in self.place.nodes}
        command = [str(self.binaries / "certificates"), str(self.keys), *sorted(names)]
        subprocess.run(command, check=True)
        etcd, peers, metrics, server, manager, scheduler = free_ports(6)
        admin = self._client_context()
        url = f"https://{self.place.address}:{server}"
        config = self.directory / "unfinished.json"
        config.write_text(json.dumps(build_kubeconfig(self.keys, url, "admin")))

        self._start("etcd", self._etcd_options(etcd, peers, metrics))
        self._await("etcd", metrics, "/health")
        self._start("kube-apiserver", self._server_options(server, etcd))
        self._await("API server", server, "/readyz", admin)
        options = [
            f"--kubeconfig={config}",
            f"--bind-address={self.place.address}",
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
        self._await("scheduler", scheduler, "/healthz", admin)
        self._await("controller manager", server, ACCOUNT_PATH, admin)
        config.rename(kubeconfig_file(self.directory))

    def _start(self, name: str, options: Sequence[str]) -> None:
        self.processes.start(name, [*self.place.enter, str(self.binaries / name), *options])

    def _await(
        self, what: str, port: int, path: str, context: ssl.SSLContext | None = None
    ) -> None:
        address = self.place.address
        self.processes.wait_until(lambda: answers(address, port, path, context), what=what)

    def _etcd_options(self, port: int, peers: int, metrics: int) -> list[str]:
        return [
            f"--data-dir={self.directory / 'etcd'}",
            f"--listen-client-urls=http://{HOST}:{port}",
            f"--advertise-client-urls=http://{HOST}:{port}",
            f"--listen-peer-urls=http://{HOST}:{peers}",
            f"--initial-advertise-peer-urls=http://{HOST}:{peers}",
            f"--initial-cluster=default=http://{HOST}:{peers}",
            # Everything in etcd is for the API server beside it alone, but for its health.
            f"--listen-metrics-urls=http://{self.place.address}:{metrics}",
            # What a crash of the machine would lose is lost with the cluster anyhow.
            "--unsafe-no-fsync",
        ]

    def _server_options(self, port: int, etcd: int) -> list[str]:
        return [
            f"--etcd-servers=http://{HOST}:{etcd}",
            f"--bind-address={self.place.address}",
            f"--secure-port={port}",
            f"--advertise-address={self.place.advertised}",
            f"--service-cluster-ip-range={SERVICE_NETWORK}",
            "--authorization-mode=Node,RBAC",
            f"--client-ca-file={self.keys / 'ca.crt'}",
            *self._serving_options(),
            # How the API server reaches kubelets, for logs and port-forward: no DNS knows nodes.
            "--kubelet-preferred-address-types=InternalIP",
            f"--kubelet-client-certificate={self.keys / 'admin.crt'}",
            f"--kubelet-client-key={self.keys / 'admin.key'}",
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


def free_ports(number: int) -> list[int]:
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


def answers(address: str, port: int, path: str, context: ssl.SSLContext | None = None) -> bool:
    """Return whether a GET of `path` gives 200."""
    if context is None:
        connection = http.client.HTTPConnection(address, port, timeout=5)
    else:
        connection = http.client.HTTPSConnection(address, port, timeout=5, context=context)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
