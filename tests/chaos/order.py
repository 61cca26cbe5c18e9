"""What reaches the disk when: every ``fsync``, with its path, and every commit of a database go into the trace.

SQLite syncs its own files, below Python; that it does, the test with ``strace`` shows.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["install"]

Note = Callable[[str, Mapping[str, Any]], None]


def install(note: Note) -> None:
    """From now on, in this process."""
    sync, connect = os.fsync, sqlite3.connect

    def noted_sync(file: Any) -> None:
        sync(file)
        handle = file if isinstance(file, int) else file.fileno()
        note("fsync", {"path": str(Path(f"/proc/self/fd/{handle}").readlink()), "thread": threading.get_ident()})

    class Noting(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
            found = super().execute(sql, *arguments)
            if sql == "COMMIT":
                note("commit", {"thread": threading.get_ident()})
            return found

    def noted_connect(*arguments: Any, **named: Any) -> sqlite3.Connection:
        return connect(*arguments, **named, factory=Noting)

    os.fsync = noted_sync  # type: ignore[assignment]
    sqlite3.connect = noted_connect  # type: ignore[assignment]
