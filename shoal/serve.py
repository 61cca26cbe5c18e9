"""Serving an experiment: the same rounds as a simulation, with clients that call from wherever they are."""

from __future__ import annotations

import math
import secrets
import shutil
from collections import ChainMap
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shoal.compose import Composition
from shoal.docket import Docket
from shoal.execute import Execution, come_back, environment
from shoal.experiment import Experiment
from shoal.progress import Display, display
from shoal.protos.errors import ExperimentError
from shoal.protos.transport import Address, Certificates, check_exposure
from shoal.run import Run
from shoal.server.admission import Admit, without_an_app
from shoal.server.audit import NAME, Audit, owners
from shoal.server.board import called_from
from shoal.server.callbacks import Callback
from shoal.server.checkpoints import Checkpoint
from shoal.server.coordinator import Coordinator, updates_needed
from shoal.server.fleet import Fleet
from shoal.server.journal import Journal
from shoal.server.orders import Disk, Event, Joined, Left, Opened, Refused
from shoal.server.patience import Patience
from shoal.server.remote import RemoteFleet, Terms
from shoal.server.reporter import Reporter
from shoal.server.runs import RunFolder
from shoal.server.serving import Serving

__all__ = ["Door", "Roster", "serve", "served"]

FEW = 20  # clients, up to which each that comes or goes is worth a line
GRACE = 60.0  # seconds for a round to end after SIGTERM, before systemd and its like kill (90 s)


@dataclass(frozen=True)
class Door:
    """Where and how clients come in.

    ``wait_for`` is how many must be connected before the first round (None: a cohort); ``lease`` how many seconds the
    server waits for a sign of a client that is gone. Clients give a sign every ``heartbeat`` seconds, and at least
    three a lease. Without ``sync`` no receipt waits for the disk. ``http`` is where metrics and health are shown
    (``HOST:PORT``, or a port of this machine's own).
    """

    listen: str
    tls: str | None = None
    insecure: bool = False
    force: bool = False
    wait_for: int | None = None
    lease: float = 90.0
    heartbeat: float = 30.0
    sync: bool = True
    http: str | None = None

    def __post_init__(self) -> None:
        for name in ("lease", "heartbeat"):
            if not 0 < getattr(self, name) < math.inf:
                raise ExperimentError(f"{name} is {getattr(self, name)}; it must be a number of seconds above 0")

    def place(self) -> tuple[Address, Certificates | None]:
        """Where to listen; ConnectionRefused if that is no address, or not safe."""
        address = Address.parse(self.listen)
        return address, check_exposure(address, None if self.tls is None else Path(self.tls), self.insecure, self.force)

    def show_at(self) -> Address | None:
        """Where metrics and health are shown; ConnectionRefused if that is no address."""
        if self.http is None:
            return None
        return Address.parse(f"127.0.0.1:{self.http}" if self.http.isdecimal() else self.http)

    @contextmanager
    def open(self, admit: Admit = without_an_app, begun: Sequence[Path] = ()) -> Iterator[Serving]:
        """Listen, and let in whom ``admit`` does not deny; ConnectionRefused if that is not possible.

        Who took part in runs that have ``begun`` keeps the name.
        """
        kept = ChainMap(*(owners(path / NAME) for path in begun))
        (address, certificates), shown = self.place(), self.show_at()
        pulse = min(self.heartbeat, self.lease / 3)
        with closing(Serving(address, certificates, heartbeat=pulse, admit=admit, owners=kept)) as serving:
            if shown is None:
                yield serving
                return
            from shoal.server.monitor import Monitor

            with closing(Monitor(shown, serving)):
                yield serving

    def clients_needed(self, experiment: Experiment) -> int:
        """How many clients to wait for; ExperimentError if so few could never make a round."""
        least = updates_needed(experiment.quorum, experiment.cohort)
        wanted = experiment.cohort if self.wait_for is None else self.wait_for
        if wanted < least:
            raise ExperimentError(f"--wait-for is {wanted}, but a round needs {least} updates; wait for as many")
        return wanted


def serve(experiments: Sequence[Experiment], door: Door, *, out: Path, progress: str, anew: bool = False) -> list[Run]:
    """Run experiments one after the other on the clients that are connected; see :meth:`shoal.Experiment.serve`.

    Everything is checked before the first client is let in. Called again after whatever ended it, it goes on with what
    it had begun, unless ``anew``. After an interrupt the experiments that are left are not begun.
    """
    door.place(), door.show_at()
    # A round with devices is dearer than a checkpoint.
    compositions = [Composition(replace(experiment, checkpoint_every=1)) for experiment in experiments]
    for composition in compositions:
        composition.experiment.assignment(composition.data)
        door.clients_needed(composition.experiment)
    texts = [composition.experiment.toml() for composition in compositions]
    runs, shows = list[Run](), [display(progress) for _ in compositions]
    with closing(Docket(out, texts, door.listen, anew)) as docket, door.open(begun=docket.begun) as serving:
        for number, (composition, show) in enumerate(zip(compositions, shows, strict=True)):
            with closing(docket.folder(number, composition.experiment.name)) as folder:
                folder.claim()
                runs.append(_serve(composition, folder, serving, door, show))
            if runs[-1].status != "finished":
                return runs
        serving.close(finished=True)
    return runs


def _serve(composition: Composition, folder: RunFolder, serving: Serving, door: Door, show: Display) -> Run:
    """One experiment, from its first round or from where an earlier process left it."""
    if folder.has("summary.json") and Run(folder.path).status == "finished":
        return Run(folder.path)
    if folder.has("env.json"):
        name = folder.read("env.json")["run"]
        point = come_back(composition, folder)
        show.note(f"going on with {folder.path} after round {point.round}; --anew begins another run")
    else:
        folder.write("experiment.toml", composition.experiment.toml())
        name, point = secrets.token_hex(8), composition.start()
        # The name is for clients, who keep a state for each run.
        facts = {"run": name, "served": asdict(door) | {"listen": str(serving.address)}}
        folder.write("env.json", environment(composition, "grpc", 0, None) | facts)
    return _swept(_execution(composition, folder, serving, door, name, show).run(point))


def _swept(run: Run) -> Run:
    """A run that has finished has no round in progress."""
    if run.status == "finished":
        shutil.rmtree(run.path / "round", ignore_errors=True)
    return run


@contextmanager
def served(composition: Composition, folder: RunFolder, recorded: dict[str, Any], show: Display) -> Iterator[Execution]:
    """A run that was served before, at the same address and with the same name to its clients."""
    door = Door(**recorded["served"])
    with door.open(begun=[folder.path]) as serving:
        yield _execution(composition, folder, serving, door, recorded["run"], show)
        if _swept(Run(folder.path)).status == "finished":
            serving.close(finished=True)


def _execution(
    composition: Composition, folder: RunFolder, serving: Serving, door: Door, run: str, show: Display
) -> Execution:
    needed, roster = door.clients_needed(composition.experiment), Roster(folder, show)
    folder.patience = Patience(
        show.note,
        lambda why, seconds: folder.log("disk refused", reason=why, seconds=seconds),
        lambda reason: serving.tell(Disk(reason)),
    )
    fleets = list[RemoteFleet]()

    def make_fleet() -> Fleet:
        e, data = composition.experiment, composition.data
        terms = Terms(run, e.assignment(data).encode(), e.strategy, composition.initial, door.lease)
        journal = Journal(folder.path / "round", door.sync)
        names = () if data is None else data.clients
        fleets.append(RemoteFleet(serving, terms, journal, names, roster.hear, folder.patience))
        return fleets[0]

    def ready(coordinator: Coordinator) -> None:
        rounds, point = composition.experiment.rounds, coordinator.point.round
        serving.tell(Opened(run, str(folder.path), rounds, point, needed))
        if fleets[0].recall(coordinator.point.round + 1) is None:  # a round that was begun goes on with who comes
            fleets[0].wait_for(needed, lambda present: show.waiting(present, needed), lambda: coordinator.stopping)
        roster.quiet = len(fleets[0].reachable) > FEW

    def watch(point: Checkpoint) -> Sequence[Callback]:
        return [Audit(folder, run, point, fleets[0].members)]

    way = "mutual TLS" if door.tls else "plain text"
    engine = f"clients over gRPC at {serving.address}, {way}"
    return Execution(
        *(composition, folder, show, engine, needed, make_fleet),
        ready=ready,
        watch=watch,
        callbacks=[Reporter(serving)],
        grace=GRACE,
        stopping=serving.drain,
    )


class Roster:
    """Keeps who came and went; a crowd's coming and going is not worth a line each."""

    def __init__(self, folder: RunFolder, show: Display) -> None:
        self._folder, self._show, self.quiet = folder, show, True

    def hear(self, event: Event) -> None:
        if isinstance(event, Joined):
            self._folder.log("joined", client=event.client, peer=event.peer, identity=event.identity or None)
            self._note(f"client {event.client!r} joined from {called_from(event.peer)}")
        elif isinstance(event, Left):
            self._folder.log("left", client=event.client, reason=event.reason)
            self._note(f"client {event.client!r} left: {event.reason}")
        elif isinstance(event, Refused):
            self._folder.log("refused", client=event.client, peer=event.peer, identity=event.identity or None)
            self._note(
                f"{event.identity!r} at {called_from(event.peer)} is refused: client {event.client!r} is another's"
            )

    def _note(self, text: str) -> None:
        if not self.quiet:
            self._show.note(text)
