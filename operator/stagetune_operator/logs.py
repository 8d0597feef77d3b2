"""The operator's log on standard error: lines for people or for a collector."""

import json
import logging
import sys
from datetime import UTC, datetime

from aiohttp.http_exceptions import HttpProcessingError

from stagetune_operator.settings import LogFormat, Settings


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logs(settings: Settings) -> None:
    """Set up the log as the settings say."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format is LogFormat.JSON:
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s %(message)s"))
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    logging.getLogger("aiohttp.server").addFilter(_is_ours)
    # One line for each event of each object would drown the rest.
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a line is about our own doing, and not a request that is no HTTP.

    Such a line would repeat what was sent, and whoever sends can fill the log with them.
    """
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))
