"""The end of a trainer process: nothing that it said is lost, and its exit code arrives."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stagetune_api.names import TrainerExitCode
from stagetune_api.progress import Progress
from stagetune_api.report import StageReport
from stagetune_api.stage import StageConfig
from stagetune_trainer.run import run_task

MakeConfig = Callable[..., StageConfig]
HANGS_SECONDS = 120
"""A process that is still there after this will stay."""
LEAVE = """
import sys
from stagetune_trainer.__main__ import leave
{before}
leave(42)
"""


def leave(
    before: str, *, temporary: Path | None = None, **streams: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a process that leaves with 42, and return what is known of it."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    # Unbuffered, as in our image, there would be nothing left to write.
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    if temporary is not None:
        environment["TMPDIR"] = str(temporary)
    return subprocess.run(
        [sys.executable, "-c", LEAVE.format(before=before)],
        env=environment,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
        timeout=HANGS_SECONDS,
        **streams,
    )


def run_trainer(
    *arguments: str | Path, log: Path, environment: dict[str, str] | None = None
) -> tuple[int, list[str]]:
    """Run a trainer process with its log in a file; return its exit code and lines of output."""
    with log.open("w") as stderr:
        done = subprocess.run(
            [sys.executable, "-m", "stagetune_trainer", *map(str, arguments)],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            check=False,
            timeout=HANGS_SECONDS,
        )
    return done.returncode, done.stdout.splitlines()


def test_text_that_waits_to_be_written_arrives(tmp_path: Path) -> None:
    half = "x" * 5000
    before = f"print('{half}', end=''); print('{half}', end='', file=sys.stderr)"
    done = leave(before)
    assert (done.returncode, done.stdout, done.stderr) == (42, half, half)
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        assert leave(before, stdout=out, stderr=err).returncode == 42
    assert (tmp_path / "out").read_text() == (tmp_path / "err").read_text() == half


def test_what_is_to_be_done_at_the_end_is_done(tmp_path: Path) -> None:
    done = leave(
        "import logging, logging.handlers, tempfile\n"
        "folder = tempfile.TemporaryDirectory()\n"
        "log = logging.FileHandler(folder.name + '/../log')\n"
        "logging.root.addHandler(logging.handlers.MemoryHandler(1000, target=log))\n"
        "logging.warning('the last word')\n",
        temporary=tmp_path,
    )
    assert (done.returncode, done.stderr) == (42, "")
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert (tmp_path / "log").read_text() == "the last word\n"


def test_code_arrives_where_nobody_takes_the_output() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert leave("print('a line')", stdout=writer).returncode == 42
    finally:
        os.close(writer)
    with Path("/dev/full").open("w") as full:
        done = leave("print('a line'); print('another', file=sys.stderr)", stdout=full)
    assert (done.returncode, done.stderr) == (42, "another\n")


def test_thread_that_hangs_does_not_keep_the_process() -> None:
    before = "import threading; threading.Thread(target=threading.Event().wait).start()"
    assert leave(before).returncode == 42


def test_stage_file_that_cannot_be_read_is_told_in_full(tmp_path: Path) -> None:
    message, log = tmp_path / "termination-log", tmp_path / "log"
    missing = tmp_path / "nowhere.json"
    code, lines = run_trainer(missing, f"--termination-message={message}", log=log)
    assert (code, lines) == (TrainerExitCode.INTERNAL, [])
    report = StageReport.model_validate_json(message.read_bytes())
    assert report.failure is not None
    assert log.read_text().endswith(f"Failed: {report.failure.message}\n")


def test_finished_task_leaves_everything_behind_but_temporary_files(
    make_later_config: MakeConfig,
    make_stage: Callable[..., dict[str, Any]],
    never: Any,
    tmp_path: Path,
) -> None:
    stage = make_stage(0, 0, 1)
    trained, _ = run_task(make_later_config("Train", stage=stage), never)
    config = make_later_config("Export", chain=[trained], stages=[stage])
    (tmp_path / "stage.json").write_text(config.model_dump_json())
    (tmp_path / "tmp").mkdir()
    message, log = tmp_path / "termination-log", tmp_path / "log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code, lines = run_trainer(
        *(tmp_path / "stage.json", f"--termination-message={message}", f"--metrics-port={port}"),
        log=log,
        environment={"HOME": "/nonexistent", "TMPDIR": str(tmp_path / "tmp")},
    )
    assert code == TrainerExitCode.SUCCEEDED, log.read_text()
    # Nothing but progress: no library speaks in between.
    assert [Progress.model_validate_json(line).name for line in lines] == ["export"] * len(lines)
    assert len(lines) > 0
    report = tmp_path / "run" / "tasks" / "export" / "report.json"
    assert (
        message.read_text()
        == StageReport.model_validate_json(report.read_bytes()).termination_message()
    )
    assert list((tmp_path / "tmp").iterdir()) == []
