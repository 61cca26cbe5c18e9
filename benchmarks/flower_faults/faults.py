"""What is done to a deployment of Flower, once in its second round: the kinds of fault of ``tests/chaos``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from benchmarks.flower_faults.actors import Actor, send
from benchmarks.flower_faults.app.pulled import SECONDS, SIZE
from benchmarks.flower_faults.stage import Stage
from tests.chaos.proxy import Way, Weather

__all__ = ["FAULTS", "Fault"]

ROUND = 8.0  # seconds, about: a drawn time is within
UPLOAD = 8 * SIZE  # bytes
SLOW = 2e6  # bytes a second, at which an upload is caught


@dataclass(frozen=True)
class Fault:
    """``apart`` is what :class:`Stage` takes for it."""

    name: str
    strike: Callable[[Stage], Awaitable[None]]
    apart: bool = True


async def nothing(stage: Stage) -> None:
    return


async def sometime(stage: Stage) -> None:
    await asyncio.sleep(stage.rng.uniform(0, ROUND))


async def superlink(stage: Stage) -> None:
    """Only its own process; what is started again is the same command."""
    await sometime(stage)
    stage.down.add(stage.superlink)
    await stage.superlink.kill_alone()
    await stage.superlink.start()
    stage.down.clear()


async def server(stage: Stage) -> None:
    """SuperLink, SuperExec and ServerApp, as when their machine dies."""
    await sometime(stage)
    stage.down.update(stage.server)
    for actor in stage.server:
        await actor.kill()
    for actor in stage.server:
        await actor.start()
    stage.down.clear()


async def serverapp(stage: Stage) -> None:
    await sometime(stage)
    for actor in stage.server:
        for pid in actor.members("flwr-serverapp"):
            send(pid)


async def _training(stage: Stage) -> Actor:
    """A node that is drawn, at a drawn time of its training in round 2."""
    number = stage.rng.randrange(len(stage.nodes))
    await stage.until("training", 2, node=number)
    await asyncio.sleep(stage.rng.uniform(0, 0.7 * SECONDS))
    return stage.nodes[number]


async def node_training(stage: Stage) -> None:
    """SuperNode, its SuperExec and ClientApp; then the same command again."""
    await _again(stage, await _training(stage))


async def clientapp(stage: Stage) -> None:
    node = await _training(stage)
    for pid in node.members("flwr-clientapp"):
        send(pid)


async def node_upload(stage: Stage) -> None:
    """When a drawn part of its answer has left."""
    number = stage.rng.randrange(len(stage.nodes))
    proxy, part = stage.proxies[number], stage.rng.uniform(0.1, 0.9) * UPLOAD
    await stage.until("trained", 2, node=number)
    proxy.set(Weather(rate=SLOW), Way.UP)
    before = proxy.forwarded[Way.UP]
    async with asyncio.timeout(60):
        while proxy.forwarded[Way.UP] < before + part:
            await asyncio.sleep(0.01)
    stage.down.add(stage.nodes[number])
    await stage.nodes[number].kill()
    proxy.clear()
    await _again(stage, stage.nodes[number])


async def _again(stage: Stage, node: Actor) -> None:
    stage.down.add(node)
    await node.kill()
    await node.start()
    stage.down.discard(node)


async def cut(stage: Stage) -> None:
    await sometime(stage)
    for proxy in stage.proxies:
        proxy.cut()


async def torn(stage: Stage) -> None:
    """Amid the bytes of an answer."""
    await stage.until("trained", 2 * len(stage.nodes) - 1)
    for proxy in stage.proxies:
        proxy.tear(Way.UP, UPLOAD // 4)


async def refused(stage: Stage) -> None:
    await sometime(stage)
    for proxy in stage.proxies:
        proxy.refusing = True
        proxy.cut()
    await asyncio.sleep(stage.rng.uniform(0.5, 6))
    for proxy in stage.proxies:
        proxy.clear()


async def stalled(stage: Stage) -> None:
    await sometime(stage)
    for proxy in stage.proxies:
        proxy.set(Weather(stalled=True))
    await asyncio.sleep(stage.rng.uniform(0.5, 8))
    for proxy in stage.proxies:
        proxy.clear()


async def half_open(stage: Stage) -> None:
    await sometime(stage)
    for proxy in stage.proxies:
        proxy.silence()


async def late(stage: Stage) -> None:
    for proxy in stage.proxies:
        proxy.set(Weather(delay=stage.rng.uniform(0.05, 0.3), jitter=0.1))
    await asyncio.sleep(ROUND)
    for proxy in stage.proxies:
        proxy.clear()


FAULTS = (
    Fault("none", nothing),
    Fault("SuperLink killed, SuperExec a service of its own", superlink),
    Fault("SuperLink killed, SuperExec started by it (default)", superlink, apart=False),
    Fault("SuperLink, SuperExec and ServerApp killed", server),
    Fault("ServerApp killed", serverapp),
    Fault("SuperNode killed while it trains", node_training),
    Fault("SuperNode killed amid its upload", node_upload),
    Fault("only its ClientApp killed while it trains", clientapp),
    Fault("all connections reset", cut),
    Fault("connections torn amid an upload", torn),
    Fault("nobody can connect for 0.5 to 6 s", refused),
    Fault("no byte moves for 0.5 to 8 s", stalled),
    Fault("half-open connections", half_open),
    Fault("50 to 300 ms of delay, with jitter", late),
)
