"""What a served round has so far, on disk: a server that is killed at any instant goes on with the same round.

::

    RUN/round/journal.sqlite     who was asked what, under which nonces, and whose answers are taken
    RUN/round/<nonce>.payload    an answer's bytes, whole or on their way
    RUN/round/<nonce>.header     what they were announced as

An answer is *taken* when its row is committed. Its bytes are on the disk before that, and its receipt leaves after it:
so whatever a client has a receipt for is in the round's sum. Rows and files go when a checkpoint holds their round.
"""

from __future__ import annotations

import errno
import hashlib
import json
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from shoal.protos.codec import content_of
from shoal.protos.errors import RunError
from shoal.protos.files import sync_file, sync_folder
from shoal.protos.messages import Kind

__all__ = ["Asked", "Journal"]

TABLES = """
CREATE TABLE IF NOT EXISTS asked (
    round INTEGER, kind TEXT, cohort TEXT, population INTEGER, present TEXT, PRIMARY KEY (round, kind)
);
CREATE TABLE IF NOT EXISTS task (
    nonce TEXT PRIMARY KEY, round INTEGER, kind TEXT, place INTEGER, header BLOB, taken INTEGER, identity TEXT
);
"""


@dataclass(frozen=True)
class Asked:
    """What a round asked of whom: ``nonces`` in the order of the ``cohort``, chosen among ``population`` clients.

    ``taken`` has the headers of the answers that are taken, by nonce, the first one first; ``proven`` the identities
    of the clients that gave them.
    """

    cohort: Sequence[str]
    population: int
    nonces: Sequence[str]
    taken: Mapping[str, bytes]
    proven: Mapping[str, str] = field(default_factory=dict)


class Journal:
    """The journal of one run, in a folder of its own. Methods may be called from any thread.

    Without ``sync`` nothing waits for the disk: a killed process still loses nothing, a power cut may. RunError if the
    folder cannot be written or the journal is damaged; OSError where the disk fails later.
    """

    def __init__(self, folder: Path, sync: bool = True) -> None:
        self.folder, self._sync, self._lock = folder, sync, threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(folder / "journal.sqlite", check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute(f"PRAGMA synchronous = {'FULL' if sync else 'OFF'}")
            self._database.executescript(TABLES)
            self._database.execute("SELECT identity FROM task LIMIT 0")  # an earlier version's journal has none
            self._drop_files()
            sync_folder(folder)
            sync_folder(folder.parent)
        except (OSError, sqlite3.Error) as error:
            raise self._damaged(error) from error

    def payload(self, nonce: str) -> Path:
        """Where the bytes of an answer lie."""
        return self.folder / f"{nonce}.payload"

    def recall(self, round: int, kind: Kind) -> Asked | None:
        """What was asked, with all answers that were ever taken; None if nothing was. No payload is read."""
        with self._transaction() as database:
            asked = database.execute(
                "SELECT cohort, population FROM asked WHERE round = ? AND kind = ?", (round, kind)
            ).fetchone()
            if asked is None:
                return None
            rows = database.execute(
                "SELECT nonce, header, taken, identity FROM task WHERE round = ? AND kind = ? ORDER BY place",
                (round, kind),
            ).fetchall()
        answers = sorted((taken, nonce, header, proven) for nonce, header, taken, proven in rows if taken is not None)
        taken = {nonce: header for _, nonce, header, _ in answers}
        proven = {nonce: identity for _, nonce, _, identity in answers}
        return Asked(json.loads(asked[0]), asked[1], [row[0] for row in rows], taken, proven)

    def present(self) -> Sequence[str]:
        """Who was connected when somebody was last asked."""
        with self._transaction() as database:
            found = database.execute("SELECT present FROM asked ORDER BY rowid DESC LIMIT 1").fetchone()
        return [] if found is None else list(json.loads(found[0]))

    def open(
        self, round: int, kind: Kind, cohort: Sequence[str], population: int, present: Sequence[str] = ()
    ) -> Asked:
        """Before anybody is asked: what was asked already, or this under new nonces; ``present`` are connected.

        An answer whose bytes are not what they were is not among those taken: its client is asked again.
        """
        found = self.recall(round, kind)
        if found is not None:
            whole = {nonce: header for nonce, header in found.taken.items() if self._is_whole(nonce, header)}
            return replace(found, taken=whole)
        nonces = [secrets.token_hex(8) for _ in cohort]
        with self._transaction() as database:
            row = (round, kind, json.dumps(list(cohort)), population, json.dumps(list(present)))
            database.execute("INSERT INTO asked VALUES (?, ?, ?, ?, ?)", row)
            rows = [(nonce, round, kind, place) for place, nonce in enumerate(nonces)]
            database.executemany("INSERT INTO task VALUES (?, ?, ?, ?, NULL, NULL, NULL)", rows)
        return Asked(list(cohort), population, nonces, {})

    def take(self, nonce: str, header: bytes, identity: str = "") -> None:
        """The answer is whole and right: keep it for good. The receipt may go when this returns.

        ``identity`` is what its client has proven to be.
        """
        payload = self.payload(nonce)
        if self._sync and content_of(header)[2]:
            sync_file(payload)
            sync_folder(self.folder)
        with self._transaction() as database:
            database.execute(
                "UPDATE task SET header = ?, identity = ?, taken = (SELECT 1 + coalesce(max(taken), 0) FROM task) "
                "WHERE nonce = ?",
                (header, identity, nonce),
            )

    def give_up(self, nonce: str) -> None:
        """An answer that was taken cannot be counted: where the round goes on anew, its client is asked again."""
        with self._transaction() as database:
            database.execute("UPDATE task SET header = NULL, identity = NULL, taken = NULL WHERE nonce = ?", (nonce,))

    def forget(self, but: int) -> None:
        """Drop all rounds but this one. What those before it gave, a checkpoint holds.

        Those after it were asked when there was a checkpoint that is gone: answers to them belong to another model,
        and clients that make the round again drop the states that came with them.
        """
        with self._transaction() as database:
            gone = database.execute("DELETE FROM asked WHERE round != ?", (but,)).rowcount
            database.execute("DELETE FROM task WHERE round != ?", (but,))
        if gone:
            self._drop_files()

    def close(self) -> None:
        """May be called twice."""
        with self._lock:
            self._database.close()

    def _damaged(self, error: Exception) -> RunError:
        return RunError(
            f"the journal in {self.folder} cannot be used ({error}); make room or correct its permissions, or, if it "
            f"is damaged, delete that folder to begin the round in progress anew"
        )

    def _is_whole(self, nonce: str, header: bytes) -> bool:
        _, sha256, total = content_of(header)
        if not total:
            return True
        try:
            with self.payload(nonce).open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest() == sha256
        except OSError:
            return False

    def _drop_files(self) -> None:
        """Files of tasks that are not in the journal."""
        with self._transaction() as database:
            known = {nonce for (nonce,) in database.execute("SELECT nonce FROM task")}
        for path in self.folder.iterdir():
            if path.suffix in (".payload", ".header") and path.stem not in known:
                path.unlink(missing_ok=True)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    yield self._database
                    self._database.execute("COMMIT")
                finally:
                    if self._database.in_transaction:  # SQLite may have ended it, where the disk is full
                        self._database.execute("ROLLBACK")
            except sqlite3.OperationalError as error:
                full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
                raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
            except sqlite3.DatabaseError as error:
                raise self._damaged(error) from error
