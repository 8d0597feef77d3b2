"""Start and end a cluster that stands until it is told to end."""

import argparse
import fcntl
import sys
from collections.abc import Sequence
from pathlib import Path

from local_cluster.binaries import BinariesUnavailableError, cache_directory, provide_binaries
from local_cluster.control_plane import is_whole, kubeconfig_file, start_control_plane
from local_cluster.node import provide_node_programs, why_no_node
from local_cluster.node_cluster import end_cluster, has_node, start_node_cluster


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for and return the exit code."""
    parser = argparse.ArgumentParser(prog="local_cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a control plane, without root")
    up.add_argument("--node", action="store_true", help="and a node that runs pods, as root")
    commands.add_parser("down", help="end it")
    options = parser.parse_args(arguments)
    directory = cache_directory() / "cluster"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name("cluster.lock").open("w") as lock:
        # Two starts at once would each take the other's folder for a leftover.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _up(directory, options.node) if options.command == "up" else _down(directory)


def _up(directory: Path, with_node: bool) -> int:
    if not is_whole(directory):
        end_cluster(directory)
        try:
            _start(directory, with_node)
        except BinariesUnavailableError as error:
            _tell(str(error))
            return 1
    elif with_node and not has_node(directory):
        _tell("A control plane without a node is up already; end it first (cluster-down).")
        return 1
    _tell(f"The cluster is up; its kubectl is {directory / 'kubectl'}. Use it with")
    print(f"export KUBECONFIG={kubeconfig_file(directory)}")  # noqa: T201
    return 0


def _start(directory: Path, with_node: bool) -> None:
    if not with_node:
        binaries = provide_binaries(_tell)
        start_control_plane(binaries, directory, ends_with_parent=False)
    elif reason := why_no_node():
        raise BinariesUnavailableError(reason)
    else:
        programs = provide_node_programs(_tell)
        start_node_cluster(programs, directory, _tell, ends_with_parent=False)
        binaries = programs.kubernetes
    (directory / "kubectl").symlink_to(binaries / "kubectl")


def _down(directory: Path) -> int:
    end_cluster(directory)
    _tell("Nothing of the cluster is left.")
    return 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
