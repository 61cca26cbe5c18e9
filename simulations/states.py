"""What simulated clients keep between rounds: what was used last in memory, the rest on disk.

On disk there is one SQLite file with a row for each client and round that changed its state. Rows are added, never
overwritten: the checkpoint of round 20 sees each client's newest row up to round 20, whatever came later, and costs
what has changed since the one before. Rows that no checkpoint needs any more go when the next is made.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.numpy import load, save
from torch import Tensor

from shoal.protos.errors import RunError
from shoal.strategies.base import Mine

__all__ = ["MEMORY", "ClientStates"]

MEMORY = 2**28  # bytes
PATIENCE = 5.0  # seconds for another process to let go of the file
PIECE = 2**26  # bytes: SQLite takes no value of a gigabyte

SETTINGS = """
PRAGMA page_size = 32768;
PRAGMA secure_delete = OFF;
PRAGMA locking_mode = EXCLUSIVE;
CREATE TABLE IF NOT EXISTS states (client, round, piece, crc, data, PRIMARY KEY (client, round, piece));
CREATE INDEX IF NOT EXISTS by_round ON states (round, client);
CREATE TABLE IF NOT EXISTS checkpoints (round INTEGER PRIMARY KEY);
"""
NEWEST = """
SELECT crc, data FROM states
WHERE client = :client AND round = (SELECT max(round) FROM states WHERE client = :client) ORDER BY piece
"""
OUTDATED = """
DELETE FROM states WHERE rowid IN (
    SELECT old.rowid FROM states AS new JOIN states AS old ON old.client = new.client AND old.round < new.round
    WHERE new.round > :before AND new.round <= :oldest)
"""


class ClientStates:
    """The settled states of a population, at most ``memory`` bytes of them in memory, and those of the last round.

    ``path`` is the file that outlives the process; None: a temporary one, which no checkpoint can refer to. All methods
    but :meth:`put` raise RunError if the file cannot be read or written.
    """

    def __init__(self, path: Path | None = None, memory: int = MEMORY) -> None:
        self._path, self.memory = path, memory
        self._rows: _Rows | None = None  # no file before there is something to write
        self._cache = OrderedDict[str, Mine]()  # the least recently used first
        self._bytes = 0
        self._unwritten = dict[str, int]()  # clients whose state is in the cache only, with the round that changed it
        self._round = 0

    def get(self, client: str) -> Mine | None:
        """A client's state, not to be changed in place; None if it has none."""
        self._shrink()
        if client in self._cache:
            self._cache.move_to_end(client)
            return self._cache[client]
        found = None if self._rows is None else self._rows.read(client)
        if found is not None:
            self._remember(client, found)
        return found

    def put(self, round: int, states: Mapping[str, Mine]) -> None:
        """What a round has changed; copied, because workers only lend the memory that it lies in.

        Nothing is written yet, which could fail: the server's state changes at the same time, or neither does.
        """
        copies = {client: {name: _copy(tensor) for name, tensor in mine.items()} for client, mine in states.items()}
        for client, mine in copies.items():
            self._remember(client, mine)
        self._unwritten.update(dict.fromkeys(copies, round))
        self._round = round

    def clients(self) -> set[str]:
        """All that have a state."""
        return {*self._unwritten, *(self._rows.clients() if self._rows else ())}

    def keep(self) -> int:
        """Make all of it safe on disk; a checkpoint notes the number that comes back.

        That is the last round that was put, or 0 if there is nothing to come back to.
        """
        if self._path is None or not (self._unwritten or self._rows):
            return 0
        rows = self._opened()
        rows.drop_outdated()
        self._write()
        rows.commit(self._round)
        return self._round

    def restore(self, noted: int) -> None:
        """Go back to what there was when :meth:`keep` gave this number; 0: to nothing. RunError if it is not there."""
        self._cache.clear()
        self._unwritten.clear()
        self._bytes, self._round = 0, noted
        if noted or self._rows or (self._path is not None and self._path.exists()):
            self._opened().rewind(noted)

    def close(self) -> None:
        """Release the file; may be called twice."""
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _remember(self, client: str, mine: Mine) -> None:
        self._bytes += _size(mine) - _size(self._cache.pop(client, {}))
        self._cache[client] = mine

    def _shrink(self) -> None:
        if self._bytes > self.memory:
            self._write()
        while self._bytes > self.memory:
            self._bytes -= _size(self._cache.popitem(last=False)[1])

    def _write(self) -> None:
        if self._unwritten:
            self._opened().write((client, round, self._cache[client]) for client, round in self._unwritten.items())
            self._unwritten.clear()

    def _opened(self) -> _Rows:
        self._rows = self._rows or _Rows(self._path)
        return self._rows


class _Rows:
    """The file. What is not committed is gone when the process dies, or the power."""

    def __init__(self, path: Path | None) -> None:
        self._name, self._failed = "a temporary file" if path is None else str(path), ""
        self._open = ExitStack()
        with self._explained():
            self._file = sqlite3.connect("" if path is None else path, timeout=PATIENCE)
            self._open.callback(self._file.close)
            self._file.executescript(SETTINGS)

    def read(self, client: str) -> Mine | None:
        with self._explained():
            found = self._file.execute(NEWEST, {"client": _key(client)}).fetchall()
        if any(zlib.crc32(data) != crc for crc, data in found):
            raise RunError(f"the state of client {client!r} in {self._name} is damaged; start the run anew")
        arrays = load(b"".join(data for _, data in found)) if found else {}
        return {name: torch.from_numpy(array) for name, array in arrays.items()} or None

    def write(self, states: Iterable[tuple[str, int, Mine]]) -> None:
        with self._explained():
            self._file.executemany("INSERT OR REPLACE INTO states VALUES (?, ?, ?, ?, ?)", _pieces(states))

    def clients(self) -> Iterator[str]:
        with self._explained():
            for (key,) in self._file.execute("SELECT DISTINCT client FROM states"):
                yield key.decode("utf-8", "surrogatepass")

    def drop_outdated(self) -> None:
        """Drop what the two checkpoints on the disk do not need: both stay until there is a third."""
        with self._explained():
            latest = self._file.execute("SELECT round FROM checkpoints ORDER BY round DESC LIMIT 3").fetchall()
            oldest, before = [*(round for (round,) in latest[1:]), 0, 0][:2]
            self._file.execute(OUTDATED, {"before": before, "oldest": oldest})

    def commit(self, round: int) -> None:
        """Make what was written safe, as what the checkpoint of this round needs."""
        with self._explained():
            self._file.execute("INSERT OR REPLACE INTO checkpoints VALUES (?)", (round,))
            self._file.commit()

    def rewind(self, round: int) -> None:
        """Drop what is later than the checkpoint of this round."""
        with self._explained():
            there = self._file.execute("SELECT 1 FROM checkpoints WHERE round = ?", (round,)).fetchone()
            if round and not there:
                raise RunError(
                    f"the client states of round {round} are not in {self._name}; put back the file that belongs to "
                    f"the checkpoints, or start the run anew"
                )
            self._file.execute("DELETE FROM states WHERE round > ?", (round,))
            self._file.execute("DELETE FROM checkpoints WHERE round > ?", (round,))
            self._file.commit()

    def close(self) -> None:
        self._open.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self._open.close()  # for SQLite may have dropped what it had not committed: nothing may be any more
            self._failed = self._failed or str(error)
            raise RunError(
                f"client states cannot be kept in {self._name} ({self._failed}); make room on the disk and resume, or "
                f"start the run anew if the file is damaged"
            ) from error


def _pieces(states: Iterable[tuple[str, int, Mine]]) -> Iterator[tuple[bytes, int, int, int, bytes]]:
    for client, round, mine in states:
        data = save({name: tensor.numpy() for name, tensor in mine.items()})
        for piece, start in enumerate(range(0, len(data), PIECE)):
            part = data[start : start + PIECE]
            yield _key(client), round, piece, zlib.crc32(part), part


def _key(client: str) -> bytes:
    """A name may hold any character; SQLite's text may not."""
    return client.encode("utf-8", "surrogatepass")


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _size(mine: Mine) -> int:
    return sum(tensor.nbytes for tensor in mine.values())
