"""Serving a Flower app: its ServerApp runs here, its ClientApp on devices that call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shoal.flower.app import FlowerApp, Scalar
from shoal.flower.devices import Devices
from shoal.flower.envelopes import Terms
from shoal.flower.grid import node_ids
from shoal.flower.places import Places
from shoal.flower.running import Execution, Play
from shoal.progress import Display, display
from shoal.run import Run
from shoal.serve import Door, Roster
from shoal.server.orders import Disk, Event, Joined, Opened
from shoal.server.patience import Patience
from shoal.server.reporter import Reporter
from shoal.server.runs import RunFolder

__all__ = ["serve"]


def serve(
    path: str | Path,
    overrides: Sequence[str] | Mapping[str, Scalar] = (),
    *,
    door: Door,
    nodes: int | None = None,
    seed: int = 0,
    out: str | Path = "runs",
    progress: str = "auto",
) -> Run:
    """Run the Flower app in this folder on ``nodes`` devices that call; it begins when all are there.

    Each device has the app's folder and is one node. What :func:`shoal.flower.run` says of the other arguments and of
    errors holds here; with the same seed, and each device holding what its partition-id says, so are the results.
    """
    app = FlowerApp.read(path, overrides)
    play, show = Served(app, app.nodes if nodes is None else nodes, seed, 0, door), display(progress)
    door.place(), door.show_at()
    with play.ready() as (server, stage), closing(RunFolder.create(Path(out), app.name)) as folder:
        assert isinstance(stage, Devices)
        play = replace(play, door=replace(door, listen=str(stage.serving.address)))  # the port may have been any
        folder.claim()
        folder.write("experiment.toml", play.toml())
        folder.write("env.json", play.environment())
        opening = _Opening(play, folder, show, stage)
        reporter = [Reporter(stage.serving)]
        run = Execution(play, folder, show, server, stage, ready=opening.wait, observers=reporter).run(None)
        if run.status == "finished":
            stage.finish()
    return run


@dataclass(frozen=True)
class Served(Play):
    """What is to be run, on devices that come in by this door."""

    door: Door

    def stage(self) -> Devices:
        terms = Terms(self.run_id, self.app.name, self.nodes, dict(self.app.config))
        assert isinstance(self.app, FlowerApp)
        return Devices(self.door, Places(self.app, self.nodes), terms, node_ids(self.seed, self.nodes))

    @property
    def no_resume(self) -> str:
        return "its clients are devices, and what they keep lies there"

    def environment(self) -> dict[str, Any]:
        return super().environment() | {"served": asdict(self.door)}

    def __str__(self) -> str:
        return f"Flower clients over gRPC at {self.door.listen}, {'mutual TLS' if self.door.tls else 'plain text'}"


@dataclass(frozen=True)
class _Opening:
    """From an open door to the first message."""

    play: Served
    folder: RunFolder
    show: Display
    stage: Devices

    def wait(self) -> Mapping[int, str]:
        """Until there is a device for each node: their names."""
        serving, wanted = self.stage.serving, self.play.nodes
        self.folder.patience = Patience(
            self.show.note,
            lambda why, seconds: self.folder.log("disk refused", reason=why, seconds=seconds),
            lambda reason: serving.tell(Disk(reason)),
        )
        serving.tell(Opened(self.stage.run, str(self.folder.path), 0, 0, wanted))
        roster = Roster(self.folder, self.show)
        roster.quiet = False

        def hear(event: Event) -> None:
            roster.hear(event)
            if isinstance(event, Joined) and self.stage.differs(event.client):
                self.show.note(f"the app's files on client {event.client!r} are not those of this server")

        devices = self.stage.begin(self.folder.path / "round", lambda here: self.show.waiting(here, wanted), hear)
        for rank, (node, client) in enumerate(devices.items()):
            self.folder.log("node", client=client, node=node, rank=rank)
        return devices
