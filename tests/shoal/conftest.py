"""Servers and clients as a user starts them: processes of the ``shoal`` command on the loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shoal.cli import main

ROOT = Path(__file__).parents[2]
SHOAL = "import sys; sys.argv[0] = 'shoal'; from shoal.cli import main; main()"
PATIENCE = 60.0  # seconds, for machines that do other things too


class Process:
    """A running command whose lines can be waited for; it dies at the nth passing of a point, ``until`` then."""

    def __init__(self, folder: Path, words: tuple[str, ...], until: tuple[str, int] | None = None) -> None:
        program = ("-c", SHOAL) if until is None else ("-m", "tests.chaos.launch", until[0], str(until[1]), "--")
        command = [sys.executable, *program, *words]
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        self.lines = list[str]()
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._heard, self._ended = threading.Condition(), False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._heard:
                self.lines.append(line.rstrip())
                self._heard.notify_all()
        with self._heard:
            self._ended = True
            self._heard.notify_all()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, words: str, times: int = 1) -> str:
        """The line that says so for the nth time."""

        def found() -> list[str]:
            return [line for line in self.lines if words in line]

        with self._heard:
            self._heard.wait_for(lambda: len(found()) >= times or self._ended, PATIENCE)
            assert len(found()) >= times, f"never said {words!r}:\n{self.text}"
            return found()[times - 1]

    @property
    def address(self) -> str:
        """Where a server that was given port 0 listens."""
        return self.wait_for("clients over gRPC at ").partition("clients over gRPC at ")[2].partition(",")[0]

    def wait(self) -> int:
        """The exit code."""
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"it never ended:\n{self.text}") from error
        self._reader.join()
        return code

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """As a power cut would."""
        self._process.kill()
        self.wait()

    def end(self) -> None:
        if self._process.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


Start = Callable[..., Process]  # its arguments are the words behind "shoal"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts ``shoal WORDS`` in the test's folder; everything is ended with the test.

    ``until=("taken", 2)``: it kills itself at the second passing of that point of :mod:`tests.chaos.points`.
    """
    started = list[Process]()

    def run(*words: object, until: tuple[str, int] | None = None) -> Process:
        started.append(Process(tmp_path, tuple(map(str, words)), until))
        return started[-1]

    yield run
    for process in started:
        process.end()


# --- a tiny experiment, and commands in this process ------------------------------------------------------------------

EXPERIMENT = """
name = "tiny"
rounds = 3
cohort = 3
[data]
name = "csv"
path = "tiny.csv"
label = "y"
client = "site"
test_fraction = 0.2
[model]
name = "linear"
[local]
lr = 0.1
batch_size = 4
"""

MINE = """
import os, signal, sys
from dataclasses import dataclass
from pathlib import Path
import shoal
from shoal.strategies.fedavg import FedAvg

@dataclass(frozen=True)
class Mine(shoal.Strategy):
    part: float = 1.0
    citation = "none"
    def local(self, trainer, sent, mine):
        return trainer.run(sent.parameters), mine
    def contribute(self, state, update, context):
        return FedAvg().contribute(state, update, context)
    def finish(self, state, total, context):
        return FedAvg().finish(state, total, context)

class Raises(Mine):
    def finish(self, state, total, context):
        raise KeyError("no such thing")

class Dies(Mine):
    def finish(self, state, total, context):
        os.kill(os.getpid(), signal.SIGKILL)

class DiesOnce(Mine):
    def finish(self, state, total, context):
        if not Path("died").exists():
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().finish(state, total, context)

class PowerCut(Mine):
    def finish(self, state, total, context):
        if context.round == 3 and not Path("killed").exists():
            Path("killed").touch()
            command = os.getppid()
            if sys.platform == "linux":  # the parent is the nursery, the command is above it
                command = int(Path(f"/proc/{command}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(command, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().finish(state, total, context)
"""

Shoal = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with ``tiny.toml``, ``tiny.csv`` and ``mine.py``."""
    rng, rows = np.random.default_rng(0), ["a,b,y,site"]
    for row in range(60):
        x = rng.normal(size=2)
        rows.append(f"{x[0]:.3f},{x[1]:.3f},{int(x[0] > x[1])},{'abcdef'[row % 6]}")
    (tmp_path / "tiny.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "tiny.toml").write_text(EXPERIMENT)
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shoal:
    """Run a command: exit code, output, errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shoal", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run
