"""What a server shows to those who run it: what it has heard of rounds and failures, and the hub as it is now.

It only listens. What clients do at this moment is known to the hub alone, and is asked there when somebody looks.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from shoal.protos import fleet_pb2 as wire
from shoal.protos.messages import Failure, Kind
from shoal.protos.transport import software
from shoal.server.hub import Hub
from shoal.server.orders import (
    Answered,
    Asked,
    Assigned,
    Call,
    Disk,
    Failed,
    Moved,
    News,
    Opened,
    Order,
    Over,
    Recorded,
    Session,
    Uncounted,
)

__all__ = ["Board", "called_from"]

ROWS = 1000  # clients that one answer names: they fit into a message, whatever their names
TROUBLES = 20  # failures that are remembered
LONGEST = 300  # characters of a reason that are shown
HEADLINE = ("test_", "clients_", "train_loss")  # beginnings of the metrics that are shown
METRICS, NAME = 32, 80  # so many of them, with names so long
RANK = ("late", "lost", "rejected", "failed", "checking", "uploading", "asked", "training", "answered", "withdrawn")


@dataclass
class _Row:
    """One task of the last orders; ``state`` is empty as long as the hub knows better."""

    order: Order
    client: str
    since: float
    state: str = ""
    reason: str = ""


@dataclass
class _Run:
    """The run that was begun last. Times are those of the monotonic clock."""

    opened: Opened
    round: int
    since: float
    phase: str = "waiting"
    round_since: float | None = None
    order: Order | None = None
    numbers: dict[str, float] = field(default_factory=dict)

    def record(self, round: int, numbers: Mapping[str, float]) -> None:
        """Clients choose some of the names: those that nobody can read are left out, and what grows too long."""
        self.round = round
        shown = {n: v for n, v in numbers.items() if n.startswith(HEADLINE) and n.isprintable() and len(n) <= NAME}
        merged = {n: v for n, v in {**self.numbers, **shown}.items() if math.isfinite(v)}
        self.numbers = dict(list(merged.items())[:METRICS])

    def turn(self, phase: str) -> None:
        self.phase, self.since = phase, time.monotonic()

    def begin(self, order: Order, goes_on: bool) -> None:
        """``goes_on``: the order is a further one of the same round and kind."""
        self.order, self.round = order, order.round
        phase = "training" if order.kind is Kind.TRAIN else "evaluating"
        if not goes_on or self.phase != phase:
            self.turn(phase)
        if order.kind is Kind.TRAIN and not goes_on:
            self.round_since = self.since


class Board:
    """Lives on the loop of the ``hub``: :meth:`hear` gets all news, :meth:`status` is what there is to show."""

    def __init__(self, hub: Hub) -> None:
        self.hub, self._began = hub, time.monotonic()
        self.draining = False
        self.disk: tuple[str, float] | None = None  # why it takes no more, and since when
        self._moved = Counter[str]()
        self._run: _Run | None = None
        self._rows: dict[str, _Row] = {}  # by nonce
        self._nonces: dict[str, str] = {}  # by client
        self._troubles: deque[tuple[float, wire.Trouble]] = deque(maxlen=TROUBLES)

    # --- listening ---------------------------------------------------------------------------------------------------

    def hear(self, news: News) -> None:
        match news:
            case Moved(up, down):
                self._moved.update(up=up, down=down)
            case Answered(nonce):
                self._settle(nonce, "answered")
                self.disk = None
            case Failed(nonce, failure):
                self._settle(nonce, failure.kind, failure.reason)
                self._trouble(failure, failure.kind)
            case Uncounted(failure):
                self._uncount(failure)
            case Disk(None):
                self.disk = None
            case Disk(str(reason)):
                self.disk = (reason, time.monotonic() if self.disk is None else self.disk[1])
            case _:
                self._hear_of_the_run(news)

    def _hear_of_the_run(self, news: News) -> None:
        match news, self._run:
            case Opened(), _:
                self._run = _Run(news, news.round, time.monotonic())
                self._rows, self._nonces = {}, {}
            case Asked(order, calls), run:
                goes_on = any(_same(row.order, order) for row in self._rows.values())
                self._ask(order, calls, goes_on)
                if run is not None:
                    run.begin(order, goes_on)
            case Over(order), run:
                for row in self._rows.values():
                    row.state = row.state or ("withdrawn" if row.order is order else "")
                if run is not None and run.order is order:
                    run.order = None
                    run.turn("summing")
            case Recorded(round, numbers), _Run() as run:
                run.record(round, numbers)

    def _ask(self, order: Order, calls: Sequence[Call], goes_on: bool) -> None:
        """Show those who are asked, beside others of the same round where each has an order of its own."""
        now = time.monotonic()
        if not goes_on:
            self._rows, self._nonces = {}, {}
        for call in calls:
            self._rows.pop(self._nonces.get(call.client, ""), None)
            self._rows[call.nonce] = _Row(order, call.client, now, "answered" if call.taken else "")
            self._nonces[call.client] = call.nonce

    def _settle(self, nonce: str, state: str, reason: str = "") -> None:
        if nonce in self._rows:
            self._rows[nonce].state, self._rows[nonce].reason = state, _in_a_line(reason)

    def _uncount(self, failure: Failure) -> None:
        """The coordinator tells of all failures; only those whose answer was taken are new here."""
        nonce = self._nonces.get(failure.client, "")
        if nonce and self._rows[nonce].state == "answered":
            self._settle(nonce, "rejected", failure.reason)
            self._trouble(failure, "rejected")

    def _trouble(self, failure: Failure, state: str) -> None:
        run, reason = "" if self._run is None else self._run.opened.run, _in_a_line(failure.reason)
        trouble = wire.Trouble(client=failure.client, run=run, round=failure.round, state=state, reason=reason)
        self._troubles.appendleft((time.monotonic(), trouble))

    # --- showing -----------------------------------------------------------------------------------------------------

    def status(self) -> wire.StatusReply:
        """All of it, bounded: only clients that are named cost more than a look."""
        now, sessions = time.monotonic(), {session.client: session for session in self.hub.sessions}
        states = {nonce: self._state(nonce, row, sessions.get(row.client)) for nonce, row in self._rows.items()}
        newest = sorted(sessions.values(), key=lambda session: -session.since)
        reply = wire.StatusReply(
            software=software(),
            uptime=now - self._began,
            draining=self.draining,
            bytes_up=self._moved["up"],
            bytes_down=self._moved["down"],
            tasks=[self._task(nonce, states[nonce], sessions, now) for nonce in self._named(states, now)],
            asked=len(states),
            connections=[_connection(session, now) for session in newest[:ROWS]],
            connected=len(sessions),
        )
        if self.disk is not None:
            reply.disk, reply.disk_for = self.disk[0], now - self.disk[1]
        if self._run is not None:
            reply.run.CopyFrom(_run_status(self._run, Counter(states.values()), now))
        for when, trouble in self._troubles:
            reply.troubles.add(ago=now - when).MergeFrom(trouble)
        return reply

    def _named(self, states: Mapping[str, str], now: float) -> Sequence[str]:
        """The nonces of all, or of those that need attention."""
        if len(states) <= ROWS:
            return list(states)
        return sorted(states, key=lambda nonce: (not self._overdue(nonce, now), RANK.index(states[nonce])))[:ROWS]

    def _state(self, nonce: str, row: _Row, session: Session | None) -> str:
        assigned = self.hub.task(nonce)
        if row.state or assigned is None:
            return row.state or "withdrawn"
        if assigned.committing is not None:
            return "checking"
        if assigned.incoming is not None:
            return "uploading"
        fetched = session is not None and session.fetched == assigned.order.payload.sha256
        return "training" if assigned.begun or fetched else "asked"

    def _overdue(self, nonce: str, now: float) -> bool:
        assigned = self._waited_for(nonce)
        return assigned is not None and now - self.hub.sign_of(assigned) > assigned.order.lease / 2

    def _waited_for(self, nonce: str) -> Assigned | None:
        """The task, if its client still has to give a sign."""
        assigned = self.hub.task(nonce)
        return assigned if assigned is not None and assigned.committing is None else None

    def _task(self, nonce: str, state: str, sessions: Mapping[str, Session], now: float) -> wire.TaskStatus:
        row, waited_for = self._rows[nonce], self._waited_for(nonce)
        task = wire.TaskStatus(client=row.client, state=state, reason=row.reason, asked_for=now - row.since)
        task.connected = row.client in sessions
        if waited_for is not None:
            task.silent_for = now - self.hub.sign_of(waited_for)
            task.lease_left = max(0.0, waited_for.order.lease - task.silent_for)
            task.overdue = self._overdue(nonce, now)
            if waited_for.incoming is not None:
                task.bytes_here, task.bytes_total = waited_for.incoming.offset, waited_for.incoming.total
        return task


def _same(one: Order, other: Order) -> bool:
    return (one.run, one.round, one.kind) == (other.run, other.round, other.kind)


def _run_status(run: _Run, states: Counter[str], now: float) -> wire.RunStatus:
    status = wire.RunStatus(
        run=run.opened.run,
        folder=run.opened.folder,
        rounds=run.opened.rounds,
        round=run.round,
        phase=run.phase,
        phase_for=now - run.since,
        round_for=0.0 if run.round_since is None else now - run.round_since,
        wanted=run.opened.wanted,
        states=states,
        metrics=run.numbers,
    )
    if run.order is not None and run.order.ends is not None:
        status.deadline_in = max(0.0, run.order.ends - now)
    return status


def _connection(session: Session, now: float) -> wire.Connection:
    return wire.Connection(
        client=session.client,
        peer=called_from(session.peer),
        connected_for=now - session.since,
        silent_for=now - session.seen,
    )


def _in_a_line(reason: str) -> str:
    """What a client says may hold anything, such as what moves a terminal's cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in reason[:LONGEST])


def called_from(peer: str) -> str:
    """gRPC's ``ipv4:127.0.0.1:41948`` as people write it."""
    return unquote(peer.partition(":")[2]) if peer.startswith(("ipv4:", "ipv6:")) else peer
