"""The base model's bytes, checked while the task's code is imported.

Imports keep one processor and hardly the disk, hashing leaves Python's lock alone: a start takes as
long as the longer of the two. The bytes are in the page cache then, for the load that follows.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from stagetune_api.artifact import ArtifactKind, ArtifactManifest, verify_artifact
from stagetune_api.stage import StageConfig

_begun: dict[tuple[Path, str], Future[ArtifactManifest]] = {}


def begin_check(config: StageConfig) -> None:
    """Begin to check the base model that the task of `config` will load, if it has one."""
    if config.model_directory is None or config.model_digest is None:
        return
    directory, digest = Path(config.model_directory), config.model_digest
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="base-check")
    _begun[directory, digest] = pool.submit(_verify, directory, digest)
    pool.shutdown(wait=False)


def check_base(directory: Path, digest: str) -> None:
    """Check every byte of the base model, or wait for the check that was begun.

    One that was begun counts for one load. Raises ArtifactError where the folder is damaged or is
    not the model with `digest`.
    """
    begun = _begun.pop((directory, digest), None)
    if begun is None:
        _verify(directory, digest)
    else:
        begun.result()


def _verify(directory: Path, digest: str) -> ArtifactManifest:
    return verify_artifact(directory, digest=digest, kind=ArtifactKind.BASE_MODEL)
