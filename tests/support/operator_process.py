"""The operator as a process of its own, as a Deployment runs it, against any cluster."""

import os
import signal
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from local_cluster.control_plane import free_ports
from local_cluster.processes import Process, end_process, is_running, start_process, wait_until

START_SECONDS = 60
END_SECONDS = 15


class OperatorProcess:
    """An operator that is started, killed and started again; use it as a context."""

    def __init__(
        self, kubeconfig: Path, log: Path, settings: Mapping[str, str] | None = None
    ) -> None:
        """`settings` are variables without their prefix, `NAMESPACES` for one."""
        progress, metrics, health = free_ports(3)
        self.log = log
        self.progress_port, self.metrics_port, self.health_port = progress, metrics, health
        given = {
            "TRAINER_IMAGE": "stagetune/trainer:test",
            "PORT_PROGRESS": str(progress),
            "PORT_METRICS": str(metrics),
            "PORT_HEALTH": str(health),
            **(settings or {}),
        }
        self._variables = {f"STAGETUNE_{name}": value for name, value in given.items()}
        self._kubeconfig = kubeconfig
        self._process: Process | None = None

    def __enter__(self) -> "OperatorProcess":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def number(self) -> int:
        """The process's number."""
        assert self._process is not None, "the operator does not run"
        return self._process.number

    def start(self, *, wait: bool = True) -> None:
        """Start it, and return once it serves."""
        environment = {"KUBECONFIG": str(self._kubeconfig), **self._variables}
        settings = [f"{name}={value}" for name, value in environment.items()]
        self._process = start_process(
            "operator",
            ["/usr/bin/env", *settings, sys.executable, "-m", "stagetune_operator"],
            self.log,
            ends_with_parent=True,
        )
        if wait:
            wait_until(
                self._is_serving,
                what="operator",
                seconds=START_SECONDS,
                processes=[self._process],
            )

    def kill(self) -> None:
        """End it as a power cut does."""
        assert self._process is not None
        if is_running(self._process):
            os.kill(self._process.number, signal.SIGKILL)
        end_process(self._process, patience_seconds=END_SECONDS)

    def end(self) -> None:
        """Ask it to end, and wait for that."""
        if self._process is not None:
            end_process(self._process, patience_seconds=END_SECONDS)
            self._process = None

    def metrics(self) -> str:
        """Return what it exports."""
        return _get(f"http://127.0.0.1:{self.metrics_port}/metrics")

    def metric(self, name: str) -> float:
        """Return the sum of all series of the metric `name`, 0 where there is none."""
        lines = [line for line in self.metrics().splitlines() if line.startswith(name)]
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.removeprefix(name)[:1] in ("{", " ")
        )

    def _is_serving(self) -> bool:
        try:
            return bool(self.metrics())
        except OSError:
            return False


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def resident_bytes(number: int) -> int:
    """Return the memory that the process `number` has resident."""
    pages = int(Path(f"/proc/{number}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
