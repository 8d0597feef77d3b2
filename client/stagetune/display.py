"""What a person sees while a run goes on: a live table on a terminal, plain lines elsewhere."""

import time
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stagetune.listeners import Listeners
from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.stage import Task
from stagetune_api.status import (
    StagedFineTuneStatus,
    StageState,
    StageStatus,
    format_duration,
)

_SECONDS_BETWEEN_LINES = 10.0
_STATE_STYLES = {
    StageState.PENDING: "dim",
    StageState.QUEUED: "dim",
    StageState.RUNNING: "bold cyan",
    StageState.SUCCEEDED: "green",
    StageState.INTERRUPTED: "yellow",
    StageState.FAILED: "bold red",
}


class Display(Protocol):
    """Shows a run; used as a context around it."""

    def __enter__(self) -> Listeners:
        """Begin to show and return who is to be told."""

    def __exit__(self, *exception: object) -> None:
        """Leave the last state on the screen."""


def make_display(console: Console) -> Display:
    """Return the live table on a terminal and plain lines where output is not one."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


class PlainDisplay:
    """One line for each thing that happens, at most every ten seconds for steps."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._said_at = 0.0

    def __enter__(self) -> Listeners:
        return Listeners(
            on_status=self._on_status, on_progress=self._on_progress, on_message=self._say
        )

    def __exit__(self, *exception: object) -> None:
        """Nothing is left open."""

    def _on_status(self, status: StagedFineTuneStatus) -> None:
        self._stage = status.stage

    def _on_progress(self, progress: Progress) -> None:
        where = self._stage if progress.task is Task.TRAIN else progress.name
        match progress.kind:
            case ProgressKind.MESSAGE:
                self._say(f"{where}: {progress.message}")
            case ProgressKind.VALIDATION:
                self._say(
                    f"{where}: step {progress.step}/{progress.total_steps} "
                    f"validation loss {progress.validation_loss:.4f}"
                )
            case ProgressKind.METERS:
                self._say(f"{where}: {_describe_meters(progress)}")
            case ProgressKind.CHECKPOINT:
                self._say(f"{where}: saved a checkpoint after step {progress.step}")
            case ProgressKind.STEP:
                now = time.monotonic()
                if now - self._said_at >= _SECONDS_BETWEEN_LINES:
                    self._said_at = now
                    self._say(f"{where}: {_describe_step(progress)}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveDisplay:
    """A table of the stages that stays in place, and the last message below it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = StagedFineTuneStatus()
        self._message = ""
        self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> Listeners:
        self._live.start()
        return Listeners(
            on_status=self._on_status, on_progress=self._on_progress, on_message=self._on_message
        )

    def __exit__(self, *exception: object) -> None:
        self._message = ""
        self._draw()
        self._live.stop()

    def _on_status(self, status: StagedFineTuneStatus) -> None:
        self._status = status
        self._draw()

    def _on_progress(self, progress: Progress) -> None:
        if progress.kind is ProgressKind.MESSAGE:
            self._on_message(f"{progress.name}: {progress.message}")

    def _on_message(self, text: str) -> None:
        self._message = text
        self._draw()

    def _draw(self) -> None:
        table = stage_table(self._status)
        table.caption = Text(self._message) if self._message else None
        self._live.update(table, refresh=True)


def stage_table(status: StagedFineTuneStatus) -> Table:
    """Return the stages of a run as a table."""
    title = f"{status.state} {status.progress}".strip()
    table = Table(title=title, caption_justify="left", title_justify="left")
    table.add_column("stage")
    table.add_column("state")
    for name in ("step", "loss", "validation", "KL to base", "tokens/s", "time", "peak memory"):
        table.add_column(name, justify="right")
    for stage in status.stages:
        style = _STATE_STYLES[stage.state]
        table.add_row(stage.name, Text(stage.state, style=style), *_stage_cells(stage))
    return table


def _stage_cells(stage: StageStatus) -> list[str]:
    measured = stage.measured
    left = "" if stage.eta_seconds is None else f"{format_duration(stage.eta_seconds)} left"
    return [
        f"{stage.step}/{stage.total_steps}",
        _number(stage.loss, 4),
        _number(stage.validation_loss, 4),
        _number(measured.kl_to_base if measured else None, 4),
        _number(stage.tokens_per_second, 0),
        format_duration(measured.seconds) if measured else left,
        format_bytes(measured.peak_memory_bytes) if measured else "",
    ]


def _describe_step(progress: Progress) -> str:
    return (
        f"step {progress.step}/{progress.total_steps} loss {_number(progress.loss, 4)} "
        f"{_number(progress.tokens_per_second, 0)} tokens/s "
        f"ETA {format_duration(progress.eta_seconds or 0)}"
    )


def _describe_meters(progress: Progress) -> str:
    meters = {"KL to base": progress.kl_to_base, "general loss": progress.general_loss}
    said = [f"{name} {value:.4f}" for name, value in meters.items() if value is not None]
    return f"step {progress.step} {' '.join(said)}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def format_bytes(number: int) -> str:
    """Return a size in GiB, or in MiB below one."""
    gib = number / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{number / 2**20:.0f} MiB"
