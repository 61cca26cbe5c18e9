"""What the coordinator does, told to those who watch the server."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.protos.messages import Failure
from shoal.server.checkpoints import Checkpoint
from shoal.server.coordinator import Round
from shoal.server.fleet import Report
from shoal.server.orders import Disk, Recorded, Uncounted
from shoal.server.serving import Serving

__all__ = ["Reporter"]


class Reporter:
    """An :class:`~shoal.server.coordinator.Observer` in the coordinator's thread that only passes on."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def on_round(self, round: Round) -> None:
        self._serving.tell(Recorded(round.number, round.numbers))

    def on_failure(self, failure: Failure) -> None:
        self._serving.tell(Uncounted(failure))

    def on_answers(self, round: int, answered: int, asked: int) -> None:
        return

    def on_evaluations(self, round: int, reports: Sequence[Report]) -> None:
        return

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        """It is written: the run folder, which is told before, has waited until the disk took it."""
        self._serving.tell(Disk(None))
