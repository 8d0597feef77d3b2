"""What an API call can end with, in the operator's words: who catches one knows what to do next.

`cluster` turns HTTP statuses into these by `error_of` alone; nobody else looks at a status.
"""

from collections.abc import Mapping
from typing import Any


class ClusterError(Exception):
    """A call to the API server did not do what it was for."""


class AlreadyExistsError(ClusterError):
    """There is an object of this name: success if it turns out to be the caller's own."""


class ConflictError(ClusterError):
    """The object changed after what was decided on was read: read again and decide again."""


class GoneError(ClusterError):
    """The object, or the namespace it would lie in, is not there."""


class DeniedError(ClusterError):
    """The server will not have it: quota, admission, Pod Security, access rights, a bad value.

    Only a person can change that, so it belongs into the run's status; the text is the server's.
    """


class UnavailableError(ClusterError):
    """The server did not answer, or not now. A write may have been done nevertheless."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        """`retry_after` is how many seconds the server asks to wait, where it does."""
        super().__init__(message)
        self.retry_after = retry_after


def error_of(
    what: str, status: int, answer: Mapping[str, Any], retry_after: str | None
) -> ClusterError:
    """Return what an answer that is no success means to the operator.

    `answer` is the server's Status object, or empty; `retry_after` its header.
    """
    message = str(answer.get("message") or f"{what}: HTTP {status}")
    if status in (400, 403, 405, 413, 415, 422):
        return DeniedError(message)
    if status == 404:
        return GoneError(message)
    if status == 409:
        is_name = answer.get("reason") == "AlreadyExists"
        return AlreadyExistsError(message) if is_name else ConflictError(message)
    # 401 is a token between two rotations, 410 a list that took too long; the rest says so itself.
    seconds = float(retry_after) if retry_after and retry_after.isdecimal() else None
    return UnavailableError(message, seconds)
