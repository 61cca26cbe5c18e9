"""Whether the audit log of a served run fits: line by line, and with the last checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.protos.errors import RunError
from shoal.server.audit import NAME, Misfit, digest, entries
from shoal.server.checkpoints import Checkpoint
from shoal.server.runs import RunFolder

__all__ = ["Account", "audit"]


@dataclass(frozen=True)
class Account:
    """What an audit log covers, up to the first ``line`` that does not fit; ``problem`` says why, None if all do.

    ``counted`` and ``not_counted`` are of what ``clients`` different clients were asked in ``rounds`` rounds. ``last``
    is the SHA-256 with which the last of these lines ends, None if there is none.
    """

    run: str
    rounds: int
    clients: int
    counted: int
    not_counted: int
    last: str | None
    line: int | None = None
    problem: str | None = None


@dataclass
class _Tally:
    """Of the lines so far."""

    clients: set[str] = field(default_factory=set)
    counted: int = 0
    asked: int = 0
    after: list[str] = field(default_factory=list)  # the parameters', a round each
    sealed: list[str] = field(default_factory=list)  # the lines', a round each

    def add(self, entry: Mapping[str, Any]) -> None:
        self.clients.update(told["client"] for told in entry["clients"])
        self.counted += sum("examples" in told for told in entry["clients"])
        self.asked += len(entry["clients"])
        self.after.append(entry["after"])
        self.sealed.append(entry["sha256"])


def audit(path: Path, kept: str | None = None) -> Account:
    """Check the log of the run at ``path``; ``kept`` is the last SHA-256 that an earlier check gave.

    RunError if the run was not served.
    """
    folder, tally = RunFolder.open(path), _Tally()
    recorded = folder.read("env.json")
    if "served" not in recorded:
        raise RunError(f"{folder.path} was not served; only runs of 'shoal server' have an audit log")
    line, problem = None, None
    try:
        _read(folder, recorded["run"], tally, kept)
    except Misfit as misfit:
        line, problem = misfit.line, str(misfit)
    numbers = len(tally.after), len(tally.clients), tally.counted, tally.asked - tally.counted
    return Account(str(folder.path), *numbers, tally.sealed[-1] if tally.sealed else None, line, problem)


def _read(folder: RunFolder, run: str, tally: _Tally, kept: str | None) -> None:
    point = folder.latest()
    if folder.has(NAME):
        for entry in entries(folder.path / NAME, run):
            tally.add(entry)
    _check_end(folder, tally, point)
    if kept is not None and kept not in tally.sealed:
        raise Misfit(len(tally.sealed), f"is the last, and none ends with {kept}: lines were cut off, or all made anew")


def _check_end(folder: RunFolder, tally: _Tally, before: Checkpoint | None) -> None:
    """``before`` was the last checkpoint before the lines were read: the run may be going on."""
    rounds, held = len(tally.after), 0 if before is None else before.round
    if rounds < held:
        raise Misfit(rounds + 1, f"is missing: the last checkpoint is of round {held}")
    if before is not None and held and tally.after[held - 1] != digest(before.parameters):
        raise Misfit(held, f"says other parameters than the checkpoint of round {held} holds")
    finished = folder.has("summary.json") and folder.read("summary.json")["status"] == "finished"
    now = folder.latest() if rounds > held else before
    held = 0 if now is None else now.round
    if rounds > held + (not finished):  # a server that dies, or has not got so far, leaves one line without
        raise Misfit(held + 1, f"is of a round that no checkpoint holds: the last one is of round {held}")
