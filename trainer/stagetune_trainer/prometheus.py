"""/metrics of a trainer process, for Prometheus: the same numbers as in its progress lines.

A gauge appears when its number is known and not before: 0 would be a loss, and a good one.
"""

import contextlib
import logging
import socket
import socketserver
import threading
from collections.abc import Mapping
from datetime import datetime
from http.server import ThreadingHTTPServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    MetricsHandler,
    disable_created_metrics,
)

from stagetune_api.progress import Progress, ProgressKind
from stagetune_api.report import StageReport
from stagetune_api.stage import StageConfig, Task
from stagetune_trainer.metrics import ProgressSink

logger = logging.getLogger(__name__)

_PREFIX = "stagetune_trainer"
_STEP_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAUGES = {
    "loss": "Loss of the last step, mean over its answer tokens, in nats.",
    "validation_loss": "Last validation loss, mean over answer tokens, in nats.",
    "general_loss": "Loss on text that is not trained on, mean over tokens, in nats.",
    "kl_to_base": "KL(base || model) on validation answers, mean over tokens, in nats.",
    "learning_rate": "Learning rate of the last step.",
    "grad_norm": "Norm of the last step's gradients before clipping.",
    "step": "Optimizer steps that are done.",
    "planned_steps": "Optimizer steps of the stage's plan.",
    "tokens_per_second": "Tokens of the last step by its seconds, padding left out.",
    "padding_fraction": "Part of the last step's positions that held padding and no token.",
    "peak_memory_bytes": "Most memory held so far: of the GPU, else of the process.",
    "checkpoint_step": "Step of the last checkpoint that was published.",
    "checkpoint_timestamp_seconds": "Unix time at which this process last published a checkpoint.",
}
_SLOW_CLIENT_SECONDS = 10


class _Handler(MetricsHandler):
    timeout = _SLOW_CLIENT_SECONDS


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # HTTPServer's asks the name service for this machine's name, which may take long to answer.
        socketserver.TCPServer.server_bind(self)

    def end(self) -> None:
        """Take no more connections, and wait until the thread in `serve_forever` has left it.

        It looks whether it should only twice a second; a socket that ends wakes it at once.
        """
        with contextlib.suppress(OSError):  # where the system knows no such end of a socket
            self.socket.shutdown(socket.SHUT_RDWR)
        self.shutdown()
        self.server_close()


class PrometheusMetrics(ProgressSink):
    """Keeps the metrics of one task and serves them."""

    def __init__(self, config: StageConfig, name: str, *, port: int, namespace: str = "") -> None:
        """Serve the metrics of the task `name` on `port`; one that is taken is only logged."""
        # Nobody asked for the times at which counters began.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # its author left it untyped
        labels = {"run": config.run_name, "stage": name}
        if namespace:
            labels = {"namespace": namespace, **labels}
        self._registry = CollectorRegistry()
        self._labels = labels
        self._gauges = {
            key: Gauge(f"{_PREFIX}_{key}", text, labels, registry=self._registry)
            for key, text in _GAUGES.items()
        }
        self._term_losses = Gauge(
            f"{_PREFIX}_term_loss",
            "Terms of the last step's loss before their weights, where protection adds some.",
            [*labels, "term"],
            registry=self._registry,
        )
        self._tokens = Counter(
            f"{_PREFIX}_tokens",
            "Tokens that this process has trained on, padding left out.",
            labels,
            registry=self._registry,
        )
        self._step_seconds = Histogram(
            f"{_PREFIX}_step_seconds",
            "Seconds of an optimizer step.",
            labels,
            registry=self._registry,
            buckets=_STEP_BUCKETS,
        )
        self._tokens_before = 0
        self._tell_task(config, labels)
        self._server = self._serve(port)

    def write(self, progress: Progress) -> None:
        """Take over the numbers of a line."""
        for key in _GAUGES:
            self._set(key, getattr(progress, key, None))
        for term, loss in (progress.losses or {}).items():
            self._term_losses.labels(**self._labels, term=term).set(loss)
        if progress.kind is ProgressKind.STEP:
            self._tokens.labels(**self._labels).inc((progress.tokens or 0) - self._tokens_before)
            if progress.step_seconds is not None:
                self._step_seconds.labels(**self._labels).observe(progress.step_seconds)
        if progress.checkpoint is not None:
            self._set("checkpoint_step", progress.checkpoint.step)
        if progress.kind is ProgressKind.CHECKPOINT:
            time = datetime.fromisoformat(progress.time).timestamp()
            self._set("checkpoint_timestamp_seconds", time)
        if progress.tokens is not None:
            # A resumed stage begins with those of earlier attempts.
            self._tokens_before = progress.tokens

    def close(self, report: StageReport) -> None:
        """End the server."""
        if self._server is not None:
            self._server.end()

    def _set(self, key: str, value: float | None) -> None:
        if value is not None:
            self._gauges[key].labels(**self._labels).set(value)

    def _tell_task(self, config: StageConfig, labels: Mapping[str, str]) -> None:
        stage = config.stage if config.task is Task.TRAIN else None
        values = {
            **labels,
            "task": config.task.value,
            "method": config.method.type.value,
            "layers": f"{stage.layers.first}-{stage.layers.last}" if stage else "",
            "attempt": str(config.attempt),
        }
        Gauge(
            f"{_PREFIX}_task_info", "What this process works on.", values, registry=self._registry
        ).labels(**values).set(1)
        if stage is not None:
            self._set("planned_steps", stage.steps)

    def _serve(self, port: int) -> _Server | None:
        try:
            server = _Server(("0.0.0.0", port), _Handler.factory(self._registry))
        except OSError as error:
            logger.warning("no metrics are served: port %d: %s", port, error.strerror)
            return None
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
        return server
