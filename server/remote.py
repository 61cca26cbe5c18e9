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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.protos.codec import content_of, decode_measurement, decode_update, encode
from shoal.protos.errors import CodecError, ShoalError
from shoal.protos.files import mapped
from shoal.protos.messages import Failure, Kind, Task, check_update
from shoal.protos.parameters import Parameters
from shoal.server.fleet import Ask, Part, Report
from shoal.server.journal import Asked, Journal
from shoal.server.orders import Answered, Blob, Call, Event, Failed, Order
from shoal.server.patience import at_once
from shoal.server.serving import Serving
from shoal.strategies.base import Strategy
from shoal.strategies.sums import contribute

__all__ = ["Member", "RemoteFleet", "Terms"]

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


@dataclass(frozen=True)
class Member:
    """One of a round's cohort. ``header`` is its answer's, if one was taken; ``identity`` is ``""`` without TLS."""

    client: str
    nonce: str
    identity: str
    header: bytes | None


class RemoteFleet:
    """A :class:`~shoal.server.fleet.Fleet` of the clients that call a server.

    The ``journal`` keeps each round until the next one begins: by then there must be a checkpoint of it. ``first`` are
    clients' names in the order that the experiment's data gives them: with the same clients the cohorts are those of a
    simulation. ``tell`` hears who comes and goes, in the coordinator's thread.
    """

    def __init__(
        self,
        serving: Serving,
        terms: Terms,
        journal: Journal,
        first: Sequence[str] = (),
        tell: Callable[[Event], None] = lambda event: None,
        patience: Callable[[Callable[[], Any]], Any] = at_once,
    ) -> None:
        self._serving, self._terms, self._journal, self._tell, self._patience = serving, terms, journal, tell, patience
        self._rank = {client: number for number, client in enumerate(first)}
        self._counted: dict[str, int] = {}
        # Who was there before this server was, and has a lease's time to come back.
        self._expected, self._until = set(journal.present()), time.monotonic() + terms.lease
        self._round = 0
        self._assignment = Blob.of(terms.assignment)

    @property
    def population(self) -> Sequence[str]:
        """The clients that the hub knows or that were counted, whether they are connected or not."""
        known = self._serving.call(lambda: list(self._serving.hub.known))
        return self._ordered({*known, *self._counted, *self._expected})

    @property
    def reachable(self) -> Sequence[str]:
        hub = self._serving.hub
        known, present = self._serving.call(lambda: (set(hub.known), set(hub.present)))
        back = self._expected - known if time.monotonic() < self._until else set[str]()
        return self._ordered(present | back)

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

    def recall(self, round: int) -> tuple[Sequence[str], int] | None:
        asked = self._journal.recall(round, Kind.TRAIN)
        return None if asked is None else (asked.cohort, asked.population)

    def members(self, round: int) -> Sequence[Member]:
        """The cohort that was asked to train in a round of which the journal still knows, in its order."""
        asked = self._journal.recall(round, Kind.TRAIN)
        if asked is None:
            return []
        known, taken = self._serving.call(lambda: dict(self._serving.hub.known)), asked.taken
        return [
            Member(client, nonce, asked.proven.get(nonce, known.get(client, "")), taken.get(nonce))
            for client, nonce in zip(asked.cohort, asked.nonces, strict=True)
        ]

    def train(self, ask: Ask) -> Iterator[Part]:
        self._round = ask.context.round
        self._patience(lambda: self._journal.forget(self._round))
        order, arrived = self._order(ask, Kind.TRAIN), dict[int, Answered | Failure]()
        counted, position = 0, 0
        with closing(self._answers(order, ask, Kind.TRAIN)) as answers:
            for place, answer in answers:
                arrived[place] = answer
                counted += isinstance(answer, Answered)
                # What stands next in the cohort's order need not wait; what seems to be enough is looked at before
                # the others are let go.
                while position in arrived or (arrived and counted == ask.goal):
                    position = position if position in arrived else min(arrived)
                    taken = arrived.pop(position)
                    part = self._part(ask, order, position, taken)
                    counted -= isinstance(taken, Answered) and not part.reports
                    yield part
                    position += 1
                if counted == ask.goal:
                    break
        for place in sorted(arrived):
            yield self._part(ask, order, place, arrived.pop(place))

    def evaluate(self, ask: Ask) -> Iterator[Report | Failure]:
        answers = self._answers(self._order(ask, Kind.EVALUATE), ask, Kind.EVALUATE)
        found = {place: answer if isinstance(answer, Failure) else _measured(answer) for place, answer in answers}
        for _, measured in sorted(found.items()):
            if isinstance(measured, Failure) or measured.numbers:  # who holds nothing out has nothing to say
                yield measured

    def _answers(self, order: Order, ask: Ask, kind: Kind) -> Generator[tuple[int, Answered | Failure], None, None]:
        """Each client's answer with its place in the cohort, as they come; at the end what is left is withdrawn.

        Those that came before this process was come first. Failures are not kept: their clients are asked again.
        """
        hub, population, present = self._serving.hub, ask.context.population, self.reachable
        asked: Asked = self._patience(lambda: self._journal.open(order.round, kind, ask.cohort, population, present))
        named = list(zip(asked.nonces, asked.cohort, strict=True))
        calls = [Call(nonce, client, self._counted.get(client, 0), nonce in asked.taken) for nonce, client in named]
        places = {nonce: place for place, nonce in enumerate(asked.nonces)}
        self._serving.call(hub.ask, order, calls)
        try:
            for nonce, header in asked.taken.items():
                place = places.pop(nonce)
                yield place, Answered(nonce, asked.cohort[place], header)
            while places:
                event = self._next()
                if isinstance(event, Answered | Failed) and event.nonce in places:
                    yield places.pop(event.nonce), event if isinstance(event, Answered) else event.failure
        finally:
            self._serving.call(hub.end, order, OVER)

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
        payload = Blob(sha256, buffers)
        return Order(terms.run, round, self._assignment, header, payload, check, self._journal, terms.lease, ends, kind)

    def _next(self) -> Event | None:
        """The next event, or None after a moment: the caller's thread must be able to hear an interrupt."""
        try:
            event = self._serving.events.get(timeout=LOOK)
        except queue.Empty:
            return None
        if not isinstance(event, Answered | Failed):
            self._tell(event)
        return event

    # --- answers -----------------------------------------------------------------------------------------------------

    def _part(self, ask: Ask, order: Order, position: int, answer: Answered | Failure) -> Part:
        if isinstance(answer, Failure):
            return Part(position, None, (), [answer])
        try:
            payload = mapped(self._journal.payload(answer.nonce))
            update = decode_update(answer.header, payload, verify=False).map(_to_tensor)
            total = contribute(self._terms.strategy, ask.state, update, ask.context)
        except (ShoalError, ArithmeticError) as error:  # numbers with which a strategy cannot compute
            self._patience(lambda: self._journal.give_up(answer.nonce))
            reason = f"the update of client {answer.client!r} cannot be counted: {error}"
            return Part(position, None, (), [Failure(answer.client, ask.context.round, reason, kind="rejected")])
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
        """The server goes on with the next run."""
        self._journal.close()


def _measured(answer: Answered) -> Report:
    return Report(answer.client, decode_measurement(answer.header).metrics)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _to_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy())  # the bytes on disk go, and torch wants memory that may be written
