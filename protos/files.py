"""Files that appear whole or not at all, whatever dies when."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not a POSIX system: nobody keeps a second process away
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked", "mapped", "sync_file", "sync_folder", "write_synced", "write_whole"]

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


def sync_file(path: Path) -> None:
    """Wait until the bytes of a file are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened for syncing
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def locked(path: Path) -> IO[str] | None:
    """The file, open and locked until it is closed or the process ends, however it ends; None if another has it."""
    file = path.open("w")
    if fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def mapped(path: Path) -> memoryview:
    """The bytes of a file: what is not read takes no memory. They live as long as arrays over them do."""
    if path.stat().st_size == 0:
        return memoryview(b"")
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
