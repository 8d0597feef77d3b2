"""References: what a model computed about the data, as artifacts that anybody may drop.

They are verified byte by byte before they are used and computed anew where they are not there, are
damaged, or were made from anything else: nothing is lost with them but time.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stagetune_api.artifact import (
    ArtifactContent,
    ArtifactError,
    ArtifactKind,
    digest_of_json,
    verify_artifact,
)
from stagetune_api.stage import StageConfig
from stagetune_api.training_spec import MethodType
from stagetune_trainer.checkpoint import Fence, provenance_of, publish_directory
from stagetune_trainer.metrics import ProgressLog
from stagetune_trainer.model import Numerics

_FORMAT = 1
"""Raised when a file of before would be read wrongly."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A reference by its name, and all that decides its numbers beside the base and the rows."""

    name: str
    kind: ArtifactKind
    settings: Mapping[str, object]


class ReferenceFolder:
    """A folder on the volume that holds references for one base model and one set of rows."""

    def __init__(
        self,
        directory: Path,
        config: StageConfig,
        numerics: Numerics,
        fence: Fence,
        log: ProgressLog,
    ) -> None:
        self._directory = directory
        self._config = config
        self._numerics = numerics
        self._fence = fence
        self._log = log

    def obtain(self, reference: Reference, write: Callable[[Path], None]) -> Path:
        """Return the sound artifact of `reference`; `write` fills a folder where it is not.

        Raises FencedError, OSError as the file system does, and what `write` raises.
        """
        directory = self._directory / reference.name
        problem = self._problem(directory, reference)
        if problem is None:
            return directory
        if not self._fence.writes:
            raise ArtifactError(directory, f"not sound where another process made it: {problem}")
        if directory.exists():
            self._log.message(f"computed anew: {directory}: {problem}")
            # What can be computed again is not worth the disk that a damaged copy takes.
            self._fence.check()
            shutil.rmtree(directory)
        self._log.message(f"computing {directory}")
        started = time.monotonic()
        publish_directory(
            directory,
            write,
            content=lambda files: ArtifactContent(
                kind=reference.kind,
                name=reference.name,
                base=self._config.model_digest,
                data=self._config.data_digest,
                settings=self._settings_digest(reference.settings),
                files=files,
            ),
            provenance=provenance_of(self._config.run_name, self._config.attempt),
            before_rename=self._fence.check,
        )
        self._log.message(f"{directory} is there, after {time.monotonic() - started:.1f} s")
        return directory

    def has(self, reference: Reference) -> bool:
        """Whether the artifact is there, sound and made from what `reference` says."""
        return self._problem(self._directory / reference.name, reference) is None

    def _problem(self, directory: Path, reference: Reference) -> str | None:
        """Return what keeps an artifact from being used; None where nothing does."""
        try:
            manifest = verify_artifact(directory, kind=reference.kind)
        except ArtifactError as error:
            return str(error)
        if manifest.content.settings != self._settings_digest(reference.settings):
            return "was made from something else"
        return None

    def _settings_digest(self, settings: Mapping[str, object]) -> str:
        """Return the digest of all that decides the numbers, but for rounding."""
        return digest_of_json(
            {
                "format": _FORMAT,
                "base": self._config.model_digest,
                "data": self._config.data_digest,
                "dtype": str(self._numerics.dtype),
                "quantised": self._config.method.type is MethodType.QLORA,
                **settings,
            }
        )
