"""The server's numbers for Prometheus, counted from what it hears since it was started."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector

from shoal.protos.messages import Kind
from shoal.server.board import Board
from shoal.server.orders import Answered, Asked, Disk, Failed, Joined, Moved, News, Opened, Recorded, Repeated

__all__ = ["Metrics"]

OUTCOMES = ("accepted", "duplicate", "rejected", "failed", "late", "lost")
MOMENTS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)  # seconds
MINUTES = (1, 3, 10, 30, 60, 180, 600, 1800, 3600, 10800, 36000)  # in seconds


class Metrics:
    """:meth:`hear` is called on the server's loop, :meth:`collect` from any thread.

    No label names a client: a crowd would make as many series.
    """

    def __init__(self, board: Board) -> None:
        own = self._registry = CollectorRegistry()
        ProcessCollector(registry=own)
        self._rounds = Counter("shoal_rounds", "Rounds that stand.", registry=own)
        self._round = Gauge("shoal_round", "The round in progress, or the last one.", registry=own)
        self._planned = Gauge("shoal_rounds_planned", "How many rounds the run shall have.", registry=own)
        self._round_seconds = Histogram(
            "shoal_round_seconds", "How long rounds took, with their evaluation.", buckets=MINUTES, registry=own
        )
        self._counted = Counter("shoal_updates_counted", "Updates that are in the sum of a round.", registry=own)
        self._answers = Counter(
            "shoal_answers",
            "What became of tasks. accepted: on disk; duplicate: committed again; rejected: not valid; failed: the "
            "client said so; late: the deadline has passed; lost: the lease has expired.",
            ["task", "outcome"],
            registry=own,
        )
        for task, outcome in product((Kind.TRAIN, Kind.EVALUATE), OUTCOMES):
            self._answers.labels(task, outcome)  # a series that begins with 0 has a rate from its first event on
        self._commit = Histogram(
            "shoal_commit_seconds", "How long it took to check and store an answer.", buckets=MOMENTS, registry=own
        )
        self._bytes = Counter(
            "shoal_bytes", "Tensors and assignments, from clients (up) and to them (down).", ["direction"], registry=own
        )
        for direction in ("up", "down"):
            self._bytes.labels(direction)
        self._refusals = Counter("shoal_disk_refusals", "How often the disk did not take what came.", registry=own)
        self._joined = Counter("shoal_clients_joined", "How often a client has joined.", registry=own)
        connected = Gauge("shoal_clients_connected", "Clients that are connected.", registry=own)
        connected.set_function(lambda: len(board.hub.present))
        refusing = Gauge("shoal_disk_refusing", "1 while the disk takes no more.", registry=own)
        refusing.set_function(lambda: board.disk is not None)
        draining = Gauge("shoal_draining", "1 when the server is about to stop.", registry=own)
        draining.set_function(lambda: board.draining)
        self._task = Kind.TRAIN

    def hear(self, news: News) -> None:
        match news:
            case Moved(up, down):
                self._bytes.labels("up").inc(up)
                self._bytes.labels("down").inc(down)
            case Answered():
                self._count("accepted")
                self._commit.observe(news.seconds)
            case Failed():
                self._count(news.failure.kind)
            case Repeated():
                self._count("duplicate")
            case Joined():
                self._joined.inc()
            case Disk(str()):
                self._refusals.inc()
            case Asked(order):
                self._task = order.kind
                self._round.set(order.round)
            case Opened():
                self._planned.set(news.rounds)
                self._round.set(news.round)
            case Recorded(round, numbers) if round:  # 0 is the initial model's evaluation
                self._rounds.inc()
                self._counted.inc(numbers["counted"])
                self._round_seconds.observe(numbers["seconds"])

    def collect(self) -> Iterator[Metric]:
        """What the registry has, without the times at which each counter was made: they are all the same."""
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family

    def _count(self, outcome: str) -> None:
        self._answers.labels(self._task, outcome).inc()
