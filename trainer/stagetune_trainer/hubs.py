"""Downloads from the Hugging Face hub and ModelScope, and what their errors mean to a user."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from stagetune_api import names
from stagetune_api.problems import ProblemReason
from stagetune_trainer.errors import UserError
from stagetune_trainer.hub_tokens import (
    HUGGING_FACE_VARIABLE,
    MODEL_SCOPE_VARIABLE,
    NoTokenError,
    read_token,
    redacted,
)

if TYPE_CHECKING:
    from stagetune_trainer.sources import Source


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A hub repository and the part of it that is wanted."""

    name: str
    kind: str
    """`model` or `dataset`, as both hubs call them."""
    inside: str
    """Path of a file or folder in the repository; empty for all of it."""
    allow: list[str]
    ignore: list[str]


def fetch_from_hugging_face(source: "Source", repository: Repository, cache: Path) -> Path:
    """Return the folder in `cache` with what `repository` names, after fetching what is missing."""
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        folder = snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=source.revision,
            cache_dir=cache,
            # False: a token that somebody once stored on this machine is never sent.
            token=_token(source, HUGGING_FACE_VARIABLE) or False,
            allow_patterns=repository.allow,
            ignore_patterns=repository.ignore,
        )
    except HFValidationError as error:
        raise source.error(
            f"is not the name of a repository ({error})", ProblemReason.INVALID
        ) from None
    except (HTTPError, EntryNotFoundError) as error:
        _raise_for_hugging_face(source, error)
    return Path(folder)


def _raise_for_hugging_face(source: "Source", error: Exception) -> NoReturn:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Where nothing is cached, the client wraps what went wrong.
    wrapped = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    cause = wrapped or error
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if isinstance(cause, RevisionNotFoundError):
        _raise_for_revision(source, error)
    if isinstance(cause, GatedRepoError):
        message = (
            "the repository is gated; accept its terms on the hub and set "
            f"{_token_place(source, HUGGING_FACE_VARIABLE)} to a token of that account"
        )
    elif isinstance(cause, RepositoryNotFoundError) or status in (401, 403):
        message = (
            "there is no such repository, or the token does not open it; check the name, and set "
            f"{_token_place(source, HUGGING_FACE_VARIABLE)} if it is private"
        )
    elif isinstance(cause, OfflineModeIsEnabled):
        message = "is not in the cache and HF_HUB_OFFLINE is set; unset it, or use file://"
    else:
        message = (
            f"{constants.ENDPOINT} cannot be reached ({_first_line(cause)}); check the network, "
            "set HF_ENDPOINT to a mirror, or download it and use file://"
        )
    raise source.error(message) from error


def fetch_from_model_scope(source: "Source", repository: Repository, cache: Path) -> Path:
    """Return the folder in `cache` with what `repository` names, after fetching what is missing."""
    from modelscope_hub import HubApi, HubError

    # An empty token is an explicit one: none that was once stored on this machine is sent.
    hub = HubApi(token=_token(source, MODEL_SCOPE_VARIABLE) or "")
    try:
        path: Path = hub.download_repo(
            repository.name,
            repository.kind,
            revision=source.revision,
            cache_dir=cache,
            allow_patterns=repository.allow,
            ignore_patterns=repository.ignore,
        )
    except HubError as error:
        _raise_for_model_scope(source, error)
    return path


def _raise_for_model_scope(source: "Source", error: Exception) -> NoReturn:
    from modelscope_hub import (
        AuthenticationError,
        FileDownloadError,
        NotExistError,
        PermissionDeniedError,
    )

    cause: BaseException = error
    if isinstance(error, FileDownloadError) and error.failed_files:
        cause = next(iter(error.failed_files.values()))
        if isinstance(cause, OSError) and cause.errno is not None:
            # The disk, and not the hub, ended the download.
            raise cause
    if isinstance(cause, (NotExistError, AuthenticationError, PermissionDeniedError)):
        at_revision = f" with the revision {source.revision!r}" if source.revision else ""
        message = (
            f"there is no such repository{at_revision}, or the token does not open it; check the "
            f"name, and set {_token_place(source, MODEL_SCOPE_VARIABLE)} if it is private"
        )
    else:
        message = (
            f"ModelScope cannot be reached ({_first_line(cause)}); check the network, set "
            "MODELSCOPE_ENDPOINT, or download it and use file://"
        )
    raise source.error(message) from error


def _raise_for_revision(source: "Source", error: Exception) -> NoReturn:
    path = source.path.removesuffix("source") + "revision"
    raise UserError.at(
        path,
        f"{source.uri} has no revision {source.revision!r}; give a commit, tag or branch of it",
        ProblemReason.NOT_FOUND,
    ) from error


def _token(source: "Source", variable: str) -> str | None:
    """Return the token for `source`, if there is one."""
    try:
        return read_token(source.secret, variable)
    except NoTokenError as error:
        raise source.error(f"{error}; put the token alone there", ProblemReason.INVALID) from None


def _token_place(source: "Source", variable: str) -> str:
    """Return where the token for `source` is to be put, as people call it."""
    if source.secret is not None and names.SECRETS_DIRECTORY_VARIABLE in os.environ:
        return f"spec.{source.secret}.secretName"
    return variable


def _first_line(error: BaseException) -> str:
    # Servers may repeat in an answer what they were sent.
    text = redacted(str(error)).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
