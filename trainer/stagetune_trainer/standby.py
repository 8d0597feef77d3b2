"""A process that stands by: started before its task is due, with its code imported, it waits.

It knows its stage file as far as that can be foreseen, all but the output of the stage that is
still being trained. The whole comes as a file, on one machine, or from the operator.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from stagetune_api.stage import StageConfig
from stagetune_trainer.progress_post import PostError, ProgressServer

logger = logging.getLogger(__name__)

_FILE_SECONDS, _SERVER_SECONDS = 0.05, 0.25
"""Between two looks."""
_PATIENCE_SECONDS = 3600.0
"""Nobody needs a process that has waited this long."""


class Stop(Protocol):
    """Whether somebody asked the process to leave."""

    @property
    def requested(self) -> bool:
        """True from the moment of the request."""


def await_stage_file(where: str, forecast: StageConfig, stop: Stop) -> StageConfig:
    """Return the stage file, once it is at `where`: a path, or an http:// or https:// address.

    Raises KeyboardInterrupt when asked to stop, TimeoutError after an hour, and ValueError where
    the file is not the one that was foreseen: what was imported and checked is not for it.
    """
    is_address = where.startswith(("http://", "https://"))
    look = _from_server(where) if is_address else _from_file(Path(where))
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (data := look()):
        if stop.requested:
            raise KeyboardInterrupt("asked to stop")
        if time.monotonic() > deadline:
            raise TimeoutError(f"no stage file came from {where}")
        time.sleep(_SERVER_SECONDS if is_address else _FILE_SECONDS)
    config = StageConfig.model_validate_json(data)
    if config.forecast() != forecast:
        raise ValueError("the stage file is not the one that this process was started for")
    return config


def _from_file(path: Path) -> Callable[[], bytes]:
    def look() -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return b""

    return look


def _from_server(url: str) -> Callable[[], bytes]:
    """Return how to ask the operator, with the token that progress is posted with."""
    known = ProgressServer.from_environment(os.environ) or ProgressServer(url=url)
    server = replace(known, url=url)
    said: set[str] = set()

    def look() -> bytes:
        try:
            return server.get()
        except PostError as error:
            # It may be starting anew; each kind of trouble is told once.
            if str(error) not in said:
                said.add(str(error))
                logger.warning("no stage file from %s yet: %s", url, error)
            return b""

    return look
