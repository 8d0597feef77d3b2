"""The next task's process, started before the present one is done, so that its code is imported."""

from pathlib import Path

from stagetune.trainer_process import TrainerProcess, start_trainer
from stagetune_api.files import write_file_atomically
from stagetune_api.names import StageLayout
from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.stage import StageConfig

STANDBY_SECONDS = 30.0
"""A stage that is this near its end has the next process started."""


def is_near_its_end(progress: Progress) -> bool:
    """Whether a stage is so far that the next process is to be started."""
    left = progress.eta_seconds if progress.kind is ProgressKind.STEP else None
    return left is not None and left < STANDBY_SECONDS


class Standby:
    """At most one process that waits for its stage file."""

    def __init__(self, lock_descriptor: int) -> None:
        self._lock_descriptor = lock_descriptor
        self._waiting: tuple[StageConfig, TrainerProcess] | None = None
        self._failed: set[Path] = set()
        """Where starting one was tried in vain."""

    def begin(self, forecast: StageConfig, layout: StageLayout) -> None:
        """Start a process for `forecast`, a stage file as far as it is known, if none waits.

        The run goes on as well where none can be started.
        """
        if self._waiting is not None or layout.root in self._failed:
            return
        try:
            self._waiting = forecast, self._start(forecast, layout)
        except OSError:
            self._failed.add(layout.root)

    def _start(self, forecast: StageConfig, layout: StageLayout) -> TrainerProcess:
        layout.root.mkdir(parents=True, exist_ok=True)
        # One of an earlier attempt would be taken for the file that is waited for.
        layout.config.unlink(missing_ok=True)
        write_file_atomically(layout.forecast, forecast.model_dump_json(indent=2))
        arguments = [str(layout.forecast), f"--await={layout.config}"]
        return TrainerProcess(forecast.task, layout, arguments, self._lock_descriptor)

    def start(self, config: StageConfig, layout: StageLayout) -> TrainerProcess:
        """Return a process that does the task of `config`: the one that waits, if it is for it."""
        if self._waiting is not None:
            forecast, process = self._waiting
            if process.is_alive() and forecast == config.forecast():
                write_file_atomically(layout.config, config.model_dump_json(indent=2))
                self._waiting = None
                return process
            self.end()
        return start_trainer(config, layout, self._lock_descriptor)

    def end(self) -> None:
        """End the process that waits, if there is one."""
        if self._waiting is not None:
            self._waiting[1].end()
            self._waiting = None
