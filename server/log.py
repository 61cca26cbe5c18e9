"""The events of a run, a line each, and no more of them than a disk can hold: whatever a client does, it gets a ration.

A line has ``time`` (of day, UTC) and ``kind``, and ``client``, ``round`` and more where the kind has them. A line that
names a client is written if both its client's ration of the kind and the kind's own have one left; how many were left
out is a line of its own, before the next one of the kind and at the end. Lines of the server itself are always written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ALL", "EACH", "Log", "Rate", "now"]

NAMED = 10  # clients that a line about lines left out names
MANY = 4096  # purses, from which on those that are full again are dropped


@dataclass(frozen=True)
class Rate:
    """``burst`` lines at once, and another one every ``seconds``."""

    burst: int
    seconds: float


EACH, ALL = Rate(20, 600.0), Rate(1000, 60.0)


@dataclass
class _Purse:
    """What is left of a ration."""

    rate: Rate
    lines: float
    since: float

    def at(self, now: float) -> float:
        """How many lines there are by now."""
        self.lines = min(self.rate.burst, self.lines + (now - self.since) / self.rate.seconds)
        self.since = now
        return self.lines


@dataclass
class _LeftOut:
    """Lines of one kind that were not written."""

    lines: int = 0
    clients: dict[str, None] = field(default_factory=dict)


class Log:
    """``append`` writes a line. ``each`` is a client's ration of a kind, ``all`` that of a kind: names cost nothing.

    May be called from one thread at a time.
    """

    def __init__(
        self,
        append: Callable[[Mapping[str, Any]], None],
        each: Rate = EACH,
        all: Rate = ALL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._append, self._each, self._all, self._clock = append, each, all, clock
        self._purses: dict[tuple[str, str | None], _Purse] = {}
        self._left_out: dict[str, _LeftOut] = {}
        self._many = MANY

    def write(self, kind: str, **fields: Any) -> None:
        """One event; ``client=`` says whose it is."""
        if "client" in fields and not self._granted(kind, fields["client"]):
            left = self._left_out.setdefault(kind, _LeftOut())
            left.lines += 1
            if len(left.clients) < NAMED:
                left.clients[fields["client"]] = None
            return
        self._tell_left_out(kind)
        self._append({"time": now(), "kind": kind, **fields})

    def close(self) -> None:
        """Say what was left out."""
        for kind in list(self._left_out):
            self._tell_left_out(kind)

    def _tell_left_out(self, kind: str) -> None:
        left = self._left_out.pop(kind, None)
        if left is not None:
            line = {"time": now(), "kind": "left out", "of": kind, "lines": left.lines, "clients": list(left.clients)}
            self._append(line)

    def _granted(self, kind: str, client: str) -> bool:
        at = self._clock()
        everybody = self._purse(kind, None, self._all, at)
        if everybody.at(at) < 1:  # and no purse is made: names may be many
            return False
        own = self._purse(kind, client, self._each, at)
        if own.at(at) < 1:
            return False
        own.lines, everybody.lines = own.lines - 1, everybody.lines - 1
        return True

    def _purse(self, kind: str, client: str | None, rate: Rate, at: float) -> _Purse:
        if (kind, client) not in self._purses:
            if len(self._purses) >= self._many:
                self._purses = {key: p for key, p in self._purses.items() if p.at(at) < p.rate.burst}
                self._many = max(MANY, 2 * len(self._purses))
            self._purses[kind, client] = _Purse(rate, rate.burst, at)
        return self._purses[kind, client]


def now() -> str:
    """The time of day, UTC, as a line has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
