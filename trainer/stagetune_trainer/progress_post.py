"""Progress posts: where a stage stands, told to the operator by HTTP while it works.

The body and the environment variables are those of Kubeflow Trainer (KEP-2779), so the same
endpoint understands any Hugging Face Trainer. A thread of its own posts, at most every few seconds
and once more at the end; that nobody answers never reaches the training.
"""

import http.client
import json
import logging
import math
import re
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stagetune_api import names
from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.report import FailureClass, Outcome, StageReport
from stagetune_api.stage import StageConfig
from stagetune_trainer.metrics import ProgressSink, rfc3339

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 3.0
"""Of one post, for each answer of the network that it waits for."""
_FLUSH_SECONDS = 5.0
"""The end of a task waits no longer than this for its last post."""
_TOKEN = re.compile(r"[!-~]+")
"""What may stand in an HTTP header, and stands in every bearer token."""
_METRICS = (
    "step",
    "total_steps",
    "loss",
    "validation_loss",
    "general_loss",
    "kl_to_base",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "peak_memory_bytes",
)


class PostError(Exception):
    """A post was not possible; the text holds no token."""


@dataclass(frozen=True, kw_only=True)
class ProgressServer:
    """Whom progress is posted to, and with what."""

    url: str
    """http:// or https:// address."""
    token_file: Path | None = None
    """File with the bearer token, read anew for each post: projected tokens are exchanged."""
    ca_file: Path | None = None
    """File with the certificates that the server's is checked by; else those of the system."""
    timeout_seconds: float = _TIMEOUT_SECONDS

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "ProgressServer | None":
        """Return the server that the environment names; None where it names none."""
        url = environment.get(names.PROGRESS_URL_VARIABLE)
        if not url:
            return None
        token = environment.get(names.PROGRESS_TOKEN_VARIABLE)
        ca = environment.get(names.PROGRESS_CA_VARIABLE)
        return cls(
            url=url,
            token_file=Path(token) if token else None,
            ca_file=Path(ca) if ca and Path(ca).exists() else None,
        )

    def post(self, body: Mapping[str, Any]) -> None:
        """Post `body` as JSON; raises PostError where the server did not take it."""
        self._exchange("POST", json.dumps(body).encode())

    def get(self) -> bytes:
        """Return what the server has for this process, empty where it has nothing yet.

        Raises PostError.
        """
        return self._exchange("GET")

    def _exchange(self, method: str, body: bytes | None = None) -> bytes:
        """Send one request and return the body of the answer.

        No redirect is followed, and no proxy asked: the token is for this server alone.
        """
        headers = {"Content-Type": "application/json"}
        if self.token_file is not None:
            headers["Authorization"] = f"Bearer {self._token(self.token_file)}"
        try:
            connection, path = self._connection()
            try:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                status, answer = response.status, response.read()
            finally:
                connection.close()
        except OSError as error:
            raise PostError(error.strerror or type(error).__name__) from None
        # Their texts hold what the other side sent, or what was sent to it.
        except (http.client.HTTPException, ValueError) as error:
            raise PostError(type(error).__name__) from None
        if status >= 300:
            raise PostError(f"it answers with status {status}")
        return answer

    def _connection(self) -> tuple[http.client.HTTPConnection, str]:
        parts = urlsplit(self.url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        host, timeout = parts.hostname, self.timeout_seconds
        if parts.scheme == "http" and host:
            return http.client.HTTPConnection(host, parts.port, timeout=timeout), path
        if parts.scheme == "https" and host:
            context = ssl.create_default_context(cafile=self.ca_file)
            return (
                http.client.HTTPSConnection(host, parts.port, timeout=timeout, context=context),
                path,
            )
        raise PostError(f"{names.PROGRESS_URL_VARIABLE} is not an http:// or https:// address")

    def _token(self, path: Path) -> str:
        try:
            token = path.read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise PostError(f"{path} cannot be read ({type(error).__name__})") from None
        if not _TOKEN.fullmatch(token):
            raise PostError(f"{path} does not hold a token")
        return token


class ProgressPoster(ProgressSink):
    """Posts the newest state of a task from a thread of its own."""

    def __init__(
        self,
        config: StageConfig,
        server: ProgressServer,
        *,
        interval_seconds: float = names.PROGRESS_INTERVAL_SECONDS,
        flush_seconds: float = _FLUSH_SECONDS,
    ) -> None:
        """Begin to post; the first post goes out at once."""
        self._server = server
        self._interval_seconds = interval_seconds
        self._flush_seconds = flush_seconds
        self._status: dict[str, Any] = {"lastUpdatedTime": rfc3339(datetime.now(UTC))}
        self._metrics: dict[str, str] = {}
        if config.stage is not None:
            self._metrics["total_steps"] = str(config.stage.steps)
        self._changed = True
        self._closing = False
        self._condition = threading.Condition()
        self._failures: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="progress posts", daemon=True)
        self._thread.start()

    def write(self, progress: Progress) -> None:
        """Take over what a line says; it goes out with the next post."""
        with self._condition:
            self._metrics |= _metrics_of(progress)
            self._status |= _status_of(progress)
            self._changed = True
            self._condition.notify()

    def close(self, report: StageReport) -> None:
        """Send the last state, for a few seconds at most; a fenced attempt has nothing to say."""
        is_fenced = report.failure and report.failure.failure_class is FailureClass.FENCED
        with self._condition:
            if report.outcome is Outcome.SUCCEEDED:
                self._status |= {"progressPercentage": 100, "estimatedRemainingSeconds": 0}
            self._status["lastUpdatedTime"] = rfc3339(datetime.now(UTC))
            self._changed = not is_fenced
            self._closing = True
            self._condition.notify()
        self._thread.join(self._flush_seconds)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._changed or self._closing)
                if not self._changed:
                    return
                body, self._changed = self._body(), False
            self._post(body)
            with self._condition:
                self._condition.wait_for(lambda: self._closing, timeout=self._interval_seconds)

    def _body(self) -> dict[str, Any]:
        status = dict(self._status)
        if self._metrics:
            status["metrics"] = [
                {"name": name, "value": value} for name, value in self._metrics.items()
            ]
        return {"trainerStatus": status}

    def _post(self, body: Mapping[str, Any]) -> None:
        try:
            self._server.post(body)
        except PostError as error:
            # Each kind once: a server that is away for hours would fill the log.
            if str(error) not in self._failures:
                self._failures.add(str(error))
                logger.warning("progress is not posted to %s: %s", self._server.url, error)


def _metrics_of(progress: Progress) -> dict[str, str]:
    values = {name: getattr(progress, name) for name in _METRICS}
    if progress.checkpoint is not None:
        values["checkpoint_step"] = progress.checkpoint.step
    return {
        name: f"{value:.6g}" if isinstance(value, float) else str(value)
        for name, value in values.items()
        if value is not None
    }


def _status_of(progress: Progress) -> dict[str, Any]:
    status: dict[str, Any] = {"lastUpdatedTime": progress.time}
    if progress.step is not None and progress.total_steps:
        # The last percent is the output's verification and publish.
        status["progressPercentage"] = min(100 * progress.step // progress.total_steps, 99)
    if progress.kind is ProgressKind.STEP and progress.eta_seconds is not None:
        status["estimatedRemainingSeconds"] = math.ceil(progress.eta_seconds)
    return status
