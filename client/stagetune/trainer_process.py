"""One trainer process on this machine: the local stand-in for a stage's pod."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from pydantic import ValidationError

from stagetune_api.files import write_file_atomically
from stagetune_api.names import StageLayout
from stagetune_api.progress import Progress
from stagetune_api.stage import StageConfig, Task

_LEAVE_SECONDS = 10
"""Left to a process that has nothing to save."""


class Interruption:
    """Ctrl-C: the first one asks the running task to save and leave, the second one ends it."""

    def __init__(self) -> None:
        self._requested = False
        self._process: subprocess.Popen[str] | None = None

    def is_requested(self) -> bool:
        """Whether the run is to end after saving."""
        return self._requested

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        """Take over SIGINT and SIGTERM for as long as the context lasts."""
        if threading.current_thread() is not threading.main_thread():
            # Signals belong to the main thread; a caller in another one stops us its own way.
            yield
            return
        before = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def passed_on_to(self, process: "subprocess.Popen[str]") -> Iterator[None]:
        """Pass requests on to `process`; one that came before it is passed on at once."""
        self._process = process
        try:
            if self._requested:
                process.terminate()
            yield
        finally:
            self._process = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.kill() if self._requested else process.terminate()
        self._requested = True


class TrainerProcess:
    """A trainer's process. It saves and leaves when this one disappears: it holds the other end of
    its standard input. It holds the run's lock until it has left. What it logs is appended to its
    log file."""

    def __init__(
        self, task: Task, layout: StageLayout, arguments: Sequence[str], lock_descriptor: int
    ) -> None:
        with layout.log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stagetune_trainer", "--stop-with-parent", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=_environment(task),
                # Ctrl-C in a terminal reaches the whole group; this process decides what it means.
                start_new_session=True,
                pass_fds=(lock_descriptor,),
            )
        self._log = layout.log

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def follow(self, on_progress: Callable[[Progress], None], interruption: Interruption) -> int:
        """Pass on what it tells until it ends; return its exit code, negative for a signal."""
        process = self._process
        if process.stdout is None:
            raise RuntimeError("the trainer was started without a pipe")
        with (
            self._log.open("a", encoding="utf-8") as log,
            process,
            interruption.passed_on_to(process),
        ):
            for line in process.stdout:
                try:
                    on_progress(Progress.model_validate_json(line))
                except ValidationError:
                    log.write(line)
            return process.wait()

    def end(self) -> None:
        """Have it leave without a task, and wait until it has."""
        with contextlib.suppress(OSError):
            self._process.terminate()
        try:
            self._process.communicate(timeout=_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def start_trainer(config: StageConfig, layout: StageLayout, lock_descriptor: int) -> TrainerProcess:
    """Start one task in a process of its own."""
    layout.root.mkdir(parents=True, exist_ok=True)
    write_file_atomically(layout.config, config.model_dump_json(indent=2))
    return TrainerProcess(config.task, layout, [str(layout.config)], lock_descriptor)


def log_tail(layout: StageLayout, max_characters: int = 4000) -> str:
    """Return the end of what the task logged."""
    with contextlib.suppress(OSError):
        return layout.log.read_text(encoding="utf-8", errors="replace")[-max_characters:]
    return ""


def _environment(task: Task) -> dict[str, str]:
    """Return the environment of a trainer process."""
    environment = {
        # Threads that wait for each other sleep instead of spinning: on a machine that does other
        # work too, spinning slows every step tenfold. Whoever sets it otherwise has the last word.
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # Needed for the same bits on a GPU (PyTorch's notes on reproducibility).
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    if task is not Task.PREPARE:
        # Everything is on the volume by now: nothing after prepare may depend on a hub.
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def trainer_is_installed() -> bool:
    """Whether the trainer's packages are there, without importing them."""
    needed = ("torch", "transformers", "stagetune_trainer")
    return all(importlib.util.find_spec(name) is not None for name in needed)
