"""Tokens of hubs: from files that a Secret is mounted as, or from the environment.

A token goes to its hub and nowhere else: `redacted` keeps it out of all that is written down.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from stagetune_api import names

HUGGING_FACE_VARIABLE = "HF_TOKEN"
MODEL_SCOPE_VARIABLE = "MODELSCOPE_API_TOKEN"
_FOLDERS = ("model", "dataset")
_TOKEN = re.compile(r"[!-~]+")
_REDACTED = "[token]"


class NoTokenError(Exception):
    """What should be a token is none; says where it came from, and not what it is."""


def read_token(folder: str | None, variable: str) -> str | None:
    """Return the token in the Secret that is mounted as `folder`, or else that in `variable`.

    None where there is neither. Raises NoTokenError for one that cannot stand in a request: a
    client's own message would quote it.
    """
    place, token = f"the token in {variable}", os.environ.get(variable, "").strip()
    path = _secret_file(folder) if folder is not None else None
    if path is not None and path.exists():
        place, token = "the token in the Secret", path.read_text(errors="replace").strip()
    if not token:
        return None
    if not _TOKEN.fullmatch(token):
        raise NoTokenError(f"{place} is no token: it holds spaces, line breaks or other characters")
    return token


def redacted(text: str) -> str:
    """Return `text` without any token that this process knows."""
    for token in _known_tokens():
        text = text.replace(token, _REDACTED)
    return text


def _known_tokens() -> Iterator[str]:
    for variable in (HUGGING_FACE_VARIABLE, MODEL_SCOPE_VARIABLE):
        yield from _worth_hiding(os.environ.get(variable, ""))
    for folder in _FOLDERS:
        path = _secret_file(folder)
        # What cannot be read was not read before either.
        with contextlib.suppress(OSError):
            yield from _worth_hiding(path.read_text(errors="replace") if path else "")


def _worth_hiding(text: str) -> Iterator[str]:
    """Yield the token in `text`; of a few characters it would be found in any word."""
    token = text.strip()
    if len(token) >= 8:
        yield token


def _secret_file(folder: str) -> Path | None:
    directory = os.environ.get(names.SECRETS_DIRECTORY_VARIABLE)
    return Path(directory) / folder / names.TOKEN_KEY if directory else None
