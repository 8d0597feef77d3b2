"""Start and end a control plane that stands until it is told to end."""

import argparse
import fcntl
import sys
from collections.abc import Sequence
from pathlib import Path

from local_cluster.binaries import BinariesUnavailableError, cache_directory, provide_binaries
from local_cluster.control_plane import (
    end_control_plane,
    is_whole,
    kubeconfig_file,
    start_control_plane,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for and return the exit code."""
    parser = argparse.ArgumentParser(prog="local_cluster", description=__doc__)
    parser.add_argument("command", choices=["up", "down"])
    command = parser.parse_args(arguments).command
    directory = cache_directory() / "cluster"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name("cluster.lock").open("w") as lock:
        # Two starts at once would each take the other's folder for a leftover.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _up(directory) if command == "up" else _down(directory)


def _up(directory: Path) -> int:
    if not is_whole(directory):
        end_control_plane(directory)
        try:
            binaries = provide_binaries(_tell)
        except BinariesUnavailableError as error:
            _tell(str(error))
            return 1
        start_control_plane(binaries, directory, ends_with_parent=False)
        kubectl = directory / "kubectl"
        kubectl.symlink_to(binaries / "kubectl")
    _tell(f"The control plane is up; its kubectl is {directory / 'kubectl'}. Use it with")
    print(f"export KUBECONFIG={kubeconfig_file(directory)}")  # noqa: T201
    return 0


def _down(directory: Path) -> int:
    end_control_plane(directory)
    _tell("Nothing of the control plane is left.")
    return 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
