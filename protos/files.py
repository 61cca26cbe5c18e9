"""Files that appear whole or not at all, whatever dies when."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["mapped", "sync_folder", "write_synced", "write_whole"]

Bytes = bytes | memoryview


def write_whole(path: Path, parts: Iterable[Bytes]) -> None:
    """Replace a file at once: written aside, synced, renamed."""
    aside = path.with_name(f".{path.name}.new")
    write_synced(aside, parts)
    aside.replace(path)
    sync_folder(path.parent)


def write_synced(path: Path, parts: Iterable[Bytes]) -> None:
    """Write a file and wait until its bytes are on the disk."""
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened for syncing
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def mapped(path: Path) -> memoryview:
    """The bytes of a file: what is not read takes no memory. They live as long as arrays over them do."""
    if path.stat().st_size == 0:
        return memoryview(b"")
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
