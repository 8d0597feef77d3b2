"""Files on a claim: from pvc://claim/path to a path that does not leave the claim.

Each claim is mounted by its name in one folder. Links on it were made by whoever wrote the data:
one that leads elsewhere would let a data set read the pod's own files.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from stagetune_api.problems import ProblemReason

if TYPE_CHECKING:
    from stagetune_trainer.sources import Source


def resolve_claim(source: "Source", rest: str, claims_directory: Path | None) -> Path:
    """Return the file or folder that `rest`, what stands after pvc://, names.

    Raises UserError where there is none, or where it or a link below it leaves the claim.
    """
    parts = PurePosixPath(rest).parts
    if not parts or rest.startswith(("/", ".")) or ".." in parts:
        raise source.error(
            "does not name a claim and a path on it; write pvc://claim/path, without '..'",
            ProblemReason.INVALID,
        )
    if claims_directory is None:
        raise source.error(
            "there are no claims here; use file://, hf:// or ms://", ProblemReason.CONFLICT
        )
    claim = claims_directory / parts[0]
    path = claim.joinpath(*parts[1:])
    try:
        _check(source, claim, path)
    except PermissionError as error:
        raise source.error(
            f"{error.filename} may not be read by user {os.getuid()}; let others read the files "
            f"of the claim (chmod -R a+rX), or give them to group {os.getgid()}",
            ProblemReason.INVALID,
        ) from None
    return path


def _check(source: "Source", claim: Path, path: Path) -> None:
    if not claim.is_dir():
        raise source.error(f"the claim {claim.name} is not mounted; check its name")
    _refuse_leaving(source, claim, path)
    if not path.exists():
        raise source.error(
            f"the claim {claim.name} has no {path.relative_to(claim)}; check the path, which "
            "counts from the claim's root, and that the files have been copied there"
        )
    for link in _links_below(path):
        _refuse_leaving(source, claim, link)
    with os.scandir(path) if path.is_dir() else path.open("rb"):
        pass


def _refuse_leaving(source: "Source", claim: Path, path: Path) -> None:
    # Not Path.resolve, which raises for links that lead in a circle.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(claim)):
        raise source.error(
            f"{path.relative_to(claim)} is a link that leaves the claim {claim.name}; put the "
            "file itself there, or a relative link to a file on the same claim",
            ProblemReason.INVALID,
        )


def _links_below(root: Path) -> Iterator[Path]:
    """Yield every symbolic link in the folder `root` and in the folders that such links lead to."""
    seen: set[Path] = set()
    folders = [root]
    while folders:
        folder = folders.pop()
        if not folder.is_dir() or folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        # What cannot be listed, such as lost+found, cannot be read later either.
        with contextlib.suppress(PermissionError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    yield Path(entry.path)
                if entry.is_symlink() or entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
