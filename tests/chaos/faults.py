"""The faults: each strikes a running trial once, and says whom it hit and when the harm was over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from tests.chaos.cast import Actor
from tests.chaos.points import POINTS, Side
from tests.chaos.proxy import Way, Weather
from tests.chaos.stage import Stage

__all__ = ["DECK", "Blow", "Fault"]

SOON = 0.6  # seconds: a kill at a drawn time comes within, which is a round or two
OFTEN = 3  # passings of a point, within which a kill at it comes
FRAME = 4000  # bytes, within which a connection is torn: a few HTTP/2 frames


@dataclass(frozen=True)
class Blow:
    """Since when things may recover, and whose answer shows that they have (empty: anybody's)."""

    healed: float
    whose: Collection[str] = ()


Strike = Callable[[Stage], Awaitable[Blow | None]]


@dataclass(frozen=True)
class Fault:
    """``strike`` gives None if the run was over before.

    The marks say where a fault makes sense: in a ``lenient`` world, with ``tls``, with a strategy whose clients keep a
    state, in a trial that may take ``long``.
    """

    name: str
    group: str
    strike: Strike
    lenient: bool = False
    tls: bool = False
    stateful: bool = False
    long: bool = False


# --- kills -----------------------------------------------------------------------------------------------------------


async def _up_again(stage: Stage, *actors: Actor, whose: Collection[str] = ()) -> Blow | None:
    since = time.monotonic()
    return Blow(since, whose) if await stage.start(*actors) else None


def _host(stage: Stage) -> Actor:
    return stage.rng.choice(stage.hosts)


def server_at(point: str) -> Strike:
    async def strike(stage: Stage) -> Blow | None:
        died = await stage.killed(stage.server, point, stage.rng.randint(1, OFTEN))
        return await _up_again(stage, stage.server) if died else None

    return strike


def client_at(point: str) -> Strike:
    """The process of clients; at a point of its worker both, as when a machine fails."""

    async def strike(stage: Stage) -> Blow | None:
        actor = _host(stage)
        if not await stage.killed(actor, point, stage.rng.randint(1, OFTEN), whole=True):
            return None
        return await _up_again(stage, actor, whose=actor.clients)

    return strike


def worker_at(point: str) -> Strike:
    """Only the process that trains: its client's task fails, and the next one is done."""

    async def strike(stage: Stage) -> Blow | None:
        actor, before = _host(stage), time.monotonic()
        actor.arm(point, stage.rng.randint(1, OFTEN))
        died = lambda: bool(stage.trace.of("died", before, actor.name))  # noqa: E731
        await stage.until(lambda: died() or stage.over, stage.patience, f"{actor.name} not at {point!r}")
        actor.disarm()
        return Blow(time.monotonic(), actor.clients) if died() else None

    return strike


async def _draw_time(stage: Stage) -> None:
    await asyncio.sleep(stage.rng.uniform(0, SOON))


async def server_sometime(stage: Stage) -> Blow | None:
    await _draw_time(stage)
    await stage.kill(stage.server)
    return await _up_again(stage, stage.server)


async def client_sometime(stage: Stage) -> Blow | None:
    actor = _host(stage)
    await _draw_time(stage)
    await stage.kill(actor)
    return await _up_again(stage, actor, whose=actor.clients)


async def everybody(stage: Stage) -> Blow | None:
    """All processes in the moment that the server is at a drawn point."""
    points = [point.name for point in POINTS if point.side is Side.SERVER]
    if not await stage.killed(stage.server, stage.rng.choice(points), stage.rng.randint(1, OFTEN)):
        return None
    await stage.kill(*stage.actors)
    return await _up_again(stage, *stage.actors)


async def server_twice(stage: Stage) -> Blow | None:
    """Again while it recovers."""
    await _draw_time(stage)
    await stage.kill(stage.server)
    if not await stage.start(stage.server):
        return None
    point = stage.rng.choice(("opened", "asked", "begun", "chunk", "committing", "taken", "accepted", "summed"))
    died = await stage.killed(stage.server, point, 1)
    return await _up_again(stage, stage.server) if died else None


async def client_then_server(stage: Stage) -> Blow | None:
    """The server dies while a client is away."""
    actor = _host(stage)
    await stage.kill(actor)
    await _draw_time(stage)
    await stage.kill(stage.server)
    return await _up_again(stage, stage.server, actor)


async def server_stopped(stage: Stage) -> Blow | None:
    """As a service manager does before an upgrade: the round may end."""
    await _draw_time(stage)
    await stage.stop(stage.server)
    return await _up_again(stage, stage.server)


async def client_stopped(stage: Stage) -> Blow | None:
    actor = _host(stage)
    await _draw_time(stage)
    await stage.stop(actor)
    return await _up_again(stage, actor, whose=actor.clients)


def frozen(server: bool) -> Strike:
    """As a virtual machine that is moved, or a laptop that is shut: for longer than heartbeats may miss, or shorter."""

    async def strike(stage: Stage) -> Blow | None:
        actor = stage.server if server else _host(stage)
        await _draw_time(stage)
        with actor.frozen():
            await asyncio.sleep(stage.rng.uniform(0.5, 8))
        return Blow(time.monotonic(), actor.clients)

    return strike


# --- the network -----------------------------------------------------------------------------------------------------


async def cut_all(stage: Stage) -> Blow | None:
    await _draw_time(stage)
    stage.proxy.cut()
    return Blow(time.monotonic())


async def cut_one(stage: Stage) -> Blow | None:
    await _draw_time(stage)
    stage.proxy.cut(1)
    return Blow(time.monotonic())


async def refused(stage: Stage) -> Blow | None:
    stage.proxy.refusing = True
    stage.proxy.cut()
    await asyncio.sleep(stage.rng.uniform(0.5, 6))
    stage.proxy.clear()
    return Blow(time.monotonic())


async def stalled(stage: Stage) -> Blow | None:
    """Beyond the heartbeats that may be missed, or within."""
    stage.proxy.set(Weather(stalled=True), *stage.rng.choice(((Way.UP,), (Way.DOWN,), tuple(Way))))
    await asyncio.sleep(stage.rng.uniform(0.5, 8))
    stage.proxy.clear()
    return Blow(time.monotonic())


async def half_open(stage: Stage) -> Blow | None:
    await _draw_time(stage)
    stage.proxy.silence(stage.rng.choice((1, None)))
    return Blow(time.monotonic(), stage.world.names)


async def torn(stage: Stage) -> Blow | None:
    stage.proxy.tear(stage.rng.choice(tuple(Way)), FRAME)
    since = time.monotonic()
    await stage.answers(stage.world.sites)
    return Blow(since)


async def flipped(stage: Stage) -> Blow | None:
    stage.proxy.flip(stage.rng.choice(tuple(Way)), FRAME)
    since = time.monotonic()
    await stage.answers(stage.world.sites)
    return Blow(since)


async def slow(stage: Stage) -> Blow | None:
    stage.proxy.set(Weather(rate=stage.rng.uniform(3_000, 30_000)), stage.rng.choice(tuple(Way)))
    await asyncio.sleep(stage.rng.uniform(1, 5))
    stage.proxy.clear()
    return Blow(time.monotonic())


async def late(stage: Stage) -> Blow | None:
    stage.proxy.set(Weather(delay=stage.rng.uniform(0.05, 0.3), jitter=0.1))
    await asyncio.sleep(stage.rng.uniform(1, 5))
    stage.proxy.clear()
    return Blow(time.monotonic())


def _at_points() -> list[Fault]:
    found = []
    for point in POINTS:
        if point.side is Side.SERVER:
            found.append(Fault(f"server killed: {point.means}", "server", server_at(point.name)))
        else:
            stateful = point.name == "stated"
            name = f"client killed: {point.means}"
            found.append(Fault(name, "client", client_at(point.name), stateful=stateful))
    return found


DECK = (
    *_at_points(),
    Fault("server killed at a drawn time", "server", server_sometime),
    Fault("server killed again while it recovers", "server", server_twice),
    Fault("server killed while a client is away", "server", client_then_server),
    Fault("everybody killed at once", "all", everybody),
    Fault("server stopped and started again", "server", server_stopped),
    Fault("server frozen for 0.5 to 8 s", "server", frozen(server=True)),
    Fault("client killed at a drawn time", "client", client_sometime),
    Fault("client stopped and started again", "client", client_stopped),
    Fault("client frozen for 0.5 to 8 s", "client", frozen(server=False)),
    *(
        Fault(f"only its worker killed: {point.means}", "worker", worker_at(point.name), lenient=True)
        for point in POINTS
        if point.side is Side.WORKER and point.name != "stated"
    ),
    Fault("all connections reset", "network", cut_all),
    Fault("one connection reset", "network", cut_one),
    Fault("nobody can connect for 0.5 to 6 s", "network", refused),
    Fault("no byte moves for 0.5 to 8 s", "network", stalled),
    Fault("half-open connections", "network", half_open, long=True),
    Fault("connections torn amid a frame", "network", torn),
    Fault("a bit flips (TLS)", "network", flipped, tls=True),
    Fault("slow readers, 3 to 30 kB/s", "network", slow),
    Fault("50 to 300 ms of delay, with jitter", "network", late),
)
