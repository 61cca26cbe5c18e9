"""Faults of the server's disk: full for a while, or damaged when it comes back."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from tests.chaos.faults import Blow, soon, up_again
from tests.chaos.stage import Stage

__all__ = ["checkpoint_damaged", "full", "journal_torn", "payload_damaged"]

TAKEN = "taken"  # the point at which a server is killed whose disk is damaged then: there is something to damage


async def full(stage: Stage) -> Blow | None:
    """Everybody waits until there is room again."""
    await soon(stage)
    stage.server.full.touch()
    try:
        await asyncio.sleep(stage.rng.uniform(0.2, 3))
    finally:
        stage.server.full.unlink()
    return Blow(time.monotonic())


async def checkpoint_damaged(stage: Stage) -> Blow | None:
    """The one before it is as good, and the round after it is made again."""
    return await _damaged(stage, "checkpoints/round-*/*", newest=True)


async def payload_damaged(stage: Stage) -> Blow | None:
    """Its client is asked again, although it has a receipt."""
    return await _damaged(stage, "round/*.payload")


async def journal_torn(stage: Stage) -> Blow | None:
    """The last answers are not in the journal, as after a power cut of a disk that lies."""
    return await _damaged(stage, "round/journal.sqlite-wal", tear=True)


async def _damaged(stage: Stage, pattern: str, *, newest: bool = False, tear: bool = False) -> Blow | None:
    """Kill the server, then turn a bit of a file that it wrote, or tear it off."""
    if not await stage.killed(stage.server, TAKEN, stage.rng.randint(1, stage.world.sites)):
        return None
    found = sorted(stage.run.glob(pattern))
    if newest:
        rounds = sorted({path.parent for path in found})
        found = [path for path in found if path.parent == rounds[-1]] if len(rounds) > 1 else []
    if found:
        _damage(stage.rng.choice(found), stage, tear or stage.rng.random() < 0.5)
    return await up_again(stage, stage.server)


def _damage(path: Path, stage: Stage, tear: bool) -> None:
    data = bytearray(path.read_bytes())
    if not data:
        return
    place = stage.rng.randrange(len(data))
    data[place] ^= 1 << stage.rng.randrange(8)
    path.write_bytes(data[:place] if tear else data)
