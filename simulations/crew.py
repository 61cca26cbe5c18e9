"""Worker processes: one single-threaded Python program a core, fed over pipes.

What a worker must know is pickled by value, so functions written in a notebook work. One that dies takes nobody along.
How it is started stands in :mod:`shoal.simulations.nursery`.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import sys
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Literal

from shoal.client.process import answers_on, fate, jobs_on
from shoal.protos.errors import ShoalError
from shoal.simulations import nursery

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
        # Where nobody has imported PyTorch, or another thread is at it, there are no tensors.
        tensor = getattr(sys.modules.get("torch"), "Tensor", None)
        self.dispatch_table: dict[type, Callable[[Any], Any]] = {} if tensor is None else {tensor: _reduce}
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
    """One process that runs ``main`` of the module ``program``; an order is a message, and so is its answer."""

    def __init__(self, program: str, assignment: bytes) -> None:
        self._program, self._steps = program, nursery.steps(program)
        self.process, self._in, self._out = nursery.start(program)
        self._assignment: bytes | None = assignment  # until it has been sent
        self._is_ready = False
        self._does: Literal["nothing", "prepare", "work", "forget"] = "nothing"
        self._changing = threading.Lock()
        self._used = False
        self.lost = False  # if so, another one must take its place

    @property
    def outdated(self) -> bool:
        """Whether the next one would find more, and nothing has been begun in this one."""
        return not self._used and self._steps < nursery.steps(self._program)

    def assign(self) -> None:
        """Give it its assignment. It is gone if it cannot be given: :meth:`ready` says how."""
        if self._assignment is not None:
            with contextlib.suppress(OSError):
                self._in.write(self._assignment)
                self._in.flush()
            self._assignment = None

    def ready(self) -> None:
        """Wait until the worker has taken its assignment; RunError with its reason if it cannot."""
        self.assign()
        if self._is_ready:
            return
        try:
            answer = read(self._out)
        except (EOFError, OSError) as error:
            raise nursery.not_started(self.process.wait()) from error
        if isinstance(answer, ShoalError):
            raise answer
        self._is_ready = True

    def prepare(self) -> None:
        """It is about to be sent an order."""
        self._does, self._used = "prepare", True

    def send(self, order: object) -> bool:
        """Let it begin as soon as it is ready. False if the order was dropped before."""
        self.ready()
        with self._changing:
            begins = self._does == "prepare"
            self._does = "work" if begins else "nothing"
        if begins:
            with contextlib.suppress(OSError):  # it is gone: answer() says how
                write(self._in, order)
        return begins

    def answer(self) -> Any:
        """Its answer to what it was sent, or how it :class:`Died`."""
        try:
            return read(self._out)
        except (EOFError, OSError, pickle.UnpicklingError):
            self.lost = True
            return Died(fate(self.process.wait()))
        finally:
            with self._changing:
                self._does = "nothing"

    def drop(self) -> None:
        """Nobody waits any more for the answer to its order: kill it, or let it forget what it has not begun."""
        with self._changing:
            if self._does == "work":
                self.lost = True
                self.process.kill()
            elif self._does == "prepare":
                self._does = "forget"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):  # what was not sent is of no use to anybody
            self._in.close()
        self._out.close()


@dataclass(eq=False)
class _Call:
    """An order and its answer to come."""

    order: object
    answer: Future[Any] = field(default_factory=Future)


class Crew:
    """A fixed number of workers with one assignment. Each takes the next order as soon as it is free.

    They take orders when they are :meth:`ready`. Each has a thread that talks to it.
    """

    def __init__(self, program: str, assignment: bytes, workers: int) -> None:
        nursery.begin(program)
        self._program, self._assignment = program, assignment
        self._workers = list[Worker]()
        self._changing, self._closed = threading.Lock(), False
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._begun = dict[Future[Any], Worker]()
        self._threads = [
            threading.Thread(target=self._drive, args=[place], name=f"shoal-worker-{place}", daemon=True)
            for place in range(workers)
        ]

    def do(self, function: str) -> None:
        """Let this ``module:function`` be called for all workers that have not begun anything yet. Does not wait."""
        nursery.do(self._program, function)

    def ready(self) -> None:
        """Wait until all have taken their assignment; RunError, and no worker is left, if one cannot."""
        try:
            for _ in self._threads:
                self._workers.append(Worker(self._program, self._assignment))
            for worker in self._workers:
                worker.assign()
            for worker in self._workers:
                worker.ready()
        except BaseException:
            self.close()
            raise
        for thread in self._threads:
            thread.start()

    def submit(self, order: object) -> Future[Any]:
        """The answer to come of whichever worker is free, or how it :class:`Died`; another one takes its place."""
        call = _Call(order)
        self._calls.put(call)
        return call.answer

    def _drive(self, place: int) -> None:
        call = self._next(place)
        while call is not None:
            following = self._finish(place, call)
            del call  # or its answer would live until there is another one
            call = following or self._next(place)

    def _next(self, place: int, wait: bool = True) -> _Call | None:
        """The call that the worker has begun; None if there is none, or will be none."""
        while True:
            try:
                call = self._calls.get(wait)
            except queue.Empty:
                return None
            if call is None:
                self._calls.put(None)  # for the others
                return None
            if not call.answer.set_running_or_notify_cancel():
                continue
            found = self._begin(place, call)
            if found is None:
                return call
            _give(call.answer, found)

    def _begin(self, place: int, call: _Call) -> Any:
        """Send the order. None, or why it has not begun."""
        try:
            if self._workers[place].lost or self._workers[place].outdated:
                self._replace(place)
            worker = self._workers[place]
            with self._changing:
                self._begun[call.answer] = worker
                worker.prepare()
            if worker.send(call.order):
                return None
            found: Any = Died("was not ready before its order was dropped")
        except Exception as error:
            found = error
        with self._changing:
            self._begun.pop(call.answer, None)
        return found

    def _finish(self, place: int, call: _Call) -> _Call | None:
        """Give the answer. The worker is at its next order by then, if there is one: giving may take a while."""
        worker = self._workers[place]
        try:
            found = worker.answer()
        except Exception as error:
            found = error
        with self._changing:  # from now on nobody kills it for this order
            del self._begun[call.answer]
        following = None
        if worker.lost:  # it would be a while until another one is ready
            with contextlib.suppress(Exception):  # the next order tries again, and says why not
                self._replace(place)
        else:
            following = self._next(place, wait=False)
        _give(call.answer, found)
        return following

    def _replace(self, place: int) -> None:
        self._workers[place].kill()
        worker = Worker(self._program, self._assignment)
        with self._changing:
            if not self._closed:
                self._workers[place] = worker
                return
        worker.kill()

    def kill(self, answers: Collection[Future[Any]]) -> None:
        """Kill the workers that are at these orders, which are then replaced; who gets ready for one never begins."""
        with self._changing:
            for worker in filter(None, map(self._begun.get, answers)):
                worker.drop()

    def close(self) -> None:
        with self._changing:
            self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                if (call := self._calls.get(False)) is not None:
                    call.answer.cancel()
        self._calls.put(None)
        for worker in self._workers:
            worker.kill()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()


def _give(answer: Future[Any], found: Any) -> None:
    if isinstance(found, Exception):
        answer.set_exception(found)
    else:
        answer.set_result(found)
