"""A stage whose clients are devices: each has the ClientApp, dials the server, and keeps its own state."""

from __future__ import annotations

import logging
import math
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import RecordDict

from shoal.flower.compat import APP_RAISED, CRASHED, message_from
from shoal.flower.envelopes import Terms, answer_in, counted_in, header_for, packed
from shoal.flower.places import Places
from shoal.flower.turns import Answer, Turn, failed
from shoal.protos.codec import content_of, decode_envelope
from shoal.protos.errors import CodecError, RunError
from shoal.protos.messages import Failure, Kind
from shoal.serve import Door
from shoal.server.orders import Answered, Blob, Call, Event, Failed, Order
from shoal.server.serving import Serving

__all__ = ["Devices"]

PATIENCE = 1.0  # seconds between two words about devices that come
LOOK = 0.2  # seconds between two looks whether to stop, where nothing happens
LATE = "nobody waits for its answer any more"
OVER = "its answer is here"


@dataclass(frozen=True)
class Published:
    """A message's content: stored once, whoever is sent it."""

    header: bytes
    blob: Blob


@dataclass(eq=False)
class _Asked:
    """One device's turn."""

    turn: Turn
    client: str
    order: Order | None = None
    answer: Answer | None = None
    future: Future[Answer] = field(default_factory=Future)

    def check(self, client: str, content: str, header: bytes, payload: memoryview | None) -> None:
        """In a thread of the server's; what is read here is not read again."""
        if content != "envelope":
            raise CodecError(f"client {client!r} answers a message of a Flower app with {content}")
        envelope = decode_envelope(header, payload, verify=False)
        if payload is not None:
            self.answer = answer_in(envelope, self.turn)


@dataclass(frozen=True)
class _Shelf:
    """Bytes of answers until they are read: a run that is killed begins anew, so nothing is kept beyond that."""

    folder: Path

    def payload(self, nonce: str) -> Path:
        return self.folder / f"{nonce}.payload"

    def take(self, nonce: str, header: bytes, identity: str) -> None:
        return

    def drop(self, nonce: str) -> None:
        for path in self.folder.glob(f"{nonce}.*"):
            path.unlink(missing_ok=True)


class Devices:
    """A :class:`~shoal.flower.stage.Stage`. Listens from the moment it is made; :meth:`begin` waits for the devices.

    ``run`` is the run's name for devices, which keep a state for each; ``nodes`` are the nodes' ids by rank.

    A message that was answered stays known until its device gets the next one: it may not have heard of the receipt.
    """

    workers = 0

    def __init__(self, door: Door, places: Places, run: str, terms: Terms, nodes: Collection[int]) -> None:
        self.places, self._run, self._terms, self._lease = places, run, Blob.of(terms.encode()), door.lease
        self._ranks = {node: rank for rank, node in enumerate(nodes)}
        self._open = ExitStack()
        self.serving: Serving = self._open.enter_context(door.open(places.admit))
        self._asked, self._last, self._lock = dict[str, _Asked](), dict[str, Order](), threading.Lock()
        self._closed = False
        self._shelf: _Shelf | None = None
        self._listening: threading.Thread | None = None

    def begin(self, folder: Path, waiting: Callable[[int], None], hear: Callable[[Event], None]) -> Mapping[int, str]:
        """Wait until there are as many devices as nodes: who is which. ``hear`` gets who comes and goes."""
        folder.mkdir(exist_ok=True)
        self._shelf, self._hear = _Shelf(folder), hear
        hub, said, last = self.serving.hub, -1, -math.inf
        while not self.serving.call(lambda: self.places.settle(hub.present)):
            present, now = self.serving.call(lambda: len(hub.present)), time.monotonic()
            if present != said and now - last > PATIENCE:
                waiting(present)
                said, last = present, now
            self._next()
        waiting(self.places.wanted)
        self._clients = list(self.places.devices)
        self._listening = threading.Thread(target=self._listen, name="shoal-devices", daemon=True)
        self._listening.start()
        return dict(zip(self._ranks, self._clients, strict=True))

    def differs(self, client: str) -> bool:
        """Whether a device's app has other files than the server's."""
        return self.serving.call(self.places.differs, client)

    # --- a stage -----------------------------------------------------------------------------------------------------

    def publish(self, content: RecordDict) -> Published:
        header, buffers = packed(content)
        return Published(header, Blob(content_of(header)[1], buffers))

    def submit(self, turn: Turn, published: Published) -> Future[Answer]:
        rank = self._ranks[turn.metadata.dst_node_id]
        assert self._shelf is not None, "the devices are there"
        asked, nonce = _Asked(turn, self._clients[rank]), secrets.token_hex(8)
        kind = Kind.EVALUATE if turn.metadata.message_type.startswith("evaluate") else Kind.TRAIN
        header = header_for(turn, published.header, rank)
        order = asked.order = Order(
            *(self._run, turn.round, self._terms, header, published.blob, asked.check, self._shelf, self._lease),
            kind=kind,
        )
        with self._lock:
            if self._closed:
                raise RunError("the server has stopped: no device can be asked any more")
            self._asked[nonce] = asked
            before, self._last[asked.client] = self._last.get(asked.client), order
        self.serving.call(self._ask, before, order, Call(nonce, asked.client, counted_in(turn.context.state)))
        return asked.future

    def _ask(self, before: Order | None, order: Order, call: Call) -> None:
        """On the server's loop."""
        self.serving.hub.ask(order, [call])
        if before is not None:
            self.serving.hub.end(before, OVER)

    def together(self) -> AbstractContextManager[None]:
        """It makes no difference here."""
        return nullcontext()

    def abandon(self, futures: Collection[Future[Answer]]) -> None:
        """Withdraw these messages: a device ends the process that is busy with one."""
        wanted = set(futures)
        with self._lock:
            left = [nonce for nonce, asked in self._asked.items() if asked.future in wanted]
            given_up = [self._asked.pop(nonce) for nonce in left]
        for asked in given_up:
            self.serving.call(self.serving.hub.end, asked.order, LATE)
            asked.future.cancel()

    def finish(self) -> None:
        """Let the devices go: the run is over."""
        self._stop()
        self.serving.close(finished=True)

    def close(self) -> None:
        self._stop()
        self._open.close()
        if self._shelf is not None:
            shutil.rmtree(self._shelf.folder, ignore_errors=True)

    def _stop(self) -> None:
        with self._lock:
            self._closed, left = True, list(self._asked.values())
            self._asked.clear()
        if self._listening is not None:
            self._listening.join()
        for asked in left:
            asked.future.cancel()

    # --- what comes back, in a thread of its own: the server's loop must not wait for strategies ----------------------

    def _listen(self) -> None:
        while not self._closed:
            try:
                self._next()
            except Exception:  # of whoever watches; the others go on
                logging.getLogger("shoal").exception("what came from a device could not be told")

    def _next(self) -> None:
        try:
            event = self.serving.events.get(timeout=LOOK)
        except queue.Empty:
            return
        if not isinstance(event, Answered | Failed):
            self._hear(event)
            return
        with self._lock:
            asked = self._asked.pop(event.nonce, None)
        if asked is None:
            return  # it was given up
        if isinstance(event, Answered):
            assert asked.answer is not None and self._shelf is not None, "it was checked"
            self._shelf.drop(event.nonce)
            asked.future.set_result(asked.answer)
        else:
            asked.future.set_result(_told(asked, event.failure))


def _told(asked: _Asked, failure: Failure) -> Answer:
    """The answer of a device that has none; who it is, is said elsewhere."""
    reason = failure.reason.removeprefix(f"client {asked.client!r} ")
    code = CRASHED if failure.kind == "lost" else APP_RAISED
    message = message_from(asked.turn.metadata, content=RecordDict())
    return failed(message, reason, reason, failure.traceback, code)
