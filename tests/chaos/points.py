"""The places of the protocol at which a process can be made to die, and how it is told to.

A point is a function of server or client, and whether the process dies before or after it. Nothing in the product knows
of them: :func:`install` puts a wrapper around each function. A wrapper writes a line to the trace (the harness's only
view of what happens inside), and kills its own process when the arming file says that it is time.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

__all__ = ["POINTS", "Arm", "Point", "Side", "Wiring", "install", "named"]

Passed = Callable[["Point", Mapping[str, Any]], None]
VARIABLE = "SHOAL_CHAOS"  # of the environment: workers inherit it


class Side(StrEnum):
    """Which process has the function: the server, a process of clients, or the one that trains for it."""

    SERVER = "server"
    HOST = "host"
    WORKER = "worker"


def _nothing(*_: Any) -> Mapping[str, Any]:
    return {}


def _always(*_: Any) -> bool:
    return True


@dataclass(frozen=True)
class Point:
    """``where`` is ``module:function`` or ``module:Class.function``; ``of`` an attribute of each of a class's objects.

    ``only`` says for which arguments the point counts, ``notes`` what of them goes into the trace.
    """

    name: str
    side: Side
    where: str
    means: str
    before: bool = False
    of: str = ""
    only: Callable[..., bool] = field(default=_always, compare=False)
    notes: Callable[..., Mapping[str, Any]] = field(default=_nothing, compare=False)


def _is(name: str, argument: int = 0) -> Callable[..., bool]:
    """The path given as that argument has this name or suffix."""
    return lambda *arguments: arguments[argument].name == name or arguments[argument].suffix == name


def _client(hub: Any, assigned: Any, *_: Any) -> Mapping[str, Any]:
    return {"client": assigned.client, "nonce": assigned.nonce}


def _nonce(journal: Any, nonce: str, *_: Any) -> Mapping[str, Any]:
    return {"nonce": nonce}


def _committed(service: Any, request: bytes, *_: Any) -> Mapping[str, Any]:
    from shoal.protos.fleet_pb2 import CommitRequest

    return {"nonce": CommitRequest.FromString(request).nonce}


def _round(folder: Any, round: Any, point: Any) -> Mapping[str, Any]:
    return {"round": round.number}


S, H, W = Side.SERVER, Side.HOST, Side.WORKER
REMOTE, JOURNAL, KEPT = "shoal.server.remote", "shoal.server.journal", "shoal.server.checkpoints"
POINTS = (
    Point("opened", S, f"{JOURNAL}:Journal.open", "the round is in the journal, nobody is asked"),
    Point("asked", S, "shoal.server.hub:Hub.ask", "tasks are given out, no offer has left"),
    Point("offered", S, "shoal.server.hub:Hub.blob", "a client has its offer and fetches the content", before=True),
    Point("begun", S, "shoal.server.hub:Hub.begin", "an answer is announced, no byte is here"),
    Point("chunk", S, "shoal.server.spool:Incoming._write", "a chunk is written, not yet acknowledged"),
    Point("committing", S, "shoal.server.hub:Hub._take", "all bytes are here, nothing is examined", before=True),
    Point("synced", S, f"{JOURNAL}:sync_file", "the bytes are on the disk, the answer is not in the journal"),
    Point("taken", S, f"{JOURNAL}:Journal.take", "the answer is in the journal, no receipt has left", notes=_nonce),
    Point("accepted", S, "shoal.server.hub:Hub._take", "the receipt is made", notes=_client),
    Point("receipt", S, "shoal.server.service:_Service.commit", "the receipt goes to gRPC", notes=_committed),
    Point("summed", S, "shoal.server.coordinator:Coordinator._gather", "the round's sum is complete"),
    Point("settled", S, f"{REMOTE}:RemoteFleet.settle", "clients' states count, the model is not yet replaced"),
    Point("evaluated", S, "shoal.server.coordinator:Coordinator._evaluate_point", "evaluated, nothing is written"),
    Point("recorded", S, "shoal.server.runs:RunFolder.on_round_end", "the metrics are written", notes=_round),
    Point("audited", S, "shoal.server.audit:Audit.on_checkpoint", "the audit line is on the disk, no checkpoint is"),
    Point("written", S, f"{KEPT}:write_synced", "a checkpoint's files are there, aside", only=_is("state.json")),
    Point("renamed", S, f"{KEPT}:sync_folder", "the checkpoint has its name, unsynced", True, only=_is("checkpoints")),
    Point("kept", S, f"{KEPT}:write", "the checkpoint is on the disk, the journal still has its round"),
    Point("forgotten", S, f"{JOURNAL}:Journal.forget", "the journal has dropped the round"),
    Point("fetched", H, "shoal.client.transfer:Depot.fetch", "a task's content is here"),
    Point("delivering", H, "shoal.client.host:deliver", "the answer is in the outbox", before=True),
    Point("announced", H, "shoal.client.link:Stub", "the server expects the answer", of="Begin"),
    Point("sending", H, "shoal.client.transfer:upload_request", "amid the upload"),
    Point("uploaded", H, "shoal.client.link:Stub", "all bytes are across, not committed", of="Upload"),
    Point("received", H, "shoal.client.link:Stub", "the receipt is here, the outbox still full", of="Commit"),
    Point("given", W, "shoal.client.worker:_answer", "the worker has the task", before=True),
    Point("trained", W, "shoal.client.participant:Participant.train", "trained, nothing is kept"),
    Point("stated", W, "shoal.client.worker:keep_state", "the client's state is kept, no answer"),
    Point("half", W, "shoal.client.store:write_whole", "half an answer is in the outbox", only=_is(".payload")),
    Point("boxed", W, "shoal.client.store:Outbox.put", "the answer is in the outbox, the host does not know"),
)


def named(name: str) -> Point:
    """The point of that name; KeyError lists them all."""
    found = {point.name: point for point in POINTS}
    if name not in found:
        raise KeyError(f"{name!r} is no point; there are {', '.join(found)}")
    return found[name]


@dataclass(frozen=True)
class Arm:
    """Die at the ``count``-th passing of ``point`` from now on; ``whole``: a worker takes its host with it."""

    point: str
    count: int
    whole: bool = False
    serial: int = 0  # so that the same arm, given again, counts from the beginning

    def write(self, path: Path) -> None:
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(asdict(self)))
        aside.replace(path)


@dataclass(frozen=True)
class Wiring:
    """What a process is told by its driver: its name, where the trace and its arming file are, who the driver is.

    ``chunk`` is the size of chunks, small so that a small model has many. With ``order`` the trace has what reaches the
    disk when, too. While the file ``full`` exists, the server can write nothing.
    """

    name: str = "alone"
    trace: str | None = None
    arming: str | None = None
    driver: int | None = None
    chunk: int | None = None
    order: bool = False
    full: str | None = None
    first: Arm | None = None

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def read(cls) -> Wiring:
        told = json.loads(os.environ.get(VARIABLE, "{}"))
        first = told.pop("first", None)
        return cls(**told, first=None if first is None else Arm(**first))


class Watch:
    """Sees every point that is passed in this process."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring, self._left = wiring, dict[Arm, int]()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._trace = None if wiring.trace is None else os.open(wiring.trace, flags, 0o644)

    def passed(self, point: Point, notes: Mapping[str, Any]) -> None:
        """In whatever thread it happens."""
        self.note(point.name, notes)
        arm = self._arm()
        if arm is None or arm.point != point.name:
            return
        self._left[arm] = self._left.get(arm, arm.count) - 1
        if self._left[arm] == 0:
            self.note("died", {"at": point.name})
            if arm.whole and point.side is Side.WORKER:
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def note(self, what: str, notes: Mapping[str, Any]) -> None:
        """One write, which other processes' writes do not get into."""
        if self._trace is not None:
            line = {"time": time.monotonic(), "who": self._wiring.name, "pid": os.getpid(), "point": what, **notes}
            os.write(self._trace, json.dumps(line).encode() + b"\n")

    def _arm(self) -> Arm | None:
        if self._wiring.arming is None:
            return self._wiring.first
        try:
            return Arm(**json.loads(Path(self._wiring.arming).read_bytes()))
        except FileNotFoundError:
            return self._wiring.first


def install(points: Iterable[Point], passed: Passed) -> None:
    """Wrap the functions; AttributeError, which names the point, if one is not there any more."""
    for point in points:
        module, _, path = point.where.partition(":")
        owner: Any = importlib.import_module(module)
        *classes, name = path.split(".")
        try:
            for part in classes:
                owner = getattr(owner, part)
            original = getattr(owner, name)
        except AttributeError as error:
            raise AttributeError(f"point {point.name!r} is at {point.where}, which is not there: {error}") from error
        if point.of:
            original.__init__ = _making(point, original.__init__, passed)
        else:
            setattr(owner, name, _wrapped(point, original, passed))


def _making(point: Point, make: Callable[..., None], passed: Passed) -> Callable[..., None]:
    """A constructor after which the new object's own attribute is wrapped."""

    def made(self: Any, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        setattr(self, point.of, _awaited(point, getattr(self, point.of), passed))

    return made


def _wrapped(point: Point, original: Callable[..., Any], passed: Passed) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(original):
        return _awaited(point, original, passed)

    def call(*arguments: Any, **named: Any) -> Any:
        counts = point.only(*arguments)
        if counts and point.before:
            passed(point, point.notes(*arguments))
        found = original(*arguments, **named)
        if counts and not point.before:
            passed(point, point.notes(*arguments))
        return found

    return call


def _awaited(point: Point, original: Callable[..., Any], passed: Passed) -> Callable[..., Any]:
    async def call(*arguments: Any, **named: Any) -> Any:
        if point.before:
            passed(point, point.notes(*arguments))
        found = await original(*arguments, **named)
        if not point.before:
            passed(point, point.notes(*arguments))
        return found

    return call
