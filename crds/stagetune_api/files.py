"""Writing small files so that a reader sees the old one or the new one, and never a half."""

import os
from pathlib import Path


def write_file_atomically(path: Path, text: str) -> None:
    """Replace the file at `path` by one with `text`, and make sure that it is on the disk."""
    draft = path.parent / f".{path.name}.tmp"
    write_synced(draft, text)
    draft.replace(path)
    sync_directory(path.parent)


def write_synced(path: Path, text: str) -> None:
    """Write a file and flush it to the disk; its name may still be lost with a power cut."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
