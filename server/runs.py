"""The run folder ``runs/0007-name/``: what a run keeps, the same for simulation and deployment.

=================  =====================================================================================
experiment.toml    the experiment as it ran, every default written out; run it again with ``shoal simulate``
env.json           versions, machine, command line, engine
metrics.jsonl      a line a round; round 0 is the initial model
clients.jsonl      lines of columns: who took part in a round, with what numbers; who failed, why; evaluations
checkpoints/       the newest two states (safetensors and JSON)
best/, snapshots/  what the callbacks BestModel and Snapshots keep (:mod:`shoal.server.callbacks`)
states.sqlite      what simulated clients keep between rounds, if they do (:mod:`shoal.simulations.states`)
summary.json       status and last numbers
log.jsonl          events with their time, no more than a disk can hold (:mod:`shoal.server.log`)
audit.jsonl        of a served run: whose updates each round counted, chained (:mod:`shoal.server.audit`)
round/             of a served run: what the round in progress has so far (:mod:`shoal.server.journal`)
.lock              held by the one process that writes
=================  =====================================================================================

Lines are appended and flushed; a run that is resumed drops the lines of rounds after its checkpoint and goes on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from shoal.protos.errors import RunError
from shoal.protos.files import locked, sync_folder, write_whole
from shoal.protos.messages import Failure
from shoal.server.callbacks import Callback
from shoal.server.fleet import Report, Round
from shoal.server.log import Log
from shoal.server.patience import at_once

if TYPE_CHECKING:
    from shoal.server.checkpoints import Checkpoint

__all__ = ["RunFolder", "list_runs", "plain"]

NUMBERED = re.compile(r"(\d{4,})-")
OWN = frozenset({"round", "kind", "client", "failed"})  # of a line in clients.jsonl: no column has such a name


class RunFolder(Callback):
    """One run's folder, which writes what happens.

    ``patience`` says what becomes of a write for which the disk has no room.
    """

    patience: Callable[[Callable[[], Any]], Any]

    def __init__(self, path: Path) -> None:
        self.path, self.patience = path, at_once
        self._log = Log(lambda line: self._append("log.jsonl", line))
        self._files: dict[str, FileIO] = {}
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, root: Path, name: str, announce: Callable[[Path], None] = lambda path: None) -> RunFolder:
        """A new folder with the next number; safe when several runs start at once.

        ``announce`` hears which one is tried, before it is there.
        """
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"{str(root)!r} cannot hold runs ({error.strerror}); give another folder with --out"
            ) from error
        slug = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:60] or "run"
        while True:
            number = max(_numbers(root), default=0) + 1
            path = root / f"{number:04d}-{slug}"
            announce(path)
            try:
                path.mkdir()
            except FileExistsError:
                continue
            if _numbers(root).count(number) == 1:
                return cls(path)
            path.rmdir()  # another process has this number, with another name

    @classmethod
    def make(cls, path: Path) -> RunFolder:
        """A new folder at a place of the caller's; RunError if there is something already."""
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise RunError(f"{str(path)!r} cannot be made ({error.strerror}); give another folder") from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run; ``runs/7`` and ``runs/0007`` find ``runs/0007-name``."""
        if (path / "experiment.toml").is_file():
            return cls(path)
        if path.name.isdecimal() and path.parent.is_dir():
            for candidate in path.parent.iterdir():
                match = NUMBERED.match(candidate.name)
                if match and int(match[1]) == int(path.name):
                    return cls(candidate)
        raise RunError(f"there is no run at {str(path)!r}; 'shoal runs' lists those there are")

    def claim(self) -> None:
        """Become the only writer; RunError if another process is."""
        self._lock = locked(self.path / ".lock")
        if self._lock is None:
            raise RunError(f"{self.path} is being written by another process; wait for it or stop it")

    def in_use(self) -> bool:
        """Whether a process is writing this run (always False where the system has no file locks)."""
        probe = RunFolder(self.path)
        try:
            probe.claim()
        except RunError:
            return True
        probe.close()
        return False

    # --- writing -----------------------------------------------------------------------------------------------------

    def write(self, name: str, content: str | Mapping[str, Any]) -> None:
        """A whole file, replaced at once."""
        text = content if isinstance(content, str) else json.dumps(plain(content), indent=2) + "\n"
        self.patience(lambda: write_whole(self.path / name, [text.encode()]))

    def append_synced(self, name: str, line: bytes) -> None:
        """A line that is on the disk when this returns."""
        self.patience(lambda: _write_line(self._opened(name), line, sync=True))
        self.patience(lambda: sync_folder(self.path))

    def on_round_end(self, round: Round, point: Checkpoint) -> None:
        self._append("metrics.jsonl", {"round": round.number, **round.numbers})
        if round.reports or round.failures:
            failed = [{"client": f.client, "reason": f.reason} for f in round.failures]
            line = {"round": round.number, "kind": "train", **_columns(round.reports)}
            self._append("clients.jsonl", line | ({"failed": failed} if failed else {}))

    def on_failure(self, failure: Failure) -> None:
        event = {"client": failure.client, "round": failure.round, "reason": failure.reason}
        self.log(failure.kind, **event, **({"traceback": failure.traceback} if failure.traceback else {}))

    def on_evaluations(self, round: int, reports: Sequence[Report]) -> None:
        if reports:
            self._append("clients.jsonl", {"round": round, "kind": "evaluate", **_columns(reports)})

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        from shoal.server import checkpoints  # PyTorch

        for file in self._files.values():  # what a checkpoint has behind it is not written again
            os.fsync(file.fileno())
        self.patience(lambda: checkpoints.write(self.path / "checkpoints", checkpoint))

    def log(self, kind: str, **fields: object) -> None:
        """One event with the time of day (UTC), unless its ``client`` has had its ration."""
        self._log.write(kind, **fields)

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        data = (json.dumps(plain(line)) + "\n").encode()
        self.patience(lambda: _write_line(self._opened(name), data))

    def _opened(self, name: str) -> FileIO:
        if name not in self._files:
            self._files[name] = (self.path / name).open("ab", buffering=0)
        return self._files[name]

    def close(self) -> None:
        self.patience = at_once  # a disk that is full must not keep the process
        with contextlib.suppress(OSError):
            self._log.close()
        for file in self._files.values():
            os.fsync(file.fileno())
            file.close()
        self._files.clear()
        if self._lock is not None:
            self._lock.close()

    # --- reading -----------------------------------------------------------------------------------------------------

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The whole lines of a JSONL file; a line torn by a crash is left out."""
        path = self.path / name
        if not path.exists():
            return
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file; RunError if it is missing or damaged."""
        try:
            return dict(json.loads((self.path / name).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / name} cannot be read ({error}); the run folder is incomplete") from error

    def experiment(self) -> str:
        """The experiment as it ran, in TOML; RunError if it is gone or damaged."""
        file = self.path / "experiment.toml"
        try:
            kept = file.read_text(encoding="utf-8")
            tomllib.loads(kept)
        except (OSError, ValueError) as error:
            why = f"{file} cannot be read ({error})"
            raise RunError(f"{why}; without it the run cannot go on: start it anew") from error
        return kept

    def latest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint."""
        from shoal.server import checkpoints

        return checkpoints.latest(self.path / "checkpoints")

    def rewind(self, round: int) -> None:
        """Drop the lines of later rounds, which a resumed run writes again, and a line that was torn by a crash."""
        for name in ("metrics.jsonl", "clients.jsonl", "audit.jsonl", "log.jsonl"):
            if self.has(name):
                with (self.path / name).open("rb") as file:
                    whole = (line for line in file if line.endswith(b"\n"))
                    kept = (line for line in whole if name == "log.jsonl" or not _is_later(line, round))
                    write_whole(self.path / name, kept)


def _numbers(root: Path) -> list[int]:
    return [int(m[1]) for path in root.iterdir() if (m := NUMBERED.match(path.name))]


def list_runs(root: Path) -> list[RunFolder]:
    """All run folders below ``root``, oldest first."""
    if not root.is_dir():
        return []
    return [RunFolder(path) for path in sorted(root.iterdir()) if (path / "experiment.toml").is_file()]


def _write_line(file: FileIO, data: bytes, sync: bool = False) -> None:
    """The whole line or nothing of it."""
    before = file.seek(0, os.SEEK_END)
    try:
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if sync:
            os.fsync(file.fileno())
    except OSError:
        file.truncate(before)
        raise


def _is_later(line: bytes, round: int) -> bool:
    """A line that somebody has damaged stays as it is, for whoever reads it to find."""
    try:
        return bool(json.loads(line)["round"] > round)
    except (ValueError, KeyError, TypeError):
        return False


def _columns(reports: Sequence[Report]) -> dict[str, list[Any]]:
    """Reports as columns: one list a name, in the cohort's order; None where a client has no such number."""
    names = dict.fromkeys(name for report in reports for name in report.numbers if name not in OWN)
    columns = {name: [report.numbers.get(name) for report in reports] for name in names}
    return {"client": [report.client for report in reports], **columns}


def plain(value: Any) -> Any:
    """The value as strict JSON: whole floats as integers, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [item if type(item) is str else _number(item) if type(item) is float else plain(item) for item in value]
    return _number(value) if isinstance(value, float) else value


def _number(value: float) -> float | int | None:
    return int(value) if value.is_integer() and abs(value) < 2**53 else value if math.isfinite(value) else None
