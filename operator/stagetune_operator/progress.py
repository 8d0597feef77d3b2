"""What pods last said of their work, in the form of Kubeflow's trainer status.

The endpoint (`progress_server`) puts it in after it has checked who speaks; `reconcile` and
`metrics` read it. It is kept in memory alone: the history lies on the run's volume, and the status
has what counts. After a restart of the operator the pods post again within seconds.
"""

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from stagetune_operator.keys import RunKey

MAX_METRICS = 256
"""More than any trainer posts; what is over the known names is read past."""


@dataclass(frozen=True, kw_only=True)
class TaskProgress:
    """The last word of a task's pod. What it did not say is None."""

    pod_uid: str
    received: float
    """When it came, by this process's monotonic clock: no other clock can be compared with."""
    time: str
    """When it was so, by the pod's clock; empty if it did not say."""
    percentage: int | None = None
    eta_seconds: int | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    general_loss: float | None = None
    kl_to_base: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    checkpoint_step: int | None = None


class InvalidProgressError(ValueError):
    """The body is no trainer status; the text says why and repeats nothing of it."""


def _number_or_none(value: Any) -> float | None:
    """Return the number in a metric's value; NaN, infinities and words are no value."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


class _Status(BaseModel):
    """A part of Kubeflow's body. What others add to it is not ours to refuse."""

    model_config = ConfigDict(alias_generator=to_camel, extra="ignore", frozen=True)


class _Metric(_Status):
    name: Annotated[str, Field(max_length=256)]
    value: Annotated[float | None, BeforeValidator(_number_or_none)] = None


class _TrainerStatus(_Status):
    progress_percentage: Annotated[float | None, BeforeValidator(_number_or_none)] = None
    estimated_remaining_seconds: Annotated[float | None, BeforeValidator(_number_or_none)] = None
    metrics: Annotated[list[_Metric] | None, Field(max_length=MAX_METRICS)] = None
    last_updated_time: Annotated[str, Field(max_length=64)] | None = None


class _Body(_Status):
    trainer_status: _TrainerStatus


_REALS = {
    "loss": "loss",
    "validation_loss": "validation_loss",
    "eval_loss": "validation_loss",
    "general_loss": "general_loss",
    "kl_to_base": "kl_to_base",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "tokens_per_second": "tokens_per_second",
}
_COUNTS = {
    "step": "step",
    "current_step": "step",
    "total_steps": "total_steps",
    "tokens": "tokens",
    "num_input_tokens_seen": "tokens",
    "peak_memory_bytes": "peak_memory_bytes",
    "checkpoint_step": "checkpoint_step",
}
"""Names of metrics: our trainer's, and those by which the Hugging Face Trainer calls the same."""

_MAX_COUNT = 2**62
_MAX_SECONDS = 10 * 365 * 86400
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")


def parse_progress(body: bytes, *, pod_uid: str, received: float) -> TaskProgress:
    """Return the progress in a request's body; raises InvalidProgressError.

    Unknown metrics are left out, and so is a value that is no finite number: a loss of NaN is the
    trainer's to act on, and JSON could not even hold it.
    """
    try:
        status = _Body.model_validate_json(body).trainer_status
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidProgressError(f"{where or 'the body'}: {first['msg']}") from None
    values: dict[str, Any] = {}
    for metric in status.metrics or ():
        if metric.value is None:
            continue
        if metric.name in _REALS:
            values[_REALS[metric.name]] = metric.value
        elif metric.name in _COUNTS:
            values[_COUNTS[metric.name]] = _count(metric.value, _MAX_COUNT)
    said = status.last_updated_time or ""
    return TaskProgress(
        pod_uid=pod_uid,
        received=received,
        time=said if _TIME.fullmatch(said) else "",
        percentage=_count(status.progress_percentage, 100),
        eta_seconds=_count(status.estimated_remaining_seconds, _MAX_SECONDS),
        **values,
    )


def _count(value: float | None, most: int) -> int | None:
    return None if value is None else int(min(max(value, 0), most))


class ProgressStore:
    """The last progress of every task of every run."""

    def __init__(
        self,
        on_progress: Callable[[RunKey], None] = lambda key: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_progress(key)` is told of every post that was taken."""
        self._on_progress = on_progress
        self._clock = clock
        self._latest: dict[RunKey, dict[str, TaskProgress]] = {}

    def put(self, key: RunKey, task: str, pod_uid: str, body: bytes) -> None:
        """Take in a post of a pod that was checked; raises InvalidProgressError.

        A post need not repeat everything: what it leaves out stays as the same pod said it before.
        """
        new = parse_progress(body, pod_uid=pod_uid, received=self._clock())
        tasks = self._latest.setdefault(key, {})
        tasks[task] = _merged(tasks.get(task), new)
        self._on_progress(key)

    def latest(self, key: RunKey, task: str) -> TaskProgress | None:
        """Return the last progress of `task`, whichever pod it is from."""
        return self._latest.get(key, {}).get(task)

    def of(self, key: RunKey) -> Mapping[str, TaskProgress]:
        """Return the last progress of each task of a run, by the task's label."""
        return dict(self._latest.get(key, {}))

    def age(self, progress: TaskProgress) -> float:
        """Return how many seconds ago it was received."""
        return self._clock() - progress.received

    def forget(self, key: RunKey) -> None:
        """Drop everything of a run that is gone."""
        self._latest.pop(key, None)


def _merged(old: TaskProgress | None, new: TaskProgress) -> TaskProgress:
    if old is None or old.pod_uid != new.pod_uid:
        return new
    said = {name: value for name, value in vars(new).items() if value is not None}
    return TaskProgress(**{**vars(old), **said})
