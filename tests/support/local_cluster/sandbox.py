"""A node's own namespaces: what happens in them is gone with their first process.

A pod is many processes that are nobody's children, mounts, and network devices. In namespaces of
processes, mounts and network of their own the kernel ends and removes them all when the first
process ends, whether it is told to or killed, and nothing of the machine's network, mounts or
folders below /run, /var/lib and /var/log changes. The first process ends with the one that started
it. Only the cgroups, empty by then, are left for `remove_traces`.
"""

import errno
import hashlib
import ipaddress
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from local_cluster.processes import Process, find_process, wait_until
from local_cluster.record import END_SECONDS, Processes

NETWORK = ipaddress.IPv4Network("198.18.0.0/15")
"""RFC 2544's addresses for tests of network devices, which no real network has. Every node takes
four of them."""
CGROUPS = Path("/sys/fs/cgroup")
OVERLAID = {"run": "/run", "lib": "/var/lib", "logs": "/var/log"}
"""Folders of the cluster's and those of the machine's in whose place its programs see them: these
paths are fixed in containerd's shim, the network plugins and the kubelet."""
SETUP = """
mount --make-rshared /
for pair in $3; do mount --bind "$1/${pair%:*}" "${pair#*:}"; done
ip link set lo up
touch "$1/run/ready"
exec "$2" pause
"""


class Sandbox(NamedTuple):
    """Namespaces whose first process runs, and how to get in."""

    first: Process

    @property
    def enter(self) -> tuple[str, ...]:
        """The command that runs another one inside."""
        return ("nsenter", f"--target={self.first.number}", "--net", "--pid", "--mount", "--")


def start_sandbox(processes: Processes, pod_program: Path) -> Sandbox:
    """Start namespaces that keep their files in the processes' folder."""
    directory = processes.directory
    for folder, place in OVERLAID.items():
        if directory.resolve().is_relative_to(Path(place).resolve()):
            raise ValueError(f"a node hides {place}, so {directory} cannot be there")
        (directory / folder).mkdir(exist_ok=True)
    pairs = " ".join(f"{folder}:{place}" for folder, place in OVERLAID.items())
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += ["sh", "-euc", SETUP, "sh", str(directory), str(pod_program), pairs]
    outer = processes.start("namespaces", command)
    processes.wait_until((directory / "run/ready").exists, what="namespaces")
    # `unshare` stays outside and waits; its one child is the first process inside.
    children = Path(f"/proc/{outer.number}/task/{outer.number}/children").read_text().split()
    first = find_process("first process", int(children[0]), Path(outer.log))
    if first is None:
        raise ProcessLookupError("the node's first process ended at once")
    processes.add(first)
    return Sandbox(first)


def connect_sandbox(directory: Path, sandbox: Sandbox) -> str:
    """Lay a line from the machine to the sandbox; return the address of its far end.

    The machine reaches that address, and from inside nothing but the machine is reached.
    """
    near, far = _free_addresses(directory)
    interface = interface_name(directory)
    ends = ["name", "eth0", "netns", str(sandbox.first.number)]
    _ip("link", "add", interface, "type", "veth", "peer", *ends)
    _ip("address", "add", f"{near}/30", "dev", interface)
    _ip("link", "set", interface, "up")
    _ip("address", "add", f"{far}/30", "dev", "eth0", enter=sandbox.enter)
    _ip("link", "set", "eth0", "up", enter=sandbox.enter)
    return far


def has_sandbox(directory: Path) -> bool:
    """Return whether a sandbox was begun in this folder."""
    return (directory / "run").exists()


def remove_traces(directory: Path) -> None:
    """Remove what the ended sandbox of this folder left on the machine."""
    # The kernel takes a namespace's devices away too, but only some time after its last process.
    _ip("link", "delete", interface_name(directory), check=False)
    wait_until(
        lambda: all(map(_is_removed, cgroup_folders(directory))),
        what="end of the pods' cgroups",
        seconds=END_SECONDS,
    )


def _is_removed(cgroup: Path) -> bool:
    """Remove a cgroup with all below it, and return whether that was possible."""
    folders = [path for path in cgroup.rglob("*") if path.is_dir()]
    try:
        for folder in (*sorted(folders, reverse=True), cgroup):
            folder.rmdir()
    except FileNotFoundError:
        return not cgroup.exists()
    except OSError as error:
        # Its last process has ended and is not yet away.
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def cgroup_name(directory: Path) -> str:
    """Return the name of the cgroup in which this folder's pods are."""
    return f"stagetune-{_key(directory)}"


def make_cgroups(directory: Path) -> None:
    """Make the cgroup of this folder's pods in every hierarchy that the machine has."""
    if (CGROUPS / "cgroup.controllers").exists():
        hierarchies = [CGROUPS]
    else:
        hierarchies = [path for path in CGROUPS.iterdir() if (path / "tasks").exists()]
    for hierarchy in hierarchies:
        (hierarchy / cgroup_name(directory)).mkdir(exist_ok=True)


def cgroup_folders(directory: Path) -> list[Path]:
    """Return the folders that are there of the cgroup of this folder's pods."""
    name = cgroup_name(directory)
    return [path for path in (CGROUPS / name, *CGROUPS.glob(f"*/{name}")) if path.exists()]


def _free_addresses(directory: Path) -> tuple[str, str]:
    """Return two addresses of a network of four that the machine has nothing of."""
    listed = json.loads(_ip("-json", "-4", "address", "show"))
    taken = [
        ipaddress.IPv4Interface(f"{entry['local']}/{entry['prefixlen']}").network
        for device in listed
        for entry in device["addr_info"]
    ]
    for network in _networks(int(_key(directory), 16)):
        if not any(map(network.overlaps, taken)):
            return str(network[1]), str(network[2])
    raise OSError(f"no network of {NETWORK} is free")


def _networks(start: int) -> Iterator[ipaddress.IPv4Network]:
    """Every network of four addresses, from one on that another folder hardly begins with."""
    number = NETWORK.num_addresses // 4
    for index in range(number):
        yield ipaddress.IPv4Network((int(NETWORK[0]) + 4 * ((start + index) % number), 30))


def interface_name(directory: Path) -> str:
    """Return the name of the machine's end of the line to this folder's sandbox."""
    return f"stg{_key(directory)}"


def _key(directory: Path) -> str:
    """Return what tells this folder apart, in the few characters that Linux has for a device."""
    return hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:8]


def _ip(*arguments: str, enter: Sequence[str] = (), check: bool = True) -> str:
    done = subprocess.run(
        [*enter, shutil.which("ip") or "/sbin/ip", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    if check and done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
