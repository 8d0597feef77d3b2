"""Images that outlive the nodes they run on.

Unpacking a trainer's image takes a minute and 7 GB, so images are unpacked once, into a store in
the cache. A node's containerd gets hard links to all of the store: its own names for the same
files, which are only ever read, so that whatever becomes of the node is nothing to the store.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from local_cluster.binaries import cache_directory, hold_lock
from local_cluster.containerd import ROOT, Containerd, ContainerdTools, start_containerd
from local_cluster.programs import CONTAINERD
from local_cluster.record import Processes, end_recorded
from local_cluster.sandbox import start_sandbox

DIGESTS = "digests.json"
"""The record of the images in a folder: their names, and the digests they were added with."""
WriteArchive = Callable[[Path, list[str]], None]
"""Writes an image as an OCI archive to a path; may leave out the blobs of these digests."""


class ImageStore:
    """Images that are ready to run, in the cache."""

    def __init__(self, tools: ContainerdTools, tell: Callable[[str], None]) -> None:
        self._tools = tools
        self._tell = tell
        self.directory = cache_directory() / f"store-containerd-{CONTAINERD.version}"
        self._record = self.directory / DIGESTS

    def digests(self) -> dict[str, str]:
        """Return the images' names, and the digests that they were added with."""
        if not self._record.exists():
            return {}
        kept: dict[str, str] = json.loads(self._record.read_text())
        return kept

    def add(self, name: str, digest: str, write_archive: WriteArchive) -> bool:
        """Take in an image if it is not there already, and return whether it was not.

        `name` is containerd's: with its registry, `docker.io/` or `localhost/`, and its tag. Where
        the store has another image of this name, that one goes.
        """
        if self.digests().get(name) == digest:
            return False
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._lock():
            kept = self.digests()
            if kept.get(name) == digest:
                return False
            self._tell(f"unpacking {name} into {self.directory}; once for this state of it")
            # Until it is whole, nothing is said about the image.
            self._write({other: kept[other] for other in kept if other != name})
            with self._containerd() as containerd:
                containerd.load(name, write_archive)
                containerd.collect_garbage(name)
            self._write({**kept, name: digest})
        return True

    def link_into(self, directory: Path) -> None:
        """Give the containerd of a new cluster in `directory` all images, at once.

        The folder has to be on the cache's file system.
        """
        root, target = self.directory / ROOT, directory / ROOT
        if not root.exists():
            return
        target.parent.mkdir(parents=True)
        with self._lock():
            subprocess.run(["cp", "--archive", "--link", root, target], check=True)
            # What is changed in place must not be shared: containerd's and the snapshots' records.
            for database in root.rglob("*.db"):
                copy = target / database.relative_to(root)
                copy.unlink()
                shutil.copy2(database, copy)
            shutil.copy2(self._record, directory / DIGESTS)

    @contextmanager
    def _containerd(self) -> Iterator[Containerd]:
        """Run a containerd over the store."""
        end_recorded(self.directory)
        for name in ("run", "logs"):
            shutil.rmtree(self.directory / name, ignore_errors=True)
        (self.directory / "processes.json").unlink(missing_ok=True)
        processes = Processes(self.directory, ends_with_parent=True)
        try:
            sandbox = start_sandbox(processes, self._tools.pod)
            yield start_containerd(self._tools, processes, sandbox)
        finally:
            end_recorded(self.directory)

    def _lock(self) -> AbstractContextManager[int]:
        return hold_lock(self.directory / "lock", self._tell)

    def _write(self, digests: dict[str, str]) -> None:
        unfinished = self._record.with_suffix(".tmp")
        unfinished.write_text(json.dumps(digests, indent=2, sort_keys=True) + "\n")
        unfinished.replace(self._record)
