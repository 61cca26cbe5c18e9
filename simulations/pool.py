"""Worker processes: one single-threaded engine a core, fed over pipes.

A worker is started as a plain Python program, not forked (threads and locks do not survive a fork) and not through
``multiprocessing`` (which would import the user's script again); what it must know is pickled by value, so
functions written in a notebook work. A worker that dies takes down neither the run nor its neighbours' clients.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import IO, Any, cast

import torch
from torch import Tensor

from shoal.protos.errors import RunError, ShoalError
from shoal.simulations.engine import Assignment, Job, Result
from shoal.simulations.packing import pack
from shoal.simulations.shared import SharedBlock
from shoal.strategies.base import State
from shoal.strategies.sums import Carried

__all__ = ["Died", "Order", "Pool", "read", "write"]

# A worker must see the caller's import paths before it imports anything, and never the folder it starts in.
START = "import sys; sys.path[:] = {path!r}; from shoal.simulations.worker import main; main()"
GRACE = 0.5  # seconds after the deadline: for the answer of a worker that kept it
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# glibc gives large blocks back to the system and faults them in again at every step; other systems ignore these names.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**28), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


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


@dataclass(frozen=True)
class Died:
    """A worker was lost while it had a job: why, in words."""

    reason: str


@dataclass(frozen=True)
class Order:
    """A job and where its state lies: vectors in shared memory, numbers in the message."""

    job: Job
    block: SharedBlock
    numbers: dict[str, float]
    seconds: float | None = None


class Worker:
    """One process; a call is a message and its answer."""

    def __init__(self, assignment: bytes) -> None:
        command = [sys.executable, "-c", START.format(path=sys.path)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | ONE_THREAD | KEEP_MEMORY}
        # A session of its own: Ctrl-C is for the coordinator, which then ends its workers.
        self.process: subprocess.Popen[bytes] = subprocess.Popen(command, start_new_session=True, **pipes)
        self._in, self._out = cast(IO[bytes], self.process.stdin), cast(IO[bytes], self.process.stdout)
        self._assignment: bytes | None = assignment  # until it is sent

    def ready(self) -> None:
        """Wait until the worker has built its engine; RunError with its reason if it cannot."""
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

    def call(self, order: Order) -> Result | Died:
        self.ready()
        try:
            write(self._in, order)
            return cast(Result, read(self._out))
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


class Pool:
    """A fixed number of workers. Each takes the next job as soon as it is free."""

    def __init__(self, assignment: Assignment, workers: int) -> None:
        self._assignment, self._data = pack(assignment)
        self.workers = workers
        self._workers = [Worker(self._assignment) for _ in range(workers)]
        self._changing, self._closed = threading.Lock(), False
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="shoal-worker")
        self._block: SharedBlock | None = None
        try:
            for worker in self._workers:
                worker.ready()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Sequence[Job], state: State, carried: Carried) -> Iterator[tuple[Job, Result | Died]]:
        """Each job's result as it comes. A worker busy well beyond the deadline is killed and replaced."""
        numbers = self._publish(state, carried)
        assert self._block is not None
        waiting, running, overdue = deque(jobs), dict[Future[Result | Died], Job](), False
        try:
            while waiting or running:
                while waiting and len(running) < len(self._workers):
                    job = waiting.popleft()
                    if (left := job.left()) is not None and left <= 0:
                        yield job, Died("not begun before the deadline")
                        continue
                    running[self._threads.submit(self._call, Order(job, self._block, numbers))] = job
                patience = _patience(running.values()) if not overdue else None
                done, _ = wait(running, timeout=patience, return_when=FIRST_COMPLETED)
                if not done:
                    overdue = True  # once: what is running then is a replacement on its way
                    self._kill_busy()
                for future in done:
                    yield running.pop(future), future.result()
        except BaseException:
            self._kill_busy()  # the caller has lost interest: nothing may linger on an old round
            raise

    def _call(self, order: Order) -> Result | Died:
        worker = self._idle.get()
        answer = worker.call(replace(order, seconds=order.job.left()))
        if isinstance(answer, Died):
            worker = self._replace(worker)
        self._idle.put(worker)
        return answer

    def _replace(self, dead: Worker) -> Worker:
        dead.kill()
        with self._changing:  # or a pool that closes would leave the new one behind
            if self._closed:
                return dead
            fresh = Worker(self._assignment)  # gets ready while the round goes on
            self._workers[self._workers.index(dead)] = fresh
        return fresh

    def _kill_busy(self) -> None:
        idle = set[Worker]()
        while not self._idle.empty():
            idle.add(self._idle.get())
        for worker in self._workers:
            if worker in idle:
                self._idle.put(worker)
            else:
                worker.process.kill()

    def _publish(self, state: State, carried: Carried) -> dict[str, float]:
        """Put the round's vectors where workers see them; the numbers are returned."""
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        tensors |= {"/buffers": carried.buffers, "/counters": carried.counters}
        if self._block is not None and self._block.fits(tensors):
            self._block.fill(tensors)
        else:
            self._block = SharedBlock.of(tensors)
        return {name: value for name, value in state.items() if not isinstance(value, Tensor)}

    def close(self) -> None:
        with self._changing:
            self._closed = True
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        self._data.close()
        if self._block is not None:
            self._block.close()
            self._block = None


def _patience(jobs: Iterable[Job]) -> float | None:
    """Seconds to wait for workers, which end a job themselves at its deadline, unless a client hangs."""
    left = [seconds for job in jobs if (seconds := job.left()) is not None]
    return max(0.0, min(left) + GRACE) if left else None
