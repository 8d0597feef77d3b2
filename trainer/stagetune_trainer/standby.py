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

from stagetune_api.stage import StageConfig
from stagetune_trainer.progress_post import PostError, ProgressServer

logger = logging.getLogger(__name__)

_FILE_SECONDS, _SERVER_SECONDS, _TROUBLE_SECONDS = 0.05, 0.25, 2.0
"""Between two looks: at a file, at a server, and at one that did not answer as it should."""
_PATIENCE_SECONDS = 3600.0
"""Nobody needs a process that has waited this long."""


def await_stage_file(where: str, forecast: StageConfig) -> StageConfig:
    """Return the stage file, once it is at `where`: a path, or an http:// or https:// address.

    Raises KeyboardInterrupt after an hour, as if asked to stop, for nothing has begun and nothing
    has failed; and ValueError where the file is not the one that was foreseen: what was imported
    and checked is not for it.
    """
    is_address = where.startswith(("http://", "https://"))
    look = _from_server(where) if is_address else _from_file(Path(where))
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (data := look()):
        if time.monotonic() > deadline:
            logger.error("no stage file came from %s", where)
            raise KeyboardInterrupt
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
            time.sleep(_TROUBLE_SECONDS)
            return b""

    return look
