"""What the operator is told through its environment, read once at the start.

Everything after this has a `Settings` and never looks at the environment.
"""

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from stagetune_api import names

PREFIX = "STAGETUNE_"

_FOREIGN = re.compile(r"(.*_)?(SERVICE_(HOST|PORT.*)|PORT(_[0-9]+_.*)?)|TEST_.*")
"""Variables with our prefix that others set: the kubelet, for every Service of the namespace whose
name begins with `stagetune`, and the tests. A setting must not look like one of these."""


class ImagePullPolicy(StrEnum):
    """When the kubelet fetches the trainer's image."""

    ALWAYS = "Always"
    IF_NOT_PRESENT = "IfNotPresent"
    NEVER = "Never"


class LogFormat(StrEnum):
    """How a line of the operator's log is written."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """The least important line that is written."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


class SettingsError(Exception):
    """The environment is wrong; the text names every variable that is."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def _split(value: Any) -> Any:
    """Split `a, b` at commas; an empty text is no element."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


DnsLabel = Annotated[str, Field(max_length=63, pattern=names.DNS_LABEL_PATTERN)]
ObjectName = Annotated[str, Field(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]


class Settings(BaseModel):
    """The operator's settings; a field is set by its name in capitals after `STAGETUNE_`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    trainer_image: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^\S+$")]
    """Image of the trainer's pods; by digest, all stages of a run are sure to be the same."""
    image_pull_policy: ImagePullPolicy = ImagePullPolicy.IF_NOT_PRESENT
    """When a node fetches that image."""
    image_pull_secrets: Annotated[tuple[ObjectName, ...], BeforeValidator(_split)] = ()
    """Names of pull secrets, which have to be in every namespace with runs."""
    trainer_service_account: ObjectName = "default"
    """Service account of the trainer's pods. It needs no rights."""
    trainer_user_id: Annotated[int, Field(ge=1, le=2**31 - 1)] = 65532
    """User and group that the trainer runs as and that own its files on the volume."""

    namespaces: Annotated[tuple[DnsLabel, ...], BeforeValidator(_split)] = ()
    """Namespaces whose runs are served; none named means all of them."""
    progress_url: Annotated[str, Field(max_length=1024, pattern=r"^(https?://[^\s?#]+)?$")] = ""
    """Where pods reach the progress endpoint; empty turns posting off."""
    workers: Annotated[int, Field(ge=1, le=64)] = 8
    """Runs that are reconciled side by side."""
    resync_seconds: Seconds = 60.0
    """How often every run is looked at although nothing was heard of it."""
    progress_status_seconds: Seconds = 30.0
    """How often progress alone may cause a write of a run's status."""
    retry_delay_seconds: Seconds = 10.0
    """How long after a failure a task is tried again."""
    image_patience_seconds: Seconds = 600.0
    """How long an image may fail to be pulled before the task has failed."""

    port_progress: Port = names.OPERATOR_PROGRESS_PORT
    """Port of the progress endpoint."""
    port_metrics: Port = names.OPERATOR_METRICS_PORT
    """Port of the operator's own metrics."""
    port_health: Port = names.OPERATOR_HEALTH_PORT
    """Port of the liveness and readiness probes."""
    log_format: LogFormat = LogFormat.TEXT
    """Format of the log."""
    log_level: LogLevel = LogLevel.INFO
    """Least important lines of the log."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Return the settings in `environment`; raises SettingsError with everything wrong there.

        A variable that is set to nothing counts as not set, as in a chart with empty values.
        """
        ours = {
            name.removeprefix(PREFIX): value.strip()
            for name, value in environment.items()
            if name.startswith(PREFIX) and value.strip()
        }
        given = {
            name.lower(): value for name, value in ours.items() if not _FOREIGN.fullmatch(name)
        }
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise SettingsError([_problem(entry) for entry in error.errors()]) from None


def _problem(entry: Any) -> str:
    field, *place = entry["loc"]
    variable = PREFIX + str(field).upper()
    if entry["type"] == "missing":
        return f"{variable} is required and not set"
    if entry["type"] == "extra_forbidden":
        return f"{variable} is not a setting of the operator"
    where = "".join(f", entry {index + 1}" for index in place if isinstance(index, int))
    return f"{variable}{where}: {entry['msg']}, not {entry['input']!r}"
