"""The processes of a trial, and what their traces say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.chaos.points import Arm, Wiring

__all__ = ["Actor", "Broken", "Trace"]

ROOT = Path(__file__).parents[2]
CHUNK = 1024  # bytes: a small model has many chunks
TAIL = 40  # lines of a process's output that an error shows


class Broken(Exception):
    """The trial has failed: why, in words."""


class Actor:
    """A server or a process of clients, started again as often as it is killed.

    ``clients`` are those that it plays; ``under`` is a command that runs it, ``order`` what :class:`Wiring` says.
    """

    def __init__(
        self,
        name: str,
        words: Sequence[object],
        folder: Path,
        trace: Path,
        clients: Sequence[str] = (),
        under: Sequence[str] = (),
        order: bool = False,
    ) -> None:
        self.name, self.clients = name, frozenset(clients)
        self._folder, self._log = folder, folder / f"{name}.log"
        self._arming = folder / f"{name}.arm"
        self.full = folder / f"{name}.full"
        full = None if clients else str(self.full)
        wiring = Wiring(name, str(trace), str(self._arming), os.getpid(), CHUNK, order, full)
        self._environment = os.environ | wiring.environment() | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        self._command = [*under, sys.executable, "-m", "tests.chaos.launch", "-", "0", "--", *map(str, words)]
        self._process: asyncio.subprocess.Process | None = None
        self._serial = 0
        self.since = 0.0  # when it was started last

    async def start(self) -> None:
        self.disarm()
        self.since = time.monotonic()
        with self._log.open("ab") as log:
            log.write(f"--- started at {self.since:.3f}\n".encode())
            self._process = await asyncio.create_subprocess_exec(
                *self._command, cwd=self._folder, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def code(self) -> int | None:
        """None as long as it runs."""
        return None if self._process is None else self._process.returncode

    def arm(self, point: str, count: int, whole: bool = False) -> None:
        self._serial += 1
        Arm(point, count, whole, self._serial).write(self._arming)

    def disarm(self) -> None:
        self._arming.unlink(missing_ok=True)

    async def kill(self) -> None:
        """As a power cut would."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Stopped by the system: it does nothing, and its connections stay."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGCONT)

    async def end(self, seconds: float = 10.0) -> int | None:
        """Whether asked or not; the exit code."""
        if self._process is None:
            return None
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), seconds)
        await self.kill()
        return self._process.returncode

    @property
    def tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "\n".join(lines[-TAIL:])


class Trace:
    """Every point that was passed, in any process, in the order of the file."""

    def __init__(self, path: Path) -> None:
        self.path, self.events = path, list[Mapping[str, Any]]()
        self._read, self._rest = 0, b""

    def look(self) -> None:
        """Read what is new."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        self._read += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.events += [json.loads(line) for line in lines]

    def of(self, point: str, after: float = 0.0, who: str | None = None) -> list[Mapping[str, Any]]:
        """The passings of a point since a time, the last ones first."""
        found = []
        for event in reversed(self.events):
            if event["time"] <= after - 1:  # lines of different processes are not quite in order
                break
            if event["point"] == point and event["time"] > after and who in (None, event["who"]):
                found.append(event)
        return found
