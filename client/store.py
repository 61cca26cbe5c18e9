"""What a client keeps on disk: answers until they have a receipt, content it fetched, its own state in each run.

::

    STATE/clients/<name>/cache/<sha256>     assignments and models, by content
    STATE/clients/<name>/outbox/<nonce>.*   the answer in hand: header and payload
    STATE/clients/<name>/runs/<run>/00012   the state that came with the update of round 12

A client's state is kept with the round of its update. Which one is true the server says with each task: the last that
was *counted*. So an update that came too late, or was lost on its way, moves nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import IO
from urllib.parse import quote

from shoal.protos.errors import ConnectionRefused, DataError
from shoal.protos.files import locked, write_whole

__all__ = ["Outbox", "Store", "keep_state", "kept_state"]

LONGEST = 200  # characters of a folder's name: file systems take 255
RUNS = 3  # whose states are kept; older ones go
OLDER = 2  # states of a run before the true one that are kept: a server may go back a checkpoint


class Store:
    """The folder of one client."""

    def __init__(self, root: Path, client: str) -> None:
        self.client, self.path = client, root / "clients" / _folder_name(client)
        self.cache, self.outbox = self.path / "cache", Outbox(self.path / "outbox")
        self._lock: IO[str] | None = None

    def claim(self) -> None:
        """Become the only process with this client's name and folder; ConnectionRefused if another one is."""
        try:
            for folder in (self.cache, self.outbox.path):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.path / ".lock")
        except OSError as error:
            raise ConnectionRefused(f"{str(self.path)!r} cannot be written ({error.strerror}); set --state") from error
        if self._lock is None:
            raise ConnectionRefused(
                f"another process is client {self.client!r} with the state in {self.path}; stop it, or give this one "
                f"another name with --id"
            )

    def run(self, run: str) -> Path:
        """The folder of the client's states in a run; those of all but the newest runs are dropped."""
        runs, mine = self.path / "runs", self.path / "runs" / quote(run, safe="")
        mine.mkdir(parents=True, exist_ok=True)
        mine.touch()
        others = [path for path in runs.iterdir() if path != mine]
        for old in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[RUNS - 1 :]:
            shutil.rmtree(old, ignore_errors=True)
        return mine

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()


class Outbox:
    """The answer to one task, whole on disk before a byte of it is sent."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def header(self, nonce: str) -> Path:
        return self.path / f"{nonce}.header"

    def payload(self, nonce: str) -> Path:
        return self.path / f"{nonce}.payload"

    def holds(self, nonce: str) -> bool:
        """Whether the answer is there: its header is written last."""
        return self.header(nonce).is_file()

    def put(self, nonce: str, header: bytes, payload: Iterable[memoryview]) -> None:
        write_whole(self.payload(nonce), payload)
        write_whole(self.header(nonce), [header])

    def keep_only(self, nonce: str) -> None:
        """Drop the answers to other tasks: a client has one at a time."""
        for path in self.path.iterdir():
            if path.name.lstrip(".").partition(".")[0] != nonce:
                path.unlink(missing_ok=True)


def _folder_name(client: str) -> str:
    """Any name as one that a folder may have: without slashes and dots (".." must stay a name), and not too long."""
    name = quote(client, safe="").replace(".", "%2E")
    return name if len(name) <= LONGEST else f"{name[:100]}-{sha256(client.encode()).hexdigest()}"


def keep_state(folder: Path, round: int, data: bytes) -> None:
    """Keep the state that goes with the update of ``round``, behind its SHA-256."""
    write_whole(folder / f"{round:05d}", [sha256(data).digest(), data])


def kept_state(folder: Path, counted: int, older: int = OLDER) -> bytes | None:
    """The state of the update that was last counted, None if there is none; what can no longer become true goes.

    It is asked for when a task begins: what is newer than the last counted state then was never counted. DataError if
    it is damaged: a flipped bit must not train along.
    """
    states = sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    before = [path for path in states if int(path.name) < counted]
    for old in [*before[:-older], *(path for path in states if int(path.name) > counted)]:
        old.unlink(missing_ok=True)
    path = folder / f"{counted:05d}"
    if not counted or not path.is_file():
        return None
    kept = path.read_bytes()
    digest, data = kept[:32], kept[32:]
    if sha256(data).digest() != digest:
        raise DataError(f"{str(path)!r} is damaged: restore it, or start this client under another name")
    return data
