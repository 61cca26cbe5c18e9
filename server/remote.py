"""The fleet behind gRPC: real clients, and virtual ones that another process hosts.

The coordinator's thread asks and sums here, the network runs in another (:mod:`shoal.server.serving`). Between the two
go functions to call and events. Answers wait on disk and are summed in cohort order, so a cohort's updates are never in
memory together, and the sum's bits do not depend on who came first.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shoal.protos.codec import content_of, decode_measurement, decode_update, encode
from shoal.protos.errors import CodecError, ShoalError
from shoal.protos.files import mapped
from shoal.protos.messages import Failure, Kind, Task, check_update
from shoal.protos.parameters import Parameters
from shoal.server.fleet import Ask, Part, Report
from shoal.server.orders import Answered, Blob, Event, Failed, Order
from shoal.server.serving import Serving
from shoal.strategies.base import Strategy
from shoal.strategies.sums import contribute

__all__ = ["RemoteFleet", "Terms"]

PATIENCE = 1.0  # seconds between two words about clients that come
LOOK = 0.2  # seconds between two looks whether to stop, where nothing happens
OVER = "the round is over without it"


@dataclass(frozen=True)
class Terms:
    """What a run and its clients agree on. ``lease`` is in seconds."""

    run: str
    assignment: bytes
    strategy: Strategy
    initial: Parameters[Tensor]
    lease: float = 90.0


class RemoteFleet:
    """A :class:`~shoal.server.fleet.Fleet` of the clients that call a server.

    ``first`` are clients' names in the order that the experiment's data gives them: with the same clients the cohorts
    are those of a simulation. ``tell`` hears who comes and goes, in the coordinator's thread.
    """

    def __init__(
        self, serving: Serving, terms: Terms, first: Sequence[str], tell: Callable[[Event], None] = lambda event: None
    ) -> None:
        self._serving, self._terms, self._tell = serving, terms, tell
        self._rank = {client: number for number, client in enumerate(first)}
        self._counted: dict[str, int] = {}
        self._round = 0
        self._assignment = Blob.of(terms.assignment)

    @property
    def population(self) -> Sequence[str]:
        """Every client that ever joined this run, whether it is connected or not."""
        known = self._serving.call(lambda: list(self._serving.hub.known))
        return self._ordered({*known, *self._counted})

    @property
    def reachable(self) -> Sequence[str]:
        return self._ordered(self._serving.call(lambda: set(self._serving.hub.present)))

    def _ordered(self, clients: Collection[str]) -> Sequence[str]:
        return sorted(clients, key=lambda client: (self._rank.get(client, len(self._rank)), client))

    def wait_for(self, count: int, waiting: Callable[[int], None], stopping: Callable[[], bool]) -> None:
        """Until ``count`` clients are connected; ``waiting`` is told how many are, now and then."""
        said, last = -1, -math.inf
        while not stopping():
            present, now = len(self.reachable), time.monotonic()
            if present != said and (present >= count or now - last > PATIENCE):
                waiting(present)
                said, last = present, now
            if present >= count:
                return
            self._next()

    # --- asking ------------------------------------------------------------------------------------------------------

    def train(self, ask: Ask) -> Iterator[Part]:
        self._round = ask.context.round
        order, arrived = self._order(ask, Kind.TRAIN), dict[int, Answered | Failure]()
        counted, position = 0, 0
        try:
            with closing(self._answers(order, ask.cohort)) as answers:
                for place, answer in answers:
                    arrived[place] = answer
                    while position in arrived:  # what stands next in the cohort's order need not wait
                        yield self._part(ask, order, position, arrived.pop(position))
                        position += 1
                    counted += isinstance(answer, Answered)
                    if counted == ask.goal:
                        break
            for place in sorted(arrived):
                yield self._part(ask, order, place, arrived.pop(place))
        finally:  # a round may be given up half way
            for answer in arrived.values():
                _drop(answer)

    def evaluate(self, ask: Ask) -> Iterator[Report | Failure]:
        answers = self._answers(self._order(ask, Kind.EVALUATE), ask.cohort)
        found = {place: answer if isinstance(answer, Failure) else _measured(answer) for place, answer in answers}
        for _, measured in sorted(found.items()):
            if isinstance(measured, Failure) or measured.numbers:  # who holds nothing out has nothing to say
                yield measured

    def _answers(self, order: Order, cohort: Sequence[str]) -> Generator[tuple[int, Answered | Failure], None, None]:
        """Each client's answer with its place in the cohort, as they come; at the end what is left is withdrawn."""
        hub = self._serving.hub
        nonces = self._serving.call(hub.ask, order, {client: self._counted.get(client, 0) for client in cohort})
        places = {nonces[client]: place for place, client in enumerate(cohort)}
        try:
            while places:
                event = self._next()
                if isinstance(event, Answered | Failed) and event.nonce in places:
                    yield places.pop(event.nonce), event if isinstance(event, Answered) else event.failure
                else:
                    _drop(event)  # came when its round was over
        finally:
            self._serving.call(hub.end, order, OVER)
            self._clear()

    def _order(self, ask: Ask, kind: Kind) -> Order:
        terms, round = self._terms, ask.context.round
        sent = terms.strategy.send(ask.state)
        model = Parameters(
            terms.initial.layout, sent.parameters, ask.carried.buffers, ask.carried.counters, {}, terms.initial.frozen
        )
        reply = terms.strategy.reply(sent)
        task = Task(
            kind,
            round,
            round if kind is Kind.EVALUATE else round - 1,
            model.map(_to_numpy),
            {name: _to_numpy(tensor) for name, tensor in sent.tensors.items()},
            sent.settings,
            reply,
        )
        header, buffers = encode(task)
        _, sha256, _ = content_of(header)
        layout = model.layout

        def check(client: str, content: str, header: bytes, payload: memoryview | None) -> None:
            if content == "update" and kind is Kind.TRAIN:
                update = decode_update(header, payload, verify=False)
                check_update(update, layout, reply, client, round, values=payload is not None)
            elif content == "measurement" and kind is Kind.EVALUATE:
                decode_measurement(header)
            else:
                raise CodecError(f"client {client!r} answers the task to {kind} with {content}; run the same version")

        ends = None if ask.deadline is None else time.monotonic() + ask.deadline
        return Order(terms.run, round, self._assignment, header, Blob(sha256, buffers), check, terms.lease, ends)

    def _next(self) -> Event | None:
        """The next event, or None after a moment: the caller's thread must be able to hear an interrupt."""
        try:
            event = self._serving.events.get(timeout=LOOK)
        except queue.Empty:
            return None
        if not isinstance(event, Answered | Failed):
            self._tell(event)
        return event

    def _clear(self) -> None:
        """Drop answers that came when enough others had: no later round may find them."""
        while not self._serving.events.empty():
            _drop(self._next())

    # --- answers -----------------------------------------------------------------------------------------------------

    def _part(self, ask: Ask, order: Order, position: int, answer: Answered | Failure) -> Part:
        if isinstance(answer, Failure):
            return Part(position, None, (), [answer])
        try:
            update = decode_update(answer.header, mapped(answer.path), verify=False).map(_to_tensor)
            total = contribute(self._terms.strategy, ask.state, update, ask.context)
        except ShoalError as error:
            return Part(position, None, (), [Failure(answer.client, ask.context.round, str(error))])
        finally:
            _drop(answer)
        down, up = order.payload.content.total_bytes, content_of(answer.header)[2]
        return Part(position, total, [Report.of(answer.client, update, down, up)])

    # --- clients' states: they keep their own, the server knows of which round the true one is ------------------------

    def settle(self, counted: Collection[str]) -> None:
        self._counted.update(dict.fromkeys(counted, self._round))

    def keep_in(self, folder: Path) -> None:
        """Nothing is kept here."""

    def snapshot(self) -> Mapping[str, int]:
        return {client: self._counted.get(client, 0) for client in self.population}

    def restore(self, note: Mapping[str, int]) -> None:
        self._counted = dict(note)

    def close(self) -> None:
        """Nothing: the server goes on with the next run."""


def _measured(answer: Answered) -> Report:
    _drop(answer)
    return Report(answer.client, decode_measurement(answer.header).metrics)


def _drop(what: Event | Failure | None) -> None:
    """An answer that is done with gives its place on disk back."""
    if isinstance(what, Answered):
        what.path.unlink(missing_ok=True)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _to_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy())  # the bytes on disk go, and torch wants memory that may be written
