"""Worker processes: one single-threaded Python program a core, fed over pipes.

A worker is started as a plain Python program, not forked (threads and locks do not survive a fork) and not through
``multiprocessing`` (which would import the user's script again); what it must know is pickled by value, so
functions written in a notebook work. A worker that dies takes nobody along.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, cast

import torch
from torch import Tensor

from shoal.protos.errors import RunError, ShoalError

__all__ = ["Crew", "Died", "cores", "open_answers", "read", "write"]

# A worker must see the caller's import paths before it imports anything, and never the folder it starts in.
START = "import sys; sys.path[:] = {path!r}; from {program} import main; main()"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# glibc gives large blocks back to the system and faults them in again at every step; other systems ignore these names.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**28), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- both sides ------------------------------------------------------------------------------------------------------


def _reduce(tensor: Tensor) -> tuple[Any, ...]:
    return torch.from_numpy, (tensor.detach().numpy(),)


class _Pickler(pickle.Pickler):
    """Tensors as arrays: torch's own pickling of a tensor costs more than training a small client."""

    dispatch_table = {Tensor: _reduce}  # noqa: RUF012  (pickle reads it from the class)


def write(file: IO[bytes], message: object) -> None:
    """One message between our own processes; never used with a peer."""
    _Pickler(file, protocol=5).dump(message)
    file.flush()


def read(file: IO[bytes]) -> Any:
    """The next message; EOFError when the other side is gone."""
    return pickle.load(file)


# --- in a worker -----------------------------------------------------------------------------------------------------


def open_answers() -> IO[bytes]:
    """Make this process a worker: single-threaded, gone with its parent; the file to write answers to."""
    # The pipe is for messages; what a user's code prints must not get between them.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    return answers


def _end_with(parent: int) -> None:
    """Leave when the parent is gone, even if a client's code never returns to read the pipe."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


# --- in the process that has workers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Died:
    """A worker was lost while it had an order: why, in words."""

    reason: str


class Worker:
    """One process that runs ``main`` of the module ``program``; a call is a message and its answer."""

    def __init__(self, program: str, assignment: bytes) -> None:
        command = [sys.executable, "-c", START.format(path=sys.path, program=program)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | ONE_THREAD | KEEP_MEMORY}
        # A session of its own: Ctrl-C is for the process that has workers, which then ends them.
        self.process: subprocess.Popen[bytes] = subprocess.Popen(command, start_new_session=True, **pipes)
        self._in, self._out = cast(IO[bytes], self.process.stdin), cast(IO[bytes], self.process.stdout)
        self._assignment: bytes | None = assignment  # until it is sent

    def ready(self) -> None:
        """Wait until the worker has taken its assignment; RunError with its reason if it cannot."""
        if self._assignment is None:
            return
        try:
            self._in.write(self._assignment)
            self._in.flush()
            answer = read(self._out)
        except (EOFError, OSError) as error:
            raise RunError(f"a worker could not start ({self._fate()}); see its messages above") from error
        if isinstance(answer, ShoalError):
            raise answer
        self._assignment = None

    def call(self, order: object) -> Any:
        """The worker's answer, or how it :class:`Died`."""
        self.ready()
        try:
            write(self._in, order)
            return read(self._out)
        except (EOFError, OSError, pickle.UnpicklingError):
            return Died(self._fate())

    def _fate(self) -> str:
        code = self.process.wait()
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):  # what was not sent is of no use to anybody
            self._in.close()
        self._out.close()


class Crew:
    """A fixed number of workers with one assignment. Each takes the next order as soon as it is free."""

    def __init__(self, program: str, assignment: bytes, workers: int) -> None:
        self._program, self._assignment = program, assignment
        self._workers = [Worker(program, assignment) for _ in range(workers)]
        self._changing, self._closed = threading.Lock(), False
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="shoal-worker")
        try:
            for worker in self._workers:
                worker.ready()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    def submit(self, order: object) -> Future[Any]:
        """The answer to come of whichever worker is free, or how it :class:`Died`; another one takes its place."""
        return self._threads.submit(self._call, order)

    def _call(self, order: object) -> Any:
        worker = self._idle.get()
        answer = worker.call(order)
        if isinstance(answer, Died):
            worker = self._replace(worker)
        self._idle.put(worker)
        return answer

    def _replace(self, dead: Worker) -> Worker:
        dead.kill()
        with self._changing:  # or a crew that closes would leave the new one behind
            if self._closed:
                return dead
            fresh = Worker(self._program, self._assignment)  # gets ready while the work goes on
            self._workers[self._workers.index(dead)] = fresh
        return fresh

    def kill_busy(self) -> None:
        """Kill the workers that have an order, which are then replaced."""
        idle = set[Worker]()
        while not self._idle.empty():
            idle.add(self._idle.get())
        for worker in self._workers:
            if worker in idle:
                self._idle.put(worker)
            else:
                worker.process.kill()

    def close(self) -> None:
        with self._changing:
            self._closed = True
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
