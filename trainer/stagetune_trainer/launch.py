"""Several processes for one stage: started by torchrun's launcher, watched, and answered for.

The process that was given the stage file keeps what it has towards the outside: signals, the
termination message and the exit code. It starts the others, passes a request to stop on by closing
their standard input, and says at the end how the stage ended. Of the processes that train, the
first one writes to the volume and reports (`ranks`).
"""

import contextlib
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stagetune_api.files import write_file_atomically
from stagetune_api.names import (
    COORDINATOR_PORT,
    COORDINATOR_VARIABLE,
    POD_INDEX_VARIABLE,
    RunLayout,
    TrainerExitCode,
    newest_attempt,
)
from stagetune_api.report import Failure, FailureClass, Outcome, StageReport
from stagetune_api.stage import EnginePlan, StageConfig, Task

_OUTCOMES_VARIABLE = "STAGETUNE_OUTCOMES_DIRECTORY"
RANK_VARIABLE = "RANK"
"""Set by torchrun's launcher in the processes that it starts, and in no other."""
_SHUTDOWN_SECONDS = 30
"""Left to the other processes when one has failed; they have nothing to save without it."""
_NOTICE_SECONDS = 5.0
"""Within these the launcher has noticed a death; those that it brings about come later."""
_POLL_SECONDS = 0.1
_MEETING_SECONDS = 1800
"""So long the first pods of a stage wait for the last one."""


@dataclass(frozen=True, kw_only=True)
class _Death:
    """The end of a process as the launcher saw it."""

    code: int
    """Exit code, negative for a signal."""
    when: float
    """Unix time, in whole seconds."""


class Stop(Protocol):
    """Whether somebody asked the process to save and leave."""

    @property
    def requested(self) -> bool:
        """True from the moment of the request."""


def is_started() -> bool:
    """Whether this process is one of several that `run_processes` started."""
    return _OUTCOMES_VARIABLE in os.environ and RANK_VARIABLE in os.environ


def leave_outcome(report: StageReport) -> None:
    """Leave a process's report where the process that started it looks."""
    path = Path(os.environ[_OUTCOMES_VARIABLE]) / f"{os.environ[RANK_VARIABLE]}.json"
    write_file_atomically(path, report.model_dump_json())


def run_processes(
    stage_file: Path, config: StageConfig, stop: Stop, metrics_port: int | None
) -> tuple[StageReport, TrainerExitCode]:
    """Do the stage in as many processes as its engine has, and return how it ended.

    None of them outlives this call.
    """
    plan = config.engine
    if plan is None:
        raise ValueError("only a stage with an engine has several processes")
    # torch's, so seconds: after the signal handlers, and only where there is something to start.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="stagetune-") as folder, _standard_input(stop):
        os.environ |= _environment(plan, Path(folder))
        settings = LaunchConfig(
            min_nodes=plan.nodes,
            max_nodes=plan.nodes,
            nproc_per_node=plan.processes_per_node,
            **_meeting_place(plan, stop),
            max_restarts=0,
            monitor_interval=_POLL_SECONDS,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            # Signals are ours; what follows from them goes over standard input.
            signals_to_handle="SIGHUP",
            shutdown_timeout=_SHUTDOWN_SECONDS,
        )
        arguments = ["-m", "stagetune_trainer", "--stop-with-parent", str(stage_file)]
        if metrics_port is not None:
            arguments.append(f"--metrics-port={metrics_port}")
        deaths: dict[int, _Death] = {}
        try:
            elastic_launch(settings, sys.executable)(*arguments)
        except ChildFailedError as error:
            deaths = {
                rank: _Death(code=failure.exitcode, when=failure.timestamp)
                for rank, failure in error.failures.items()
            }
        except Exception as error:
            # Whatever the launcher makes of a stop while the processes still meet.
            if stop.requested:
                raise KeyboardInterrupt from error
            raise
        report = _judge(config, plan, _read_outcomes(Path(folder)), deaths)
    code = report.failure.exit_code if report.failure is not None else TrainerExitCode.SUCCEEDED
    return report, TrainerExitCode(code)


def _meeting_place(plan: EnginePlan, stop: Stop) -> dict[str, Any]:
    """Return how the launchers of a stage's pods find each other."""
    if plan.nodes == 1:
        return {
            "run_id": uuid.uuid4().hex,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "127.0.0.1:0",
            "local_addr": "127.0.0.1",
        }
    host = os.environ[COORDINATOR_VARIABLE]
    _await_name(host, stop)
    index = int(os.environ[POD_INDEX_VARIABLE])
    return {
        "run_id": host,
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{host}:{COORDINATOR_PORT}",
        "rdzv_configs": {"rank": index, "timeout": _MEETING_SECONDS},
    }


def _await_name(host: str, stop: Stop) -> None:
    """Wait until `host` has an address: a name of a pod comes with the pod's network.

    Raises TimeoutError, and KeyboardInterrupt when asked to stop.
    """
    deadline = time.monotonic() + _MEETING_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, COORDINATOR_PORT)
        except socket.gaierror as error:
            if stop.requested:
                raise KeyboardInterrupt from error
            if time.monotonic() > deadline:
                raise TimeoutError(f"the pod {host} has not come: {error}") from error
            time.sleep(1.0)
        else:
            return


def _environment(plan: EnginePlan, folder: Path) -> Mapping[str, str]:
    # Processes that each took all processors would wait for each other.
    threads = max(1, len(os.sched_getaffinity(0)) // plan.processes_per_node)
    # All are on this machine, whatever its name resolves to.
    own = {"GLOO_SOCKET_IFNAME": "lo"} if plan.nodes == 1 else {}
    threaded = {"OMP_NUM_THREADS": str(threads)}
    return {**threaded, **own, **os.environ, _OUTCOMES_VARIABLE: str(folder)}


@contextlib.contextmanager
def _standard_input(stop: Stop) -> Iterator[None]:
    """Have a standard input, to be inherited, that ends when a stop is requested.

    It ends too when this process is gone, however that happens.
    """
    reading, writing = os.pipe()
    os.dup2(reading, 0)
    os.close(reading)
    is_over = threading.Event()

    def watch() -> None:
        while not stop.requested and not is_over.wait(_POLL_SECONDS):
            continue
        os.close(writing)

    thread = threading.Thread(target=watch, name="stop request", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _read_outcomes(folder: Path) -> dict[int, tuple[float, StageReport]]:
    """Return what each process left, and when, by its rank."""
    return {
        int(path.stem): (
            path.stat().st_mtime,
            StageReport.model_validate_json(path.read_text(encoding="utf-8")),
        )
        for path in folder.glob("*.json")
    }


def _judge(
    config: StageConfig,
    plan: EnginePlan,
    outcomes: Mapping[int, tuple[float, StageReport]],
    deaths: Mapping[int, _Death],
) -> StageReport:
    """Return the report of the stage: the first process's here, unless another one is to blame.

    Who died without a word is to blame before those that only lost their connection to it; else
    whoever failed first. The launcher ends the others of one that failed, those that do not listen
    half a minute later, and what they die of tells nothing.
    """
    failed = [(when, rank) for rank, (when, report) in outcomes.items() if report.failure]
    latest = min(failed)[0] + _NOTICE_SECONDS if failed else math.inf
    for rank, death in sorted(deaths.items()):
        if rank not in outcomes and death.code != -signal.SIGTERM and death.when <= latest:
            return _write(config, _died(config, plan, rank, death.code))
    first = outcomes[0][1] if 0 in outcomes else None
    rank = min(failed)[1] if failed else min(outcomes)
    report = outcomes[rank][1]
    was_asked = report.outcome is Outcome.INTERRUPTED
    if first is not None and was_asked and first.outcome is Outcome.INTERRUPTED:
        return first
    if rank == 0 or report.failure is None:
        return report
    message = f"process {rank + 1} of {plan.num_processes}: {report.failure.message}"[:8192]
    failure = report.failure.model_copy(update={"message": message})
    return _write(config, report.model_copy(update={"failure": failure}))


def _died(config: StageConfig, plan: EnginePlan, rank: int, code: int) -> StageReport:
    how = f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"
    if code == -9:
        how += " (by the kernel, if the machine ran out of memory)"
    failure = Failure(
        failure_class=FailureClass.DISRUPTED if code < 0 else FailureClass.INTERNAL,
        exit_code=int(TrainerExitCode.INTERNAL),
        message=f"process {rank + 1} of {plan.num_processes} {how} without a report",
    )
    return StageReport(
        task=Task.TRAIN,
        name=config.stage.name if config.stage is not None else "",
        attempt=config.attempt,
        outcome=Outcome.FAILED,
        failure=failure,
    )


def _write(config: StageConfig, report: StageReport) -> StageReport:
    """Put a report in the place of the first process's, where this attempt has a number to say so.

    A pod's has none before it is claimed; its termination message speaks instead.
    """
    if config.stage is not None and config.attempt > 0:
        layout = RunLayout(Path(config.run_directory)).stage(config.stage.directory)
        if newest_attempt(layout.fence) <= config.attempt:
            with contextlib.suppress(OSError):
                write_file_atomically(layout.report, report.model_dump_json(indent=2))
    return report.model_copy(update={"attempt": config.attempt})
