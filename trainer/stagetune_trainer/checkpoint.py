"""Folders that appear whole or not at all: how artifacts are published, kept and pruned.

The order of a publish is fixed (docs/reliability.md): write to a hidden folder beside the final
place, fsync every file, write the manifest with all digests last, fsync the folder, ask whether
this attempt is still the newest, rename, fsync the parent. A reader therefore sees the old state or
the new one, whatever happens in between, and `stagetune_api.artifact` proves to it which.
"""

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from stagetune_api import names
from stagetune_api.artifact import (
    ArtifactContent,
    ArtifactError,
    ArtifactFile,
    ArtifactKind,
    ArtifactManifest,
    Provenance,
    digest_of_file,
    verify_artifact,
)
from stagetune_api.files import sync_directory, write_synced
from stagetune_trainer.errors import FencedError

KEPT_CHECKPOINTS = 2
"""Good checkpoints that are kept: the newest may turn out damaged, then the one before counts."""


def publish_directory(
    final: Path,
    write: Callable[[Path], None],
    *,
    content: Callable[[list[ArtifactFile]], ArtifactContent],
    provenance: Provenance,
    before_rename: Callable[[], None] = lambda: None,
) -> ArtifactManifest:
    """Make the folder `final` out of what `write` puts into an empty one, and return its manifest.

    `content` describes the artifact, given its files. `before_rename` may raise to forbid the
    publish. Where `final` already holds the same content nothing changes; where it holds anything
    else, that is moved aside, never deleted. Raises OSError as the file system does; `final` is
    then as it was.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = final.parent / f".{final.name}.{provenance.attempt}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        write(draft)
        manifest = ArtifactManifest.build(content(_sync_files(draft)), provenance)
        write_synced(draft / names.MANIFEST_FILE, manifest.model_dump_json(exclude_none=True))
        sync_directory(draft)
    except (Exception, KeyboardInterrupt):
        # A full disk above all must not stay full of what could not be finished.
        shutil.rmtree(draft, ignore_errors=True)
        raise
    if final.exists() and _holds(final, manifest.digest):
        shutil.rmtree(draft)
        return manifest
    _ask(before_rename, draft)
    if final.exists():
        quarantine(final)
    draft.rename(final)
    sync_directory(final.parent)
    return manifest


def _ask(before_rename: Callable[[], None], draft: Path) -> None:
    try:
        before_rename()
    except Exception:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def quarantine(directory: Path) -> Path:
    """Move `directory` aside to a hidden name that no reader opens, and return that name."""
    for number in range(1, 1000):
        aside = directory.parent / f".{directory.name}.bad-{number}"
        if not aside.exists():
            directory.rename(aside)
            return aside
    raise OSError(f"{directory} has been moved aside 999 times; remove some of its .bad- folders")


def remove_drafts(parent: Path, name: str = "") -> None:
    """Remove what killed attempts left half-written in `parent`; only of `name` where given."""
    for draft in parent.glob(f".{name}*.tmp"):
        shutil.rmtree(draft, ignore_errors=True) if draft.is_dir() else draft.unlink()


def provenance_of(run_name: str, attempt: int) -> Provenance:
    """Return who writes an artifact now, with the versions of what computes and stores it."""
    packages = ("stagetune", "torch", "transformers", "peft", "safetensors")
    return Provenance(
        run_name=run_name,
        attempt=attempt,
        created_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions={name: importlib.metadata.version(name) for name in packages},
    )


class Fence:
    """Lets only the newest attempt at a task publish.

    The Job API may start a program twice, and a pod that was thought lost may come back. Each
    attempt leaves a file named after its number; an attempt that sees a higher number is over.
    Files are only ever added, so no two attempts can race on one.
    """

    writes = True
    """Whether its holder is the process that writes to the volume."""

    def __init__(self, directory: Path, attempt: int = 0) -> None:
        """Claim `attempt` in `directory`, or at 0 the next number that is free.

        Raises FencedError where a number that was given is taken, or a newer one is.
        """
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.attempt = self._claim_next() if attempt == 0 else self._claim(attempt)
        sync_directory(directory)

    def check(self) -> None:
        """Raise FencedError if a newer attempt has started."""
        self._refuse_if_older(self.attempt)

    def _claim(self, attempt: int) -> int:
        self._refuse_if_older(attempt)
        if not self._take(attempt):
            raise FencedError(f"attempt {attempt} has been started already")
        return attempt

    def _claim_next(self) -> int:
        while True:
            # Whoever takes a number first has it; the loser sees it and asks for the one after.
            attempt = names.newest_attempt(self._directory) + 1
            if self._take(attempt):
                return attempt

    def _take(self, attempt: int) -> bool:
        try:
            (self._directory / f"{attempt:06d}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _refuse_if_older(self, attempt: int) -> None:
        newest = names.newest_attempt(self._directory)
        if newest > attempt:
            raise FencedError(
                f"attempt {newest} has started, so attempt {attempt} may not publish any more"
            )


class ReadersFence(Fence):
    """That of a stage's other processes: they read what the first one writes."""

    writes = False

    def __init__(self) -> None:
        """Claim nothing."""
        self.attempt = 0

    def check(self) -> None:
        """Raise FencedError: nothing is published here."""
        raise FencedError("only the first process of a stage writes to the volume")


def newest_good_checkpoint(
    checkpoints: Path, *, settings: str, on_bad: Callable[[ArtifactError], None]
) -> tuple[Path, ArtifactManifest] | None:
    """Return the newest checkpoint in `checkpoints` that is sound and made with `settings`.

    Damaged ones, and those of another stage or other settings, are moved aside after `on_bad` was
    told; optimizer state of another stage can load without an error and would be wrong.
    """
    for directory in _newest_first(checkpoints):
        try:
            manifest = verify_artifact(directory, kind=ArtifactKind.CHECKPOINT)
            if manifest.content.settings != settings:
                raise ArtifactError(
                    directory, "belongs to another stage or was made with other settings"
                )
        except ArtifactError as error:
            on_bad(error)
            quarantine(directory)
        else:
            return directory, manifest
    return None


def prune_checkpoints(checkpoints: Path, *, keep: int = KEPT_CHECKPOINTS) -> None:
    """Remove all but the `keep` newest checkpoints."""
    for directory in _newest_first(checkpoints)[keep:]:
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        doomed = directory.parent / f".{directory.name}.old.tmp"
        directory.rename(doomed)
        shutil.rmtree(doomed)


def _newest_first(checkpoints: Path) -> list[Path]:
    """Return the checkpoints by their step: as text, a millionth step would come first."""
    found = checkpoints.glob("step-*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _holds(directory: Path, digest: str) -> bool:
    try:
        verify_artifact(directory, digest=digest)
    except ArtifactError:
        return False
    return True


def _sync_files(directory: Path) -> list[ArtifactFile]:
    """Flush every file and folder below `directory` to the disk and return the files, by path."""
    files = []
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            sync_directory(path)
            continue
        _sync_file(path)
        files.append(
            ArtifactFile(
                path=path.relative_to(directory).as_posix(),
                size=path.stat().st_size,
                sha256=digest_of_file(path),
            )
        )
    return files


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
