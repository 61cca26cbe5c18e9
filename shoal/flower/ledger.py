"""What is asked and answered, round by round: for the run folder and for whoever watches.

An app may do what it likes with its grid. A message belongs to the round that it names, as Flower's strategies and its
legacy server do; one that names none belongs to the round in progress, and training once more begins another.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from flwr.app import Message, MetricRecord, RecordDict

from shoal.flower.turns import Answer, round_in, size
from shoal.protos.messages import Failure
from shoal.server.callbacks import Callback
from shoal.server.fleet import Report, Round

__all__ = ["Ledger", "numbers_of"]

# An app's model is its own: a round of it leaves no value of Shoal's behind.
NOTHING: Any = None


class Ledger:
    """Tells ``observers`` of each round, from whatever thread.

    ``names`` says which client a node is, in the order in which they are told of.
    """

    def __init__(self, observers: list[Callback], names: Mapping[int, str], first: int = 1) -> None:
        self._observers, self._names, self._lock = observers, names, threading.RLock()
        self.asked, self.answered = Counter[str](), Counter[str]()  # by kind, in the whole run
        self._offset = 0
        self._round = _Open(first)

    @cached_property
    def _ranks(self) -> Mapping[str, int]:
        return {client: rank for rank, client in enumerate(self._names.values())}

    def _in_order(self, reports: list[Report]) -> list[Report]:
        """Of the clients, not of their answers."""
        return sorted(reports, key=lambda report: self._ranks[report.client])

    def ask(self, messages: Sequence[Message]) -> list[tuple[int, str]]:
        """Messages go out together: the round and the client of each."""
        with self._lock:
            if messages:
                self._turn_to(messages[0])
            for message in messages:
                self._round.ask(_kind(message), message)
                self.asked[_kind(message)] += 1
            return [(self._round.number, self._names[message.metadata.dst_node_id]) for message in messages]

    def _turn_to(self, message: Message) -> None:
        named, now, kind = _named(message), self._round.number, _kind(message)
        if not named:  # also round 0, in which a legacy server asks for the initial model
            wanted = now + 1 if kind == "train" and self._round.answered.get("train") else now
        else:
            if named + self._offset < now:  # the app begins to count anew
                self._offset = now + bool(self._round.asked) - named
            wanted = named + self._offset
        if wanted != now:
            self.close()
            self._round = _Open(wanted)

    def answer(self, number: int, client: str, node: int, answer: Answer) -> None:
        """An answer came in; one that comes after its round is counted, and its failure told, all the same."""
        with self._lock:
            if not answer.reason:
                self.answered[_kind(answer.reply)] += 1
                report = self._round.answer(client, answer) if number == self._round.number else None
                if report is not None:
                    self._tell_answers()
                return
            reason = f"client {client!r} (node {node}): {answer.reason}"
            failure = Failure(client, number, reason, answer.traceback)
            if number == self._round.number:
                self._round.failures.append(failure)
            for observer in self._observers:
                observer.on_failure(failure)
            self._tell_answers()

    def miss(self, number: int, client: str, node: int) -> None:
        """Nobody waits for this client any more."""
        with self._lock:
            failure = Failure(client, number, f"client {client!r} (node {node}) did not answer in time", kind="late")
            if number == self._round.number:
                self._round.failures.append(failure)
            for observer in self._observers:
                observer.on_failure(failure)

    def _tell_answers(self) -> None:
        now = self._round
        done = sum(map(len, now.answered.values())) + len(now.failures)
        for observer in self._observers:
            observer.on_answers(now.number, done, sum(now.asked.values()))

    def note(self, numbers: Mapping[str, float]) -> None:
        """What the app's server has worked out of the round in progress."""
        with self._lock:
            self._round.numbers |= numbers

    def initial(self, numbers: Mapping[str, float]) -> None:
        """What it has found of the initial model, as round 0."""
        for observer in self._observers:
            observer.on_round_end(Round(0, numbers), NOTHING)

    def close(self) -> None:
        """The round in progress is over, if anything happened in it."""
        with self._lock:
            done, self._round = self._round, _Open(self._round.number + 1)
            if not (done.asked or done.numbers):
                self._round = _Open(done.number)
                return
            for kind, reports in done.answered.items():
                if kind != done.kind:
                    for observer in self._observers:
                        observer.on_evaluations(done.number, self._in_order(reports))
            finished = done.finished(self._in_order(done.answered.get(done.kind, [])))
            for observer in self._observers:
                observer.on_round_end(finished, NOTHING)


class _Open:
    """A round in progress. The kind of its first message is what the round is about."""

    def __init__(self, number: int) -> None:
        self.number, self.began = number, time.perf_counter()
        self.asked, self.answered = dict[str, int](), dict[str, list[Report]]()
        self.failures, self.numbers = list[Failure](), dict[str, float]()
        self.down, self.up = 0, 0
        self._sizes = dict[int, tuple[RecordDict, int]]()  # what many are sent is measured once

    @property
    def kind(self) -> str:
        return next(iter(self.asked), "")

    def ask(self, kind: str, message: Message) -> None:
        self.asked[kind] = self.asked.get(kind, 0) + 1
        content = message.content
        if id(content) not in self._sizes:
            self._sizes[id(content)] = content, size(content)
        self.down += self._sizes[id(content)][1]

    def answer(self, client: str, answer: Answer) -> Report:
        content = answer.reply.content
        up = size(content)
        self.up += up
        report = Report(client, {**numbers_of(content), "bytes_up": float(up)})
        self.answered.setdefault(_kind(answer.reply), []).append(report)
        return report

    def finished(self, reports: Sequence[Report]) -> Round:
        numbers: dict[str, float] = {
            "asked": self.asked.get(self.kind, 0),
            "counted": len(reports),
            "failed": len(self.failures),
            "bytes_down": self.down,
            "bytes_up": self.up,
            **self.numbers,
            "seconds": time.perf_counter() - self.began,
        }
        return Round(self.number, numbers, reports, self.failures)


def _kind(message: Message) -> str:
    """``train``, ``evaluate``, ``query``, or what a legacy server asks."""
    return str(message.metadata.message_type).partition(".")[0]


def _named(message: Message) -> int | None:
    group = message.metadata.group_id
    if group.isdecimal():
        return int(group)
    return round_in(message.content)


def numbers_of(content: RecordDict | MetricRecord | Mapping[str, Any] | None, prefix: str = "") -> dict[str, float]:
    """The single numbers of a record, or of all metric records of a reply; a name that has the prefix keeps it."""
    if content is None:
        return {}
    records: list[Any] = [content]
    if isinstance(content, RecordDict):
        records = [record for record in content.values() if isinstance(record, MetricRecord)]
    pairs = [(key, value) for record in records for key, value in record.items()]
    numbers = {key: value for key, value in pairs if isinstance(value, int | float)}
    named = {key.replace("-", "_"): float(value) for key, value in numbers.items()}

    def has_it(name: str) -> bool:
        return name.startswith(prefix) and name.removeprefix(prefix) not in named

    return {name if has_it(name) else f"{prefix}{name}": value for name, value in named.items()}
