"""`python -m stagetune_trainer STAGE.json`: read the stage file, run it, exit with a code.

Progress goes to standard output as JSON lines, everything else to standard error.
"""

import argparse
import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from stagetune_api.names import TrainerExitCode
from stagetune_api.report import Failure, FailureClass, Outcome, StageReport
from stagetune_api.stage import StageConfig, Task
from stagetune_trainer import launch
from stagetune_trainer.base_check import begin_check
from stagetune_trainer.environment import set_up_environment
from stagetune_trainer.hub_tokens import redacted
from stagetune_trainer.lean_imports import import_lean

logger = logging.getLogger(__name__)

_STARTED = time.monotonic()


class SignalledStop:
    """Becomes requested on SIGTERM or SIGINT, or when the process that started this one is gone.

    A training stage looks at it between micro-batches and saves first. The other tasks have nothing
    to save: they are ended by an exception wherever they are.
    """

    def __init__(self) -> None:
        self.requested = False
        self.raises = False

    def listen(self) -> None:
        """Take over both signals."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def watch_standard_input(self) -> None:
        """Stop when standard input ends: its other end is held by the process that waits for us."""

        # Its number is given to another file where this process starts others.
        descriptor = os.dup(sys.stdin.fileno())

        def watch() -> None:
            while os.read(descriptor, 1024):
                continue
            # To the main thread, so that it is ended in the middle of a download too.
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=watch, daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self.raises:
            # Once: a second exception would end what the first one is still putting in order.
            self.raises = False
            raise KeyboardInterrupt("asked to stop")


class RedactingFormatter(logging.Formatter):
    """Keeps tokens out of the log, whatever a library says of its requests."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of `record`."""
        return redacted(super().format(record))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the task of one stage file and return the process's exit code."""
    options = _parse(arguments)
    _set_up_logging()
    stop = SignalledStop()
    stop.listen()
    if options.stop_with_parent:
        stop.watch_standard_input()
    report, code = _run(options, stop)
    if report.failure is not None:
        logger.error("%s: %s", report.outcome, report.failure.message)
    if launch.is_started():
        launch.leave_outcome(report)
    if options.termination_message is not None:
        code = _write_termination_message(options.termination_message, report, code)
    return int(code)


def leave(code: int) -> NoReturn:
    """End the process here and now, with everything that it said where it belongs.

    Python's own end takes torch's modules apart, object by object. That is more than a second, in
    which the GPU stays taken and nobody learns the code. Once `main` has returned, the report and
    the termination message are written and the last post is out; what is left is what libraries
    want done at the end (the log, temporary folders) and text that still waits to be written.
    No thread is waited for, so one that hangs in a download holds nothing up.
    """
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            # Where nobody reads any more or the disk is full, the code speaks all the same.
            with contextlib.suppress(OSError):
                stream.flush()
    finally:
        os._exit(code)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="stagetune_trainer", description=__doc__)
    parser.add_argument("config", type=Path, help="StageConfig as a JSON file")
    parser.add_argument(
        "--stop-with-parent",
        action="store_true",
        help="save and leave when standard input is closed",
    )
    parser.add_argument(
        "--await",
        dest="awaited",
        metavar="FILE|URL",
        help="stand by: the configuration is a forecast, and the stage file comes from there",
    )
    parser.add_argument(
        "--termination-message", type=Path, help="where to write the report's short form"
    )
    parser.add_argument(
        "--metrics-port", type=_port, help="port of /metrics for Prometheus; none without it"
    )
    return parser.parse_args(arguments)


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port < 1 << 16:
        raise ValueError(f"{port} is no port")
    return port


def _set_up_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # A line for each request, with addresses that are signed for whoever reads them.
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)


def _run(options: argparse.Namespace, stop: SignalledStop) -> tuple[StageReport, TrainerExitCode]:
    """Do what the stage file says; whatever happens, there is a report of it."""
    config = None
    try:
        config = StageConfig.model_validate_json(options.config.read_bytes())
        set_up_environment(config.task)
        if config.engine is not None and not launch.is_started():
            return launch.run_processes(options.config, config, stop, options.metrics_port)
        # One that stands by has nothing to save either.
        stop.raises = config.task is not Task.TRAIN or options.awaited is not None
        if stop.raises and stop.requested:
            raise KeyboardInterrupt
        # After the signal handlers: the imports take seconds, and a request must not be lost.
        begin_check(config)
        import_lean(config)
        from stagetune_trainer.run import run_task
        from stagetune_trainer.start_clock import StartClock, seconds_since_process_start

        if options.awaited is not None:
            from stagetune_trainer.standby import await_stage_file

            config = await_stage_file(options.awaited, config)
            stop.raises = config.task is not Task.TRAIN
            age = 0.0  # what was done before the task was due is no part of it
        else:
            age = seconds_since_process_start() or time.monotonic() - _STARTED
        return run_task(config, stop, clock=StartClock(age), metrics_port=options.metrics_port)
    except KeyboardInterrupt:
        return _ended_early(
            config,
            FailureClass.DISRUPTED,
            TrainerExitCode.INTERRUPTED,
            "asked to stop before anything was begun",
        )
    except Exception as error:
        # The stage file is ours, and so is the image: the run's author can mend neither.
        logger.error("%s", options.config, exc_info=error)
        return _ended_early(
            config,
            FailureClass.INTERNAL,
            TrainerExitCode.INTERNAL,
            f"{options.config}: {type(error).__name__}: {error}",
        )
    finally:
        stop.raises = False


def _ended_early(
    config: StageConfig | None, failure_class: FailureClass, code: TrainerExitCode, message: str
) -> tuple[StageReport, TrainerExitCode]:
    """Return the report of a process that did not come to its task."""
    interrupted = failure_class is FailureClass.DISRUPTED
    failure = Failure(failure_class=failure_class, exit_code=int(code), message=message[:8192])
    name = "unknown"
    if config is not None:
        name = config.stage.name if config.stage else config.task.value.lower()
    report = StageReport(
        task=config.task if config else None,
        name=name,
        attempt=config.attempt if config else 0,
        outcome=Outcome.INTERRUPTED if interrupted else Outcome.FAILED,
        failure=failure,
    )
    return report, code


def _write_termination_message(
    path: Path, report: StageReport, code: TrainerExitCode
) -> TrainerExitCode:
    """Leave the report's short form for whoever started the container, and return the exit code.

    The file is mounted, so it cannot be replaced by a rename: it is written at once, and then cut
    to its length. One that cannot be written leaves the exit code to speak.
    """
    try:
        text = report.termination_message()
    except ValueError as error:
        report, code = _ended_early(
            None, FailureClass.INTERNAL, TrainerExitCode.INTERNAL, str(error)
        )
        text = report.termination_message()
    data = text.encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            length = os.write(descriptor, data)
            with contextlib.suppress(OSError):  # a pipe has no length
                os.ftruncate(descriptor, length)
        finally:
            os.close(descriptor)
    except OSError as error:
        logger.error("the termination message is not written: %s", error)
    return code


if __name__ == "__main__":
    leave(main())
