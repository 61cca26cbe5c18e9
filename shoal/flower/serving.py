"""Serving a Flower app: its ServerApp runs here, its ClientApp on devices that call."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.serverapp import ServerApp

from shoal.flower.app import FlowerApp, Scalar
from shoal.flower.devices import Devices
from shoal.flower.envelopes import Terms
from shoal.flower.grid import node_ids
from shoal.flower.places import Places
from shoal.flower.running import Execution, Play, played
from shoal.flower.stage import Stage
from shoal.progress import Display
from shoal.run import Run
from shoal.serve import FEW, Door, Roster
from shoal.server.orders import Disk, Event, Joined, Opened
from shoal.server.patience import Patience
from shoal.server.reporter import Reporter
from shoal.server.runs import RunFolder

__all__ = ["Served", "serve"]

DEVICES = "devices.json"  # in the run folder: who they are by rank, with their partition-ids where they say one


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
    play = Served(app, app.nodes if nodes is None else nodes, seed, 0, door=door)
    door.place(), door.show_at()
    return played(play, Path(out), progress)


@dataclass(frozen=True, kw_only=True)
class Served(Play):
    """What is to be run, on devices that come in by this door.

    ``run`` is its name for them. Of a run that goes on, ``devices`` are those it has, each with its partition-id.
    """

    door: Door
    run: str = field(default_factory=lambda: secrets.token_hex(8))
    devices: Mapping[str, int | None] = field(default_factory=dict)
    every = 1  # a round with devices is dearer than a point

    def stage(self) -> Devices:
        assert isinstance(self.app, FlowerApp)
        places = Places(self.app, self.nodes, self.devices)
        terms = Terms(self.run_id, self.app.name, self.nodes, dict(self.app.config))
        return Devices(self.door, places, self.run, terms, node_ids(self.seed, self.nodes))

    def execution(self, folder: RunFolder, show: Display, server: ServerApp, stage: Stage) -> Execution:
        assert isinstance(stage, Devices)
        listen = str(stage.serving.address)  # the port may have been any
        play = replace(self, door=replace(self.door, listen=listen))
        ready, reporter = _Opening(play, folder, show, stage).wait, Reporter(stage.serving)
        return Execution(play, folder, show, server, stage, ready=ready, observers=[reporter], finished=stage.finish)

    def environment(self) -> dict[str, Any]:
        return super().environment() | {"run": self.run, "served": asdict(self.door)}

    @classmethod
    def read(cls, folder: RunFolder) -> Served:
        base, kept = Play.read(folder), folder.read("env.json")
        door, devices = Door(**kept["served"]), folder.read(DEVICES)
        return cls(base.app, base.nodes, base.seed, 0, door=door, run=kept["run"], devices=devices)

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
        serving.tell(Opened(self.play.run, str(self.folder.path), 0, 0, wanted))
        roster = Roster(self.folder, self.show)
        roster.quiet = wanted > FEW

        def hear(event: Event) -> None:
            roster.hear(event)
            if isinstance(event, Joined) and self.stage.differs(event.client):
                self.show.note(f"the app's files on client {event.client!r} are not those of this server")

        devices = self.stage.begin(self.folder.path / "round", lambda here: self.show.waiting(here, wanted), hear)
        self.folder.write(DEVICES, self.stage.places.devices)
        return devices
