"""Worker processes: one single-threaded Python program a core, fed over pipes.

What a worker must know is pickled by value, so functions written in a notebook work. One that dies takes nobody along.
How it is started stands in :mod:`shoal.client.process`.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

from shoal.client.process import answers_on, command, environment, fate, jobs_on
from shoal.protos.errors import RunError, ShoalError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Crew", "Died", "PicklerOfTensors", "open_pipes", "read", "write"]

# --- both sides ------------------------------------------------------------------------------------------------------


def _reduce(tensor: Tensor) -> tuple[Any, ...]:
    import torch

    return torch.from_numpy, (tensor.detach().numpy(),)


class PicklerOfTensors(pickle.Pickler):
    """Tensors as arrays: torch's own pickling of a tensor costs more than training a small client."""

    def __init__(
        self, file: IO[bytes], protocol: int, buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None
    ) -> None:
        torch = sys.modules.get("torch")  # where nobody has imported it there are no tensors
        self.dispatch_table: dict[type, Callable[[Any], Any]] = {} if torch is None else {torch.Tensor: _reduce}
        super().__init__(file, protocol, buffer_callback=buffer_callback)


def write(file: IO[bytes], message: object) -> None:
    """One message between our own processes; never used with a peer."""
    PicklerOfTensors(file, protocol=5).dump(message)
    file.flush()


def read(file: IO[bytes]) -> Any:
    """The next message; EOFError when the other side is gone."""
    return pickle.load(file)


# --- in a worker -----------------------------------------------------------------------------------------------------


def open_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Make this process a worker, which has one thread; the files to read orders from and to write answers to."""
    import torch

    torch.set_num_threads(1)
    return jobs_on(), answers_on()


# --- in the process that has workers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Died:
    """A worker was lost while it had an order: why, in words."""

    reason: str


class Worker:
    """One process that runs ``main`` of the module ``program``; a call is a message and its answer."""

    def __init__(self, program: str, assignment: bytes) -> None:
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment()}
        # A session of its own: Ctrl-C is for the process that has workers, which then ends them.
        self.process: subprocess.Popen[bytes] = subprocess.Popen(command(program), start_new_session=True, **pipes)
        self._in, self._out = cast(IO[bytes], self.process.stdin), cast(IO[bytes], self.process.stdout)
        self._assignment: bytes | None = assignment  # until the worker has taken it
        self._dropped = False

    def ready(self) -> None:
        """Wait until the worker has taken its assignment; RunError with its reason if it cannot."""
        if self._assignment is None:
            return
        try:
            self._in.write(self._assignment)
            self._in.flush()
            answer = read(self._out)
        except (EOFError, OSError) as error:
            raise RunError(f"a worker could not start ({fate(self.process.wait())}); see its messages above") from error
        if isinstance(answer, ShoalError):
            raise answer
        self._assignment = None

    def call(self, order: object) -> Any:
        """The worker's answer, or how it :class:`Died`; also if the order was dropped before it could begin."""
        self.ready()
        if self._dropped:
            self._dropped = False
            return Died("was not ready before its order was dropped")
        try:
            write(self._in, order)
            return read(self._out)
        except (EOFError, OSError, pickle.UnpicklingError):
            return Died(fate(self.process.wait()))

    def drop(self) -> None:
        """Nobody waits any more for the answer to its order: kill it, unless it is not ready yet to begin."""
        self._dropped = True  # before the next line looks, so that one of the two threads sees what the other did
        if self._assignment is None:
            self.process.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):  # what was not sent is of no use to anybody
            self._in.close()
        self._out.close()


class Crew:
    """A fixed number of workers with one assignment. Each takes the next order as soon as it is free.

    They start at once, and take orders when they are :meth:`ready`.
    """

    def __init__(self, program: str, assignment: bytes, workers: int) -> None:
        self._program, self._assignment = program, assignment
        self._workers = [Worker(program, assignment) for _ in range(workers)]
        self._changing, self._closed = threading.Lock(), False
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="shoal-worker")

    def ready(self) -> None:
        """Wait until all have taken their assignment; RunError, and no worker is left, if one cannot."""
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
        if isinstance(answer, Died) and worker.process.poll() is not None:
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
        """Kill the workers that are at an order, which are then replaced; those getting ready for one never begin."""
        idle = set[Worker]()
        while not self._idle.empty():
            idle.add(self._idle.get())
        for worker in self._workers:
            if worker in idle:
                self._idle.put(worker)
            else:
                worker.drop()

    def close(self) -> None:
        with self._changing:
            self._closed = True
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
