"""How a folder on the volume explains itself, and how it is checked before it is read.

A folder is an artifact when it holds a `manifest.json` that names every file with its size and
sha256. safetensors and Arrow have no checksums: a flipped bit or a zeroed page loads silently, so
this is the only guard. Writing and publishing are the trainer's business (`checkpoint`); reading
needs nothing but the standard library, so the runner can check too.
"""

import hashlib
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, StringConstraints, ValidationError

from stagetune_api import names
from stagetune_api.base import ApiModel
from stagetune_api.training_spec import LayerRange

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_READ_BYTES = 1 << 24
"""Large, for a thread that hashes has to wait for Python's lock after each piece."""


class ArtifactError(Exception):
    """An artifact is missing, damaged or not the one that was asked for; names the file."""

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        super().__init__(f"{path}: {what}")


class ArtifactKind(StrEnum):
    """What a folder holds."""

    BASE_MODEL = "BaseModel"
    DATASET = "Dataset"
    CHECKPOINT = "Checkpoint"
    STAGE_OUTPUT = "StageOutput"
    EXPORT = "Export"
    TEACHER = "Teacher"
    HIDDEN_STATES = "HiddenStates"


class ArtifactFile(ApiModel):
    """One file of an artifact."""

    path: Annotated[
        str, StringConstraints(min_length=1, max_length=512, pattern=r"^[^/.][^/]*(/[^/.][^/]*)*$")
    ]
    """path inside the folder, with forward slashes."""
    size: Annotated[int, Field(ge=0)]
    """size in bytes."""
    sha256: Sha256
    """sha256 of the content."""


class ArtifactContent(ApiModel):
    """What the artifact is: equal content has an equal digest, whoever wrote it and when."""

    kind: ArtifactKind
    """kind of the artifact."""
    name: Annotated[str, Field(max_length=256)] = ""
    """name of the stage, or of what was prepared."""
    base: Sha256 | None = None
    """base is the digest of the base model."""
    data: Sha256 | None = None
    """data is the digest of the tokenised rows that were trained on."""
    parent: Sha256 | None = None
    """parent is the digest of what this was made from: the previous stage's output or the base."""
    layers: LayerRange | None = None
    """layers that the stage opened."""
    step: Annotated[int, Field(ge=0)] | None = None
    """step of the optimizer at which it was taken."""
    settings: Sha256 | None = None
    """settings is the digest of all that decides the numbers: method, training, planned stage."""
    files: Annotated[list[ArtifactFile], Field(min_length=1, max_length=4096)]
    """files, sorted by path."""

    @property
    def digest(self) -> str:
        """The content's sha256 over its canonical JSON."""
        return digest_of_json(self.model_dump(mode="json", exclude_none=True))


class Provenance(ApiModel):
    """Who wrote an artifact; not part of its digest, so a repeated attempt gives the same one."""

    run_name: str
    """runName of the run."""
    attempt: int
    """attempt that published it, which is its fencing token."""
    created_at: str
    """createdAt, RFC 3339 in UTC."""
    versions: Annotated[dict[str, str], Field(max_length=32)] = Field(default_factory=dict)
    """versions of the libraries that wrote it."""


class ArtifactManifest(ApiModel):
    """The file `manifest.json` of an artifact."""

    content: ArtifactContent
    """content that the digest stands for."""
    digest: Sha256
    """digest of the content."""
    provenance: Provenance
    """provenance of the folder."""
    checksum: Sha256
    """checksum over all of the above, so that damage to this file shows too."""

    @classmethod
    def build(cls, content: ArtifactContent, provenance: Provenance) -> Self:
        """Return the manifest of `content` with its digests computed."""
        return cls(
            content=content,
            digest=content.digest,
            provenance=provenance,
            checksum=_checksum(content, content.digest, provenance),
        )


def digest_of_json(value: object) -> str:
    """Return the sha256 of `value` as JSON with sorted keys and no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """Return the sha256 of the file at `path`."""
    digest = hashlib.sha256()
    # No more than the file takes: most are small.
    buffer = memoryview(bytearray(min(_READ_BYTES, path.stat().st_size + 1)))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def read_manifest(directory: Path) -> ArtifactManifest:
    """Return the manifest in `directory`; raise ArtifactError where it is missing or damaged."""
    path = directory / names.MANIFEST_FILE
    try:
        manifest = ArtifactManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(path, "is missing") from None
    except OSError as error:
        raise ArtifactError(path, f"cannot be read: {error.strerror}") from error
    except ValidationError:
        raise ArtifactError(path, "is damaged: it does not parse as a manifest") from None
    if manifest.digest != manifest.content.digest or manifest.checksum != _checksum(
        manifest.content, manifest.digest, manifest.provenance
    ):
        raise ArtifactError(path, "is damaged: its checksum does not match")
    return manifest


def verify_artifact(
    directory: Path, *, digest: str | None = None, kind: ArtifactKind | None = None
) -> ArtifactManifest:
    """Check every byte of the artifact in `directory` and return its manifest.

    `digest` and `kind`, where given, are what the caller was told to expect. Raises ArtifactError
    that names the file: the manifest or a file missing, of another size or content, or a sound
    artifact that is not the expected one (two stages' folders swapped, say).
    """
    manifest = read_manifest(directory)
    if kind is not None and manifest.content.kind is not kind:
        raise ArtifactError(directory, f"holds a {manifest.content.kind}, not a {kind}")
    if digest is not None and manifest.digest != digest:
        raise ArtifactError(
            directory,
            f"is not the expected artifact: its digest is {manifest.digest[:12]} "
            f"({manifest.content.name or manifest.content.kind}), expected {digest[:12]}",
        )
    for file in manifest.content.files:
        _verify_file(directory / file.path, file)
    _refuse_strangers(directory, manifest)
    return manifest


def _refuse_strangers(directory: Path, manifest: ArtifactManifest) -> None:
    """Raise for a file that the manifest does not name: libraries load some by their mere name."""
    named = {names.MANIFEST_FILE, *(file.path for file in manifest.content.files)}
    for path in sorted(directory.rglob("*")):
        if not path.is_dir() and path.relative_to(directory).as_posix() not in named:
            raise ArtifactError(path, "is not named in the manifest of its folder; remove it")


def _verify_file(path: Path, file: ArtifactFile) -> None:
    try:
        size = path.stat().st_size
        if size != file.size:
            raise ArtifactError(path, f"has {size} bytes, its manifest says {file.size}")
        found = digest_of_file(path)
    except FileNotFoundError:
        raise ArtifactError(path, "is missing") from None
    except OSError as error:
        raise ArtifactError(path, f"cannot be read: {error.strerror}") from error
    if found != file.sha256:
        raise ArtifactError(
            path, f"is damaged: its sha256 is {found[:12]}, its manifest says {file.sha256[:12]}"
        )


def _checksum(content: ArtifactContent, digest: str, provenance: Provenance) -> str:
    return digest_of_json(
        {
            "content": content.model_dump(mode="json", exclude_none=True),
            "digest": digest,
            "provenance": provenance.model_dump(mode="json", exclude_none=True),
        }
    )
