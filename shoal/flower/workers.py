"""ClientApps in worker processes: an app that ends or hangs takes nobody along, its process is replaced."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from flwr.app import RecordDict

from shoal.flower.app import App
from shoal.flower.arrays import Lent, lent_in, unpack
from shoal.flower.arrays import pack as pack_arrays
from shoal.flower.flat import flat_turn, full
from shoal.flower.stage import give, opened
from shoal.flower.starting import WORKER
from shoal.flower.turns import Answer, Turn
from shoal.simulations.answers import Answer as Packed
from shoal.simulations.answers import Answers
from shoal.simulations.crew import Crew, Died
from shoal.simulations.packing import pack
from shoal.simulations.shared import SharedBytes, SharedMemory

__all__ = ["Order", "SharedContent", "Workers"]

QUANTUM, LEAST, MOST = 0.005, 0.001, 32  # seconds that one call takes, at least if others wait; and its turns
PATIENCE = 1.0  # seconds that turns wait for one that is in their call


class SharedContent:
    """A message's content in shared memory: what many are sent is written once."""

    def __init__(self, content: RecordDict) -> None:
        pickled, buffers = pack_arrays(content)
        self._bytes = SharedBytes([pickled, *buffers])

    @property
    def path(self) -> Path:
        return self._bytes.path

    def open(self) -> RecordDict:
        """In another process: the content, in memory of its own."""
        pickled, *buffers = self._bytes.read()
        return cast(RecordDict, unpack(pickled, buffers))


# A turn as plain values, where its content lies, and memory that is lent for what it answers.
Order = tuple[tuple[Any, ...], SharedContent, SharedMemory | None]


@dataclass(eq=False)
class _Ask:
    """A turn and its answer to come. One is ``alone`` if it may keep others waiting, or if a process was lost with it.

    While a worker has it ``memory`` is lent for the answer's arrays.
    """

    turn: Turn
    content: SharedContent
    answer: Future[Answer] = field(default_factory=Future)
    alone: bool = False
    memory: SharedMemory | None = None

    @property
    def kind(self) -> tuple[str, int]:
        """What is asked of which node."""
        return self.turn.metadata.message_type, self.turn.context.node_id

    def order(self, memory: SharedMemory | None) -> Order:
        self.memory = memory
        return flat_turn(self.turn), self.content, memory


class Workers:
    """``workers`` processes, each with this app.

    Turns that take less than it takes to ask for them go several at a time, so many that these take ``QUANTUM``. If one
    of these takes longer than ``PATIENCE``, or for ever, they begin again, each alone.
    """

    def __init__(self, app: App, run_id: int, workers: int) -> None:
        packed, self._data = pack((app, run_id))
        self._waiting, self._changing = deque[_Ask](), threading.RLock()
        self._calls = dict[Future[Any], list[_Ask]]()
        self._over, self._held = threading.Event(), 0
        self._workers, self._seconds = workers, dict[str, float]()  # that a turn takes, by what is asked
        self._apart = set[tuple[str, int]]()  # turns that have taken long, or a process with them
        self._answers, self._lent = Answers(), list[weakref.ref[Lent]]()
        self._crew = Crew(WORKER, packed, workers)
        self._herald = _Herald(self._crew)

    def ready(self) -> None:
        """Wait until all processes have the app; ExperimentError says why one cannot load it."""
        self._crew.ready()
        threading.Thread(target=self._watch, name="shoal-watch", daemon=True).start()

    def publish(self, content: RecordDict) -> SharedContent:
        """What is left of earlier replies gets bytes of its own: who keeps a little must not hold all their memory."""
        with self._changing:
            kept, self._lent = self._lent, []
        for array in filter(None, (reference() for reference in kept)):
            array.own()
        return SharedContent(content)

    def submit(self, turn: Turn, published: SharedContent) -> Future[Answer]:
        ask = _Ask(turn, published)
        with self._changing:
            ask.alone = ask.kind in self._apart
            self._waiting.append(ask)
        self._begin()
        return ask.answer

    @contextmanager
    def together(self) -> Iterator[None]:
        """How many go in a call follows from how many wait."""
        with self._changing:
            self._held += 1
        try:
            yield
        finally:
            with self._changing:
                self._held -= 1
            self._begin()

    def _begin(self) -> None:
        """Give the crew what waits: one call more than a worker does at a time, so that none waits for this process."""
        while True:
            with self._changing:
                if not self._waiting or self._over.is_set() or self._held or len(self._calls) >= 2 * self._workers:
                    return
                asks = self._some()
                call = self._crew.submit([ask.order(self._answers.lend()) for ask in asks])
                self._calls[call] = asks
            call.add_done_callback(self._done)

    def _some(self) -> list[_Ask]:
        fair, first = -(-len(self._waiting) // (2 * self._workers)), self._waiting.popleft()
        asks, kind = [first], first.kind[0]
        seconds = self._seconds.get(kind, QUANTUM)
        least = LEAST / seconds if fair > 1 else 1
        most = 1 if first.alone else min(max(fair, least), MOST, QUANTUM / seconds)
        while len(asks) < most and self._waiting:
            if self._waiting[0].alone or self._waiting[0].kind[0] != kind:
                break
            asks.append(self._waiting.popleft())
        return asks

    def _done(self, call: Future[Any]) -> None:
        found: Any = Died("cancelled") if call.cancelled() else call.exception() or call.result()
        lost = isinstance(found, Died | Exception)
        with self._changing:
            asks = self._calls.pop(call)
            if self._over.is_set():  # its process was ended, not lost
                for ask in asks:
                    ask.answer.cancel()
                return
            again = lost and (call.cancelled() or len(asks) > 1)
            for ask in asks if lost else ():
                self._answers.back(ask.memory)
            if again:
                for ask in asks:
                    ask.alone = ask.alone or not call.cancelled()
                self._waiting.extendleft(ask for ask in reversed(asks) if not ask.answer.cancelled())
            else:
                self._learn(asks, None if lost else found[0])
        if not again:
            answers = [found] * len(asks) if lost else found[1]
            for ask, answer in zip(asks, answers, strict=True):
                give(ask.answer, opened(answer, ask.turn, partial(self._opened, memory=ask.memory)))
        self._begin()

    def _learn(self, asks: Sequence[_Ask], seconds: float | None) -> None:
        """How long turns take, and which must go alone: ``seconds`` is None if their process was lost."""
        first = asks[0]
        if len(asks) == 1 and (seconds is None or seconds > PATIENCE):
            self._apart.add(first.kind)
        elif first.alone:
            self._apart.discard(first.kind)
        if seconds is not None and not first.alone:
            self._seconds[first.kind[0]] = max(1e-6, seconds / len(asks))

    def _watch(self) -> None:
        before = set[Future[Any]]()
        while not self._over.wait(PATIENCE):
            with self._changing:
                running = {call for call, asks in self._calls.items() if len(asks) > 1 and call.running()}
            self._crew.kill(running & before)
            before = running - before

    def _opened(self, packed: Packed | tuple[Any, ...], memory: SharedMemory | None) -> Answer:
        """The answer, large arrays in the memory that was lent; but a node's state stays, and has bytes of its own."""
        if not isinstance(packed, Packed):
            self._answers.back(memory)
            return full(packed)
        answer = full(self._answers.open(packed, memory))
        if packed.places and answer.state is not None:
            for array in lent_in(answer.state):
                array.own()
        if packed.places and answer.reply.has_content():
            self._lent.extend(weakref.ref(array) for array in lent_in(answer.reply.content))
        return answer

    def abandon(self, futures: Collection[Future[Answer]]) -> None:
        """End the processes that are busy with them; what else these were doing begins again."""
        for future in futures:
            future.cancel()
        with self._changing:
            self._waiting = deque(ask for ask in self._waiting if not ask.answer.cancelled())
            hit = [call for call, asks in self._calls.items() if any(ask.answer.cancelled() for ask in asks)]
            self._apart |= {ask.kind for call in hit for ask in self._calls[call] if ask.answer.cancelled()}
        begun = [call for call in hit if not call.cancel()]  # those that are cancelled are done, and begin again
        self._crew.kill(begun)

    def close(self) -> None:
        self._over.set()
        self._herald.rest()
        self._crew.close()
        self._data.close()
        self._answers.close()


class _Herald(MetaPathFinder):
    """When this process imports PyTorch, it is imported for the workers, too: they will hardly do without."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        if "torch" in sys.modules:
            self._tell()
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "torch":
            self._tell()

    def _tell(self) -> None:
        self._crew.do("shoal.flower.uncompiled:import_torch")

    def rest(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
