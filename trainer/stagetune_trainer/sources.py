"""From a source URI of the manifest to files on this machine.

Comes first in prepare; `base_model` and `data.rows` read what it finds. Hub downloads (`hubs`) go
into a cache below the models directory: after a kill, files that were whole are not fetched again.
Only data formats are ever fetched: no pickled weights and no Python.
"""

from dataclasses import dataclass
from enum import Enum
from glob import escape
from pathlib import Path, PurePosixPath

from stagetune_api.problems import ProblemReason
from stagetune_trainer.claims import resolve_claim
from stagetune_trainer.errors import UserError
from stagetune_trainer.hubs import Repository, fetch_from_hugging_face, fetch_from_model_scope

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
    """hf://org/name[/path], ms://org/name[/path], pvc://claim/path, file://relative or
    file:///absolute."""
    path: str
    """Where the URI stands in the manifest, e.g. `spec.model.source`; for messages."""
    kind: SourceKind
    revision: str | None = None
    """Commit, tag or branch of a hub repository."""
    secret: str | None = None
    """Folder of the mounted Secret with the token for it, where there may be one."""

    def error(self, message: str, reason: ProblemReason = ProblemReason.NOT_FOUND) -> UserError:
        """Return the error that names this source, what is wrong, and the cure."""
        return UserError.at(self.path, f"{self.uri}: {message}", reason)


def resolve_source(
    source: Source,
    *,
    manifest_directory: Path,
    cache_directory: Path,
    claims_directory: Path | None = None,
) -> Path:
    """Return the local file or folder that `source` stands for, after fetching what is missing.

    Raises UserError with the manifest's path and the cure where there is nothing, where a hub does
    not answer, or where it wants a token. OSError comes through: a full disk is no user error.
    """
    scheme, _, rest = source.uri.partition("://")
    match scheme:
        case "file":
            return _resolve_file(source, rest, manifest_directory)
        case "pvc":
            return resolve_claim(source, rest, claims_directory)
        case "hf":
            repository = _parse_repository(source, rest)
            root = fetch_from_hugging_face(source, repository, cache_directory / "huggingface")
        case "ms":
            repository = _parse_repository(source, rest)
            root = fetch_from_model_scope(source, repository, cache_directory / "modelscope")
        case _:
            raise source.error(
                f"{scheme}:// sources are not supported; use hf://, ms://, pvc:// or file://",
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


def _parse_repository(source: Source, rest: str) -> Repository:
    parts = PurePosixPath(rest).parts
    if len(parts) < 2 or ".." in parts:
        raise source.error(
            "a hub source names an owner and a repository; write hf://org/name or "
            "hf://org/name/path",
            ProblemReason.INVALID,
        )
    inside = "/".join(parts[2:])
    allow, ignore = _patterns(source.kind, inside)
    kind = "model" if source.kind is SourceKind.MODEL else "dataset"
    name = "/".join(parts[:2])
    return Repository(name=name, kind=kind, inside=inside, allow=allow, ignore=ignore)


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
