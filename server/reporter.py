"""What the coordinator does, told to those who watch the server."""

from __future__ import annotations

from shoal.protos.messages import Failure
from shoal.server.callbacks import Callback
from shoal.server.checkpoints import Checkpoint
from shoal.server.coordinator import Round
from shoal.server.orders import Disk, Recorded, Uncounted
from shoal.server.serving import Serving

__all__ = ["Reporter"]


class Reporter(Callback):
    """A callback in the coordinator's thread that only passes on."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def on_round_end(self, round: Round, point: Checkpoint) -> None:
        self._serving.tell(Recorded(round.number, round.numbers))

    def on_failure(self, failure: Failure) -> None:
        self._serving.tell(Uncounted(failure))

    def on_checkpoint(self, checkpoint: Checkpoint) -> None:
        """It is written: the run folder, which is told before, has waited until the disk took it."""
        self._serving.tell(Disk(None))
