"""The processes of one folder, written down there from the first one on.

Whoever finds the folder can so end them, also after the program that began was killed.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from local_cluster.processes import Process, end_process, start_process, wait_until

START_SECONDS = 120
END_SECONDS = 15
_PROXIES = frozenset({"http_proxy", "https_proxy", "all_proxy", "no_proxy"})


class Processes:
    """What is started in `directory`, in the order of its start."""

    def __init__(self, directory: Path, *, ends_with_parent: bool) -> None:
        self.directory = directory
        self.started = recorded(directory)
        self._ends_with_parent = ends_with_parent
        (directory / "logs").mkdir(parents=True, exist_ok=True)

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> Process:
        """Start `command`, with `environment` over this process's own, and write it down."""
        process = start_process(
            name,
            command,
            self.directory / "logs" / f"{name}.log",
            ends_with_parent=self._ends_with_parent,
            # A cluster's programs speak to one another, and no proxy leads there.
            environment={**_without_proxies(os.environ), **(environment or {})},
        )
        self.add(process)
        return process

    def add(self, process: Process) -> None:
        """Write down a process that one of these has started."""
        self.started.append(process)
        entries = [entry._asdict() for entry in self.started]
        (self.directory / "processes.json").write_text(json.dumps(entries, indent=2) + "\n")

    def wait_until(self, holds: Callable[[], bool], *, what: str) -> None:
        """Return once `holds()`; raises as `processes.wait_until` does."""
        wait_until(holds, what=what, seconds=START_SECONDS, processes=self.started)


def recorded(directory: Path) -> list[Process]:
    """Return the processes that were started in `directory`, whether they run or not."""
    record = directory / "processes.json"
    if not record.exists():
        return []
    return [Process(**entry) for entry in json.loads(record.read_text())]


def end_recorded(directory: Path) -> None:
    """End what was started in `directory`, the last one first."""
    for process in reversed(recorded(directory)):
        end_process(process, patience_seconds=END_SECONDS)


def _without_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.lower() not in _PROXIES}
