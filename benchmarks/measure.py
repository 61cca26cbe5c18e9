"""One run of one contender in processes of its own: its laps, its weights, and the memory of all its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tasks import Task

__all__ = ["Answer", "Contender", "Failed", "measure"]

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
NO_TELEMETRY = dict.fromkeys(("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"), "0")
QUIET = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
PATIENCE = 900  # seconds
Process = tuple[int, str]  # its number, and when it began: numbers are used again


@dataclass(frozen=True)
class Contender:
    """``command`` starts it, before the folders of task and answer; ``ours`` must not fail, a peer's failure is told.

    ``cores``: with one, all its processes and threads share one core, so that a figure a core is one. ``slow``: it does
    only the first rounds.
    """

    command: tuple[str, ...]
    cores: int = 1
    ours: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    slow: bool = False

    def task(self, task: Task) -> Task:
        return task.short if self.slow else task


@dataclass(frozen=True)
class Answer:
    """``seconds`` of each round but the first; ``first`` from the start of the process to the end of that round.

    ``memory`` is the peak of all the contender's processes in bytes; pages that several hold count once.
    """

    seconds: list[float]
    first: float | None
    memory: int | None
    weights: np.ndarray | None
    more: dict[str, Any]


class Failed(Exception):
    """Why there is no answer, in one line."""


def measure(contender: Contender, task: Task) -> Answer:
    task = contender.task(task)
    with tempfile.TemporaryDirectory(prefix="answer-") as out:
        made = {"FLWR_HOME": out, "PYTHONPATH": str(ROOT)} | contender.environment
        order = [*contender.command, str(task.folder), out]
        launched, memory = (
            time.monotonic(),
            _run(order, os.environ | ONE_THREAD | NO_TELEMETRY | QUIET | made, contender),
        )
        more: dict[str, Any] = json.loads((Path(out) / "answer.json").read_text())
        if "refused" in more:
            raise Failed(f"refused: {more['refused']}")
        laps, weights = more.pop("laps"), Path(out) / "weights.npy"
        found = np.load(weights) if weights.exists() else None
        seconds = more.pop("seconds", None) or np.diff(laps).tolist()
        return Answer(seconds[1:], laps[1] - launched if laps else None, memory, found, more)


def _run(order: list[str], environment: dict[str, str], contender: Contender) -> int | None:
    """The peak of memory; Failed with the last line that was said if it does not end well."""
    with tempfile.TemporaryFile("w+") as said:
        output: Any = {"stdout": said, "stderr": said, "start_new_session": True}
        with _on_cores(contender.cores):
            process = subprocess.Popen(order, cwd=ROOT, env=environment, **output)
        watch = Watch(process.pid)
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failed(f"not done after {PATIENCE} seconds") from None
        finally:
            peak = watch.end()
        said.seek(0)
        lines = [line for line in said.read().splitlines() if line.strip()]
    if code or not (Path(order[-1]) / "answer.json").exists():
        print("\n".join(lines[-30:]), file=sys.stderr)
        raise Failed(f"exit code {code}: {lines[-1].strip() if lines else 'it said nothing'}")
    return peak


@contextmanager
def _on_cores(count: int) -> Iterator[None]:
    """What is started in the block runs on so many cores; the last ones, as systems like to use the first."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


class Watch:
    """Looks at a process and its descendants while they live, and ends at last what they leave behind.

    Counting pages costs a hundredth of a second a GB, so they are counted only when a cheap look finds more than ever;
    looks become rarer with time.
    """

    def __init__(self, root: int) -> None:
        # Nobody has waited for the root yet, so its number is not used again.
        self._tree = {process for process in _parents() if process[0] == root}
        self._cheap, self._peak, self._done = 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        began = time.monotonic()
        while not self._done.wait(min(1.0, 0.1 * (time.monotonic() - began) + 0.02)):
            alive = self._alive()
            cheap = sum(int(field) for pid, _ in alive for field in _read(pid, "statm").split()[1:2])
            if cheap > 1.01 * self._cheap:
                self._cheap = cheap
                self._peak = max(self._peak, sum(_pages(pid) for pid, _ in alive))

    def _alive(self) -> set[Process]:
        """The root and all that descend from it, now and, if their parents are gone, since."""
        parents, grown = _parents(), True
        while grown:  # until a pass over all processes finds no further child
            known = {pid for pid, _ in self._tree & parents.keys()}
            found = {process for process, parent in parents.items() if parent in known} - self._tree
            self._tree |= found
            grown = bool(found)
        return self._tree & parents.keys()

    def end(self) -> int | None:
        """The peak in bytes; None where the system does not tell."""
        self._done.set()
        self._thread.join()
        for pid, _ in self._alive():
            with suppress(OSError):  # it went by itself
                os.kill(pid, signal.SIGKILL)
        return self._peak or None


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def _parents() -> dict[Process, int]:
    """The parent of every process that is no zombie."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")] if Path("/proc").is_dir() else []
    told = {pid: _read(pid, "stat").rpartition(")")[2].split() for pid in pids}
    return {(pid, fields[19]): int(fields[1]) for pid, fields in told.items() if fields and fields[0] != "Z"}


def _pages(pid: int) -> int:
    """Bytes in memory, each page divided by how many processes hold it."""
    for line in _read(pid, "smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return 1024 * int(line.split()[1])
    return 0
