"""A process that stands by: it waits for its stage file, takes no other, and leaves when asked."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stagetune_api import names
from stagetune_api.names import RunLayout, TrainerExitCode
from stagetune_api.report import Outcome, StageReport
from stagetune_api.stage import StageConfig
from stagetune_trainer.run import run_task
from stagetune_trainer.standby import await_stage_file
from stop_requests import NeverAsked

MakeConfig = Callable[..., StageConfig]
SECONDS = 120.0


@pytest.fixture
def second_stage(make_later_config: MakeConfig, make_stage: Callable[..., Any]) -> StageConfig:
    """The file of a second stage, whose first one is done."""
    first, code = run_task(make_later_config("Train", stage=make_stage(0, 0, 1)), NeverAsked())
    assert code is TrainerExitCode.SUCCEEDED
    return make_later_config("Train", chain=[first], stage=make_stage(1, 2, 3))


@contextmanager
def standing_by(
    forecast: StageConfig, folder: Path, where: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a process that stands by for `forecast`; it is gone at the end."""
    path = folder / names.STAGE_FORECAST_FILE
    path.write_text(forecast.model_dump_json(exclude_none=True))
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "stagetune_trainer", str(path), f"--await={where}"],
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def is_waiting(process: "subprocess.Popen[bytes]") -> bool:
    """Whether the process has done all that it can: it works no more."""

    def worked() -> int:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = worked()
    time.sleep(0.5)
    return before > 100 and worked() - before <= 5


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def layout_of(config: StageConfig) -> names.StageLayout:
    assert config.stage is not None
    return RunLayout(Path(config.run_directory)).stage(config.stage.directory)


def test_process_that_stands_by_trains_to_the_same_bits(
    second_stage: StageConfig, tmp_path: Path
) -> None:
    expected, _ = run_task(second_stage, NeverAsked())
    assert expected.output is not None
    layout = layout_of(second_stage)
    stage_file = tmp_path / "stage.json"
    with standing_by(second_stage.forecast(), tmp_path, str(stage_file)) as process:
        wait_until(lambda: is_waiting(process))
        assert names.newest_attempt(layout.fence) == 1
        given = time.time()
        # As everything that a process looks at is written: at once.
        (tmp_path / "new").write_text(second_stage.model_dump_json())
        (tmp_path / "new").rename(stage_file)
        assert process.wait(SECONDS) == TrainerExitCode.SUCCEEDED, (tmp_path / "log").read_text()
    report = StageReport.model_validate_json(layout.report.read_bytes())
    assert report.output is not None
    assert (report.attempt, report.output.digest) == (2, expected.output.digest)
    assert report.timings is not None
    assert report.timings.imports_seconds is not None
    # Time before the task was due is none of the task's.
    assert report.seconds < time.time() - given


def test_file_that_was_not_foreseen_is_refused(second_stage: StageConfig, tmp_path: Path) -> None:
    stage_file = tmp_path / "stage.json"
    other = second_stage.training.model_copy(update={"seed": 8})
    stage_file.write_text(second_stage.model_copy(update={"training": other}).model_dump_json())
    with pytest.raises(ValueError, match="not the one that this process was started for"):
        await_stage_file(str(stage_file), second_stage.forecast())
    stage_file.write_text(second_stage.model_dump_json())
    found = await_stage_file(str(stage_file), second_stage.forecast())
    assert found == second_stage


def test_process_that_is_asked_to_leave_has_touched_nothing(
    second_stage: StageConfig, tmp_path: Path
) -> None:
    layout = layout_of(second_stage)
    with standing_by(second_stage.forecast(), tmp_path, str(tmp_path / "stage.json")) as process:
        wait_until(lambda: is_waiting(process))
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == TrainerExitCode.INTERRUPTED
    assert not layout.root.exists()


def test_operator_is_asked_with_the_token_until_it_has_the_file(
    second_stage: StageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[tuple[int, bytes]] = [
        (503, b"{}"),
        (204, b""),
        (200, second_stage.model_dump_json(exclude_none=True).encode()),
    ]
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            status, body = answers[len(asked) - 1]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    token = tmp_path / "token"
    token.write_text("the-token")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        address = f"http://127.0.0.1:{server.server_port}/tasks/02-layers-2-3"
        monkeypatch.setenv(names.PROGRESS_URL_VARIABLE, f"{address}/progress")
        monkeypatch.setenv(names.PROGRESS_TOKEN_VARIABLE, str(token))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            found = await_stage_file(f"{address}/stage", second_stage.forecast())
        finally:
            server.shutdown()
            thread.join()
    assert found == second_stage
    assert asked == [("/tasks/02-layers-2-3/stage", "Bearer the-token")] * 3


def test_nobody_waits_for_ever(
    second_stage: StageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stagetune_trainer.standby._PATIENCE_SECONDS", 0.0)
    # As if asked to stop: nothing has begun, and nothing has failed.
    with pytest.raises(KeyboardInterrupt):
        await_stage_file(str(tmp_path / "stage.json"), second_stage.forecast())


def test_report_of_a_process_that_gives_up_names_its_task(
    second_stage: StageConfig, tmp_path: Path
) -> None:
    stage_file = tmp_path / "stage.json"
    document = json.loads(second_stage.model_dump_json())
    stage_file.write_text(json.dumps({**document, "runName": "another"}))
    with standing_by(second_stage.forecast(), tmp_path, str(stage_file)) as process:
        assert process.wait(SECONDS) == TrainerExitCode.INTERNAL
    assert "was started for" in (tmp_path / "log").read_text()
    assert Outcome.FAILED.value in (tmp_path / "log").read_text()
    assert not layout_of(second_stage).root.exists()
