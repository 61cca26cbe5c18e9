"""Faults of the network: what the proxy does to connections while everybody lives."""

from __future__ import annotations

import asyncio
import time

from tests.chaos.faults import Blow, soon
from tests.chaos.proxy import Way, Weather
from tests.chaos.stage import Stage

__all__ = [
    "cut_all",
    "cut_one",
    "flipped",
    "forgotten",
    "half_open",
    "late",
    "losing",
    "refused",
    "refused_long",
    "slow",
    "stalled",
    "torn",
]

FRAME = 4000  # bytes, within which a connection is torn: a few HTTP/2 frames


async def cut_all(stage: Stage) -> Blow | None:
    await soon(stage)
    stage.proxy.cut()
    return Blow(time.monotonic())


async def cut_one(stage: Stage) -> Blow | None:
    await soon(stage)
    stage.proxy.cut(1)
    return Blow(time.monotonic())


async def refused(stage: Stage) -> Blow | None:
    return await _refused(stage, 0.5, 6)


async def refused_long(stage: Stage) -> Blow | None:
    """For most of a lease; clients call again with longer and longer pauses."""
    return await _refused(stage, 20, 60)


async def _refused(stage: Stage, least: float, most: float) -> Blow | None:
    stage.proxy.refusing = True
    stage.proxy.cut()
    await asyncio.sleep(stage.rng.uniform(least, most))
    stage.proxy.clear()
    return Blow(time.monotonic())


async def stalled(stage: Stage) -> Blow | None:
    """Beyond the heartbeats that may be missed, or within."""
    stage.proxy.set(Weather(stalled=True), *stage.rng.choice(((Way.UP,), (Way.DOWN,), tuple(Way))))
    await asyncio.sleep(stage.rng.uniform(0.5, 8))
    stage.proxy.clear()
    return Blow(time.monotonic())


async def half_open(stage: Stage) -> Blow | None:
    await soon(stage)
    stage.proxy.silence(stage.rng.choice((1, None)))
    return Blow(time.monotonic(), stage.world.names)


async def forgotten(stage: Stage) -> Blow | None:
    """Packets of connections that stand go nowhere; new ones come from other ports. Uploads are slow, to be caught."""
    stage.proxy.set(Weather(rate=5_000), Way.UP)
    since = time.monotonic()
    there = lambda: bool(stage.trace.of("chunk", since)) or stage.over  # noqa: E731
    await stage.until(there, stage.patience, "no chunk")
    stage.proxy.silence()
    stage.proxy.clear()
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


async def losing(stage: Stage) -> Blow | None:
    stage.proxy.set(Weather(loss=0.3))
    await asyncio.sleep(stage.rng.uniform(2, 8))
    stage.proxy.clear()
    return Blow(time.monotonic())


async def late(stage: Stage) -> Blow | None:
    stage.proxy.set(Weather(delay=stage.rng.uniform(0.05, 0.3), jitter=0.1))
    await asyncio.sleep(stage.rng.uniform(1, 5))
    stage.proxy.clear()
    return Blow(time.monotonic())
