"""`python -m stagetune_trainer STAGE.json`: read the stage file, run it, exit with a code.

Progress goes to standard output as JSON lines, everything else to standard error.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from stagetune_api.names import TrainerExitCode
from stagetune_api.stage import StageConfig, Task

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

        def watch() -> None:
            while os.read(sys.stdin.fileno(), 1024):
                continue
            # To the main thread, so that it is ended in the middle of a download too.
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=watch, daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self.raises:
            raise KeyboardInterrupt("asked to stop")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the task of one stage file and return the process's exit code."""
    parser = argparse.ArgumentParser(prog="stagetune_trainer", description=__doc__)
    parser.add_argument("config", type=Path, help="StageConfig as a JSON file")
    parser.add_argument(
        "--stop-with-parent",
        action="store_true",
        help="save and leave when standard input is closed",
    )
    parser.add_argument(
        "--termination-message", type=Path, help="where to write the report's short form"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    stop = SignalledStop()
    stop.listen()
    if options.stop_with_parent:
        stop.watch_standard_input()
    config = StageConfig.model_validate_json(options.config.read_bytes())

    stop.raises = config.task is not Task.TRAIN

    try:
        # After the signal handlers: the imports take seconds, and a request must not be lost.
        from stagetune_trainer.run import run_task
    except KeyboardInterrupt:
        return int(TrainerExitCode.INTERRUPTED)
    report, code = run_task(config, stop, started=_STARTED)
    if report.failure is not None:
        logging.getLogger(__name__).error("%s: %s", report.outcome, report.failure.message)
    if options.termination_message is not None:
        options.termination_message.write_text(report.termination_message(), encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
