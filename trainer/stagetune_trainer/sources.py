"""From a source URI of the manifest to files on this machine.

Comes first in prepare; `base_model` and `data.rows` read what it finds. Hub downloads go into a
cache below the models directory: after a kill, files that were whole are not fetched again. Only
data formats are ever fetched: no pickled weights and no Python.
"""

import os
from dataclasses import dataclass
from enum import Enum
from glob import escape
from pathlib import Path, PurePosixPath
from typing import NoReturn

from stagetune_api.problems import ProblemReason
from stagetune_trainer.errors import UserError

MODEL_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
ROW_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
TEXT_SUFFIXES = (".jsonl", ".txt", ".md")
GGUF_SUFFIX = ".gguf"


class SourceKind(Enum):
    """What a source holds, which decides the files that are fetched."""

    MODEL = "model"
    ROWS = "rows"
    TEXT = "text"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source as the manifest gives it."""

    uri: str
    """hf://org/name[/path], ms://org/name[/path], file://relative or file:///absolute."""
    path: str
    """Where the URI stands in the manifest, e.g. `spec.model.source`; for messages."""
    kind: SourceKind
    revision: str | None = None
    """Commit, tag or branch of a hub repository."""

    def error(self, message: str, reason: ProblemReason = ProblemReason.NOT_FOUND) -> UserError:
        """Return the error that names this source, what is wrong, and the cure."""
        return UserError.at(self.path, f"{self.uri}: {message}", reason)


@dataclass(frozen=True, kw_only=True)
class _Repository:
    """A hub repository and the part of it that is wanted."""

    name: str
    inside: str
    """Path of a file or folder in the repository; empty for all of it."""
    allow: list[str]
    ignore: list[str]


def resolve_source(source: Source, *, manifest_directory: Path, cache_directory: Path) -> Path:
    """Return the local file or folder that `source` stands for, after fetching what is missing.

    Raises UserError with the manifest's path and the cure where there is nothing, where a hub does
    not answer, or where it wants a token. OSError comes through: a full disk is no user error.
    """
    scheme, _, rest = source.uri.partition("://")
    match scheme:
        case "file":
            return _resolve_file(source, rest, manifest_directory)
        case "hf":
            repository = _parse_repository(source, rest)
            root = _fetch_from_hugging_face(source, repository, cache_directory / "huggingface")
        case "ms":
            repository = _parse_repository(source, rest)
            root = _fetch_from_model_scope(source, repository, cache_directory / "modelscope")
        case _:
            raise source.error(
                f"{scheme}:// sources are not supported; use hf://, ms:// or file://",
                ProblemReason.NOT_YET_SUPPORTED,
            )
    found = root / repository.inside
    if not found.exists() or (found.is_dir() and not any(found.iterdir())):
        raise source.error(
            f"the repository has no {repository.inside or 'files'} of the kinds that are fetched "
            f"({', '.join(repository.allow)}); check the path"
        )
    return found


def _resolve_file(source: Source, rest: str, manifest_directory: Path) -> Path:
    # Joining with an absolute path gives that path.
    path = manifest_directory / rest
    if not path.exists():
        raise source.error(
            f"there is no {path}; a path after file:// counts from the manifest's folder, one "
            "after file:/// from the root"
        )
    return path


def _parse_repository(source: Source, rest: str) -> _Repository:
    parts = PurePosixPath(rest).parts
    if len(parts) < 2 or ".." in parts:
        raise source.error(
            "a hub source names an owner and a repository; write hf://org/name or "
            "hf://org/name/path",
            ProblemReason.INVALID,
        )
    inside = "/".join(parts[2:])
    allow, ignore = _patterns(source.kind, inside)
    return _Repository(name="/".join(parts[:2]), inside=inside, allow=allow, ignore=ignore)


def _patterns(kind: SourceKind, inside: str) -> tuple[list[str], list[str]]:
    """Return the patterns of the files to fetch and of those to leave although they match."""
    suffixes = {
        SourceKind.MODEL: (GGUF_SUFFIX,),
        SourceKind.ROWS: ROW_SUFFIXES,
        SourceKind.TEXT: TEXT_SUFFIXES,
    }[kind]
    if PurePosixPath(inside).suffix in suffixes:
        return [escape(inside)], []
    folder = f"{escape(inside)}/" if inside else ""
    if kind is not SourceKind.MODEL:
        return [f"{folder}*{suffix}" for suffix in suffixes], []
    # Subfolders and `consolidated` files hold the same weights again, in formats of other programs.
    ignore = [f"{folder}*/*", f"{folder}consolidated*"]
    return [folder + pattern for pattern in MODEL_PATTERNS], ignore


def _fetch_from_hugging_face(source: Source, repository: _Repository, cache: Path) -> Path:
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        folder = snapshot_download(
            repository.name,
            repo_type="model" if source.kind is SourceKind.MODEL else "dataset",
            revision=source.revision,
            cache_dir=cache,
            # False: a token that somebody once stored on this machine is never sent.
            token=os.environ.get("HF_TOKEN") or False,
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


def _raise_for_hugging_face(source: Source, error: Exception) -> NoReturn:
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
            "the repository is gated; accept its terms on the hub and set HF_TOKEN to a token of "
            "that account"
        )
    elif isinstance(cause, RepositoryNotFoundError) or status in (401, 403):
        message = (
            "there is no such repository, or the token does not open it; check the name, and set "
            "HF_TOKEN if it is private"
        )
    elif isinstance(cause, OfflineModeIsEnabled):
        message = "is not in the cache and HF_HUB_OFFLINE is set; unset it, or use file://"
    else:
        message = (
            f"{constants.ENDPOINT} cannot be reached ({_first_line(cause)}); check the network, "
            "set HF_ENDPOINT to a mirror, or download it and use file://"
        )
    raise source.error(message) from error


def _fetch_from_model_scope(source: Source, repository: _Repository, cache: Path) -> Path:
    from modelscope_hub import HubApi, HubError

    # An empty token is an explicit one: none that was once stored on this machine is sent.
    hub = HubApi(token=os.environ.get("MODELSCOPE_API_TOKEN", ""))
    try:
        path: Path = hub.download_repo(
            repository.name,
            "model" if source.kind is SourceKind.MODEL else "dataset",
            revision=source.revision,
            cache_dir=cache,
            allow_patterns=repository.allow,
            ignore_patterns=repository.ignore,
        )
    except HubError as error:
        _raise_for_model_scope(source, error)
    return path


def _raise_for_model_scope(source: Source, error: Exception) -> NoReturn:
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
            "name, and set MODELSCOPE_API_TOKEN if it is private"
        )
    else:
        message = (
            f"ModelScope cannot be reached ({_first_line(cause)}); check the network, set "
            "MODELSCOPE_ENDPOINT, or download it and use file://"
        )
    raise source.error(message) from error


def _raise_for_revision(source: Source, error: Exception) -> NoReturn:
    path = source.path.removesuffix("source") + "revision"
    raise UserError.at(
        path,
        f"{source.uri} has no revision {source.revision!r}; give a commit, tag or branch of it",
        ProblemReason.NOT_FOUND,
    ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
