"""Faults strike a running trial once, and say whom they hit and when the harm was over. Here: who is killed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from tests.chaos.cast import Actor
from tests.chaos.points import POINTS, Side
from tests.chaos.stage import Stage

__all__ = ["Blow", "Fault", "Strike", "soon", "up_again"]

SOON = 0.6  # seconds: a kill at a drawn time comes within, which is a round or two
OFTEN = 3  # passings of a point, within which a kill at it comes


@dataclass(frozen=True)
class Blow:
    """Since when things may recover, and whose answer shows that they have (empty: anybody's)."""

    healed: float
    whose: Collection[str] = ()


Strike = Callable[[Stage], Awaitable[Blow | None]]


@dataclass(frozen=True)
class Fault:
    """``strike`` gives None if the run was over before.

    ``rows`` are those of :mod:`tests.chaos.catalogue` that it shows. The marks say where a fault makes sense: in a
    ``lenient`` world, with ``tls``, with a strategy whose clients keep a state, in a trial that may take ``long``.
    """

    name: str
    group: str
    strike: Strike
    rows: tuple[int, ...] = ()
    lenient: bool = False
    tls: bool = False
    stateful: bool = False
    long: bool = False


async def up_again(stage: Stage, *actors: Actor, whose: Collection[str] = ()) -> Blow | None:
    since = time.monotonic()
    return Blow(since, whose) if await stage.start(*actors) else None


def _host(stage: Stage) -> Actor:
    return stage.rng.choice(stage.hosts)


def server_at(point: str) -> Strike:
    async def strike(stage: Stage) -> Blow | None:
        died = await stage.killed(stage.server, point, stage.rng.randint(1, OFTEN))
        return await up_again(stage, stage.server) if died else None

    return strike


def client_at(point: str) -> Strike:
    """The process of clients; at a point of its worker both, as when a machine fails."""

    async def strike(stage: Stage) -> Blow | None:
        actor = _host(stage)
        if not await stage.killed(actor, point, stage.rng.randint(1, OFTEN), whole=True):
            return None
        return await up_again(stage, actor, whose=actor.clients)

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


async def soon(stage: Stage) -> None:
    """At a drawn time."""
    await asyncio.sleep(stage.rng.uniform(0, SOON))


async def server_sometime(stage: Stage) -> Blow | None:
    await soon(stage)
    await stage.kill(stage.server)
    return await up_again(stage, stage.server)


async def client_sometime(stage: Stage) -> Blow | None:
    actor = _host(stage)
    await soon(stage)
    await stage.kill(actor)
    return await up_again(stage, actor, whose=actor.clients)


async def everybody(stage: Stage) -> Blow | None:
    """All processes in the moment that the server is at a drawn point."""
    points = [point.name for point in POINTS if point.side is Side.SERVER]
    if not await stage.killed(stage.server, stage.rng.choice(points), stage.rng.randint(1, OFTEN)):
        return None
    await stage.kill(*stage.actors)
    return await up_again(stage, *stage.actors)


async def server_twice(stage: Stage) -> Blow | None:
    """Again while it recovers."""
    await soon(stage)
    await stage.kill(stage.server)
    if not await stage.start(stage.server):
        return None
    point = stage.rng.choice(("opened", "asked", "begun", "chunk", "committing", "taken", "accepted", "summed"))
    died = await stage.killed(stage.server, point, 1)
    return await up_again(stage, stage.server) if died else None


async def client_then_server(stage: Stage) -> Blow | None:
    """The server dies while a client is away."""
    actor = _host(stage)
    await stage.kill(actor)
    await soon(stage)
    await stage.kill(stage.server)
    return await up_again(stage, stage.server, actor)


async def server_stopped(stage: Stage) -> Blow | None:
    """As a service manager does before an upgrade: the round may end."""
    await soon(stage)
    await stage.stop(stage.server)
    return await up_again(stage, stage.server)


async def client_stopped(stage: Stage) -> Blow | None:
    actor = _host(stage)
    await soon(stage)
    await stage.stop(actor)
    return await up_again(stage, actor, whose=actor.clients)


def frozen(server: bool) -> Strike:
    """As a virtual machine that is moved, or a laptop that is shut: for longer than heartbeats may miss, or shorter."""

    async def strike(stage: Stage) -> Blow | None:
        actor = stage.server if server else _host(stage)
        await soon(stage)
        with actor.frozen():
            await asyncio.sleep(stage.rng.uniform(0.5, 8))
        return Blow(time.monotonic(), actor.clients)

    return strike
