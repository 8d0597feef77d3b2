"""Progress posts: Kubeflow's body over real HTTP, and nobody's business when it does not arrive."""

import json
import logging
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from stagetune_api import names
from stagetune_api.names import TrainerExitCode
from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.report import (
    CheckpointRef,
    Failure,
    FailureClass,
    Outcome,
    StageReport,
)
from stagetune_api.stage import StageConfig, Task
from stagetune_trainer.progress_post import PostError, ProgressPoster, ProgressServer
from stagetune_trainer.run import run_task

MakeConfig = Callable[..., StageConfig]
TOKEN = "a-bearer-token"


@dataclass
class Operator:
    """A server that keeps what was posted to it."""

    url: str = ""
    status: int = 200
    location: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)
    holds: threading.Event = field(default_factory=threading.Event)
    """No answer goes out before it is set."""

    def __post_init__(self) -> None:
        self.holds.set()

    def wait_for_posts(self, count: int) -> None:
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.bodies) >= count, timeout=20)

    def statuses(self) -> list[dict[str, Any]]:
        return [body["trainerStatus"] for body in self.bodies]


def _serve(operator: Operator, context: ssl.SSLContext | None = None) -> Iterator[Operator]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with operator.arrived:
                operator.bodies.append(json.loads(body))
                operator.tokens.append(self.headers.get("Authorization"))
                operator.times.append(time.monotonic())
                operator.arrived.notify_all()
            operator.holds.wait(20)
            self.send_response(operator.status)
            if operator.location:
                self.send_header("Location", operator.location)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        scheme = "https" if context else "http"
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        operator.url = f"{scheme}://localhost:{server.server_port}/tasks/prepare/progress?x=1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield operator
        operator.holds.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def operator() -> Iterator[Operator]:
    yield from _serve(Operator())


@pytest.fixture
def other_server() -> Iterator[Operator]:
    yield from _serve(Operator())


def report(
    outcome: Outcome = Outcome.SUCCEEDED, failure_class: FailureClass | None = None
) -> StageReport:
    failure = failure_class and Failure(failure_class=failure_class, exit_code=46, message="x")
    return StageReport(
        task=Task.PREPARE, name="prepare", attempt=1, outcome=outcome, failure=failure
    )


def line(kind: ProgressKind = ProgressKind.STEP, **values: Any) -> Progress:
    return Progress(
        kind=kind,
        task=Task.TRAIN,
        name="x",
        attempt=1,
        time="2026-07-01T12:00:00.000Z",
        **values,
    )


def metrics(status: dict[str, Any]) -> dict[str, str]:
    return {metric["name"]: metric["value"] for metric in status.get("metrics", [])}


def test_body_is_kubeflows(make_stage_config: MakeConfig, operator: Operator) -> None:
    poster = ProgressPoster(
        make_stage_config(), ProgressServer(url=operator.url), interval_seconds=0
    )
    operator.wait_for_posts(1)
    poster.write(
        line(
            step=3,
            total_steps=8,
            loss=1 / 3,
            learning_rate=1e-4,
            grad_norm=2.0,
            tokens=1234,
            tokens_per_second=99.5,
            eta_seconds=10.2,
            peak_memory_bytes=5_000_000_000,
        )
    )
    operator.wait_for_posts(2)
    checkpoint = CheckpointRef(path="x", digest="y", step=3)
    poster.write(line(ProgressKind.CHECKPOINT, step=3, checkpoint=checkpoint))
    operator.wait_for_posts(3)
    poster.close(report())
    first, step, saved, last = operator.statuses()
    assert list(first) == ["lastUpdatedTime"]
    datetime.fromisoformat(first["lastUpdatedTime"])
    assert step["progressPercentage"] == 37
    assert step["estimatedRemainingSeconds"] == 11
    assert step["lastUpdatedTime"] == "2026-07-01T12:00:00.000Z"
    assert metrics(step) == {
        "step": "3",
        "total_steps": "8",
        "loss": "0.333333",
        "learning_rate": "0.0001",
        "grad_norm": "2",
        "tokens": "1234",
        "tokens_per_second": "99.5",
        "peak_memory_bytes": "5000000000",
    }
    assert metrics(saved) == {**metrics(step), "checkpoint_step": "3"}
    assert (last["progressPercentage"], last["estimatedRemainingSeconds"]) == (100, 0)
    assert set(operator.tokens) == {None}


def test_whole_stage_is_posted_from_its_start_to_its_end(
    make_later_config: MakeConfig,
    make_stage: Callable[..., dict[str, Any]],
    never: Any,
    operator: Operator,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    config = make_later_config("Train", stage=make_stage(0, 0, 1))
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setenv(names.PROGRESS_URL_VARIABLE, operator.url)
    monkeypatch.setenv(names.PROGRESS_TOKEN_VARIABLE, str(tmp_path / "token"))
    monkeypatch.setenv(names.PROGRESS_CA_VARIABLE, str(tmp_path / "no-such-file"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert run_task(config, never)[1] is TrainerExitCode.SUCCEEDED
    first, last = operator.statuses()[0], operator.statuses()[-1]
    assert "progressPercentage" not in first
    assert metrics(first) == {"total_steps": "8"}
    assert last["progressPercentage"] == 100
    assert metrics(last)["step"] == "8"
    assert set(metrics(last)) >= {"loss", "validation_loss", "learning_rate", "grad_norm"}
    assert set(operator.tokens) == {f"Bearer {TOKEN}"}


def test_posts_keep_their_distance(make_stage_config: MakeConfig, operator: Operator) -> None:
    poster = ProgressPoster(
        make_stage_config(), ProgressServer(url=operator.url), interval_seconds=0.2
    )
    step = 0
    while len(operator.times) < 3:
        step += 1
        poster.write(line(step=step, total_steps=1_000_000_000))
    gaps = [after - before for before, after in pairwise(operator.times)]
    assert step > 100
    assert min(gaps) > 0.1
    poster.close(report())


def test_last_post_does_not_wait_its_turn(
    make_stage_config: MakeConfig, operator: Operator
) -> None:
    poster = ProgressPoster(
        make_stage_config(), ProgressServer(url=operator.url), interval_seconds=600
    )
    operator.wait_for_posts(1)
    poster.write(line(step=99, total_steps=100))
    poster.write(line(step=100, total_steps=100))
    poster.close(report(Outcome.INTERRUPTED))
    first, last = operator.statuses()
    assert metrics(first) == {}
    assert metrics(last)["step"] == "100"
    # Interrupted at the last step is not done.
    assert last["progressPercentage"] == 99


def test_rotated_token_counts_for_the_next_post(
    make_stage_config: MakeConfig, operator: Operator, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    server = ProgressServer(url=operator.url, token_file=token)
    poster = ProgressPoster(make_stage_config(), server, interval_seconds=0)
    operator.wait_for_posts(1)
    token.write_text("second")
    poster.close(report())
    assert operator.tokens == ["Bearer first", "Bearer second"]


def test_token_does_not_travel_with_a_redirect(
    make_stage_config: MakeConfig,
    operator: Operator,
    other_server: Operator,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    operator.status, operator.location = 307, other_server.url
    (tmp_path / "token").write_text(TOKEN)
    server = ProgressServer(url=operator.url, token_file=tmp_path / "token")
    ProgressPoster(make_stage_config(), server).close(report())
    assert len(operator.bodies) >= 1
    assert other_server.bodies == []
    assert [record.getMessage() for record in caplog.records] == [
        f"progress is not posted to {operator.url}: it answers with status 307"
    ]


@pytest.mark.parametrize(
    "content", [f"{TOKEN}\r\nHost: x", f"{TOKEN} {TOKEN}", "", "a-bearer-tökén"]
)
def test_what_is_no_token_is_neither_sent_nor_logged(
    content: str,
    make_stage_config: MakeConfig,
    operator: Operator,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "token").write_text(content)
    server = ProgressServer(url=operator.url, token_file=tmp_path / "token")
    poster = ProgressPoster(make_stage_config(), server, interval_seconds=0)
    poster.write(line(step=1, total_steps=2))
    poster.close(report())
    assert operator.bodies == []
    assert len(caplog.records) == 1
    assert str(tmp_path / "token") in caplog.text
    assert "a-bearer" not in caplog.text


def test_server_that_is_away_is_logged_once_and_costs_nothing(
    make_stage_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = ProgressServer(url="http://127.0.0.1:9/progress")
    poster = ProgressPoster(make_stage_config(), server, interval_seconds=0)
    for step in range(50):
        poster.write(line(step=step, total_steps=50))
    poster.close(report())
    assert [record.getMessage() for record in caplog.records] == [
        "progress is not posted to http://127.0.0.1:9/progress: Connection refused"
    ]


def test_server_that_does_not_answer_holds_the_end_up_for_a_bounded_time(
    make_stage_config: MakeConfig, operator: Operator
) -> None:
    operator.holds.clear()
    poster = ProgressPoster(
        make_stage_config(), ProgressServer(url=operator.url), flush_seconds=0.2
    )
    operator.wait_for_posts(1)
    began = time.monotonic()
    poster.close(report())
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "url", ["ftp://localhost/x", "localhost", "http://:80", "http://[", "http://localhost:x/"]
)
def test_address_that_is_none_is_logged(
    url: str, make_stage_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    ProgressPoster(make_stage_config(), ProgressServer(url=url)).close(report())
    # The poster of an earlier test may still find out that its server is gone.
    assert len([record for record in caplog.records if f"to {url}:" in record.getMessage()]) == 1


def test_fenced_attempt_does_not_post_over_the_newer_one(
    make_stage_config: MakeConfig, operator: Operator
) -> None:
    poster = ProgressPoster(make_stage_config(), ProgressServer(url=operator.url))
    operator.wait_for_posts(1)
    poster.write(line(step=1, total_steps=2))
    poster.close(report(Outcome.FAILED, FailureClass.FENCED))
    assert len(operator.bodies) == 1


def test_no_address_means_no_posts() -> None:
    assert ProgressServer.from_environment({}) is None
    assert ProgressServer.from_environment({names.PROGRESS_URL_VARIABLE: ""}) is None


def test_server_is_checked_by_the_given_certificate(tmp_path: Path) -> None:
    certificate, key = tmp_path / "ca.crt", tmp_path / "tls.key"
    try:
        command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
        options = ["-addext", "subjectAltName=DNS:localhost"]
        files = ["-keyout", str(key), "-out", str(certificate)]
        subprocess.run([*command.split(), *options, *files], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    serving = _serve(Operator(), context)
    operator = next(serving)
    environment = {names.PROGRESS_URL_VARIABLE: operator.url}
    stranger = ProgressServer.from_environment(environment)
    friend = ProgressServer.from_environment(
        {**environment, names.PROGRESS_CA_VARIABLE: str(certificate)}
    )
    assert stranger is not None
    assert friend is not None
    with pytest.raises(PostError):
        stranger.post({})
    friend.post({"trainerStatus": {}})
    assert operator.bodies == [{"trainerStatus": {}}]
    next(serving, None)
