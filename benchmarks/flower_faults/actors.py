"""The processes of a Flower deployment: SuperLink, SuperExec and SuperNodes, with all that they start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Actor", "command", "environment"]

MARK = "SHOAL_ACTOR"  # of the environment: whatever a process starts has it, too


def command(name: str) -> str:
    """Where a command of Flower's is: beside this Python or on the path; FileNotFoundError says what to install."""
    found = shutil.which(name, path=_path())
    if found is None:
        raise FileNotFoundError(f"there is no {name} on the path; install flwr (pip install 'flwr>=1.36')")
    return found


def environment(home: Path) -> dict[str, str]:
    """Nothing of this user's, and no word to anybody: no telemetry, no look for updates, no installations."""
    return os.environ | {
        "PATH": _path(),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def _path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


class Actor:
    """One command, started again as often as it dies, and everything that it has started."""

    def __init__(self, name: str, words: Sequence[object], folder: Path, environment: dict[str, str]) -> None:
        self.name, self._mark = name, f"{folder / name}"
        self._command = [command(str(words[0])), *map(str, words[1:])]
        self._folder, self._environment = folder, environment | {MARK: self._mark}
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with (self._folder / f"{self.name}.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                cwd=self._folder,
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def members(self, words: str = "") -> list[int]:
        """Its process and all below it, or those of them whose command has these words."""
        wanted = f"{MARK}={self._mark}\0".encode()
        found = list[int]()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    ours = wanted in (entry / "environ").read_bytes() + b"\0"
                    if ours and words.encode() in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
                except OSError:  # gone meanwhile, or somebody else's
                    continue
        return found

    async def kill_alone(self) -> None:
        """The process that was started; those below it are left to themselves."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def kill(self) -> None:
        """With all that it has started, as when a machine dies."""
        while members := self.members():
            for member in members:
                send(member)
            if self._process is not None:
                await self._process.wait()
            await asyncio.sleep(0.01)


def send(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
