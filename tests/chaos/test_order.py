"""A receipt leaves when its answer is on the disk: bytes, then their name, then the journal's row, then the receipt."""

from __future__ import annotations

import asyncio
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.chaos.stage import served
from tests.chaos.world import World

WORLD = replace(World.draw(random.Random(0), small=True), rounds=2, clients_every=0)
STRACE = shutil.which("strace")


def receipts(events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Where in the trace the receipt of each task went to gRPC."""
    return {event["nonce"]: place for place, event in enumerate(events) if event["point"] == "receipt"}


@dataclass(frozen=True)
class Served:
    """What a server said of itself; the calls that the system saw, where it can be asked."""

    events: Sequence[Mapping[str, Any]]
    calls: Sequence[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("served")
    log = folder / "calls"
    traced = (str(STRACE), "-D", "-f", "-y", "-qq", "-s", "400", "-e", "trace=fsync,fdatasync,write", "-o", str(log))
    events = asyncio.run(served(WORLD, folder, order=True, under=traced if STRACE else ())).trace.events
    return Served(events, log.read_text().splitlines() if STRACE else [])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.fault(4)
def test_bytes_folder_journal_and_receipt_come_in_this_order(run: Served) -> None:
    events = run.events
    found = receipts(events)

    assert len(found) == WORLD.rounds * WORLD.sites
    for nonce, receipt in found.items():
        before = events[:receipt]
        taken = next(place for place, e in enumerate(before) if e["point"] == "taken" and e["nonce"] == nonce)
        synced = next(place for place, e in enumerate(before) if _path(e).endswith(f"/round/{nonce}.payload"))
        mine = [e for e in before[synced:taken] if e.get("thread") == before[synced]["thread"]]
        assert [(e["point"], _path(e).rpartition("/")[2]) for e in mine] == [
            ("fsync", f"{nonce}.payload"),
            ("fsync", "round"),
            ("commit", ""),
        ]


def _path(event: Mapping[str, Any]) -> str:
    return str(event.get("path", ""))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(STRACE is None, reason="strace is not installed")
@pytest.mark.fault(4)
def test_the_system_is_asked_to_sync_the_journal_before_each_receipt(run: Served) -> None:
    calls, found = run.calls, receipts(run.events)

    assert len(found) == WORLD.rounds * WORLD.sites
    for nonce in found:
        payload = _first(calls, rf"f(data)?sync\(\d+<.*/round/{nonce}\.payload>")
        folder = _first(calls, r"f(data)?sync\(\d+<.*/round>", payload)
        journal = _first(calls, r"f(data)?sync\(\d+<.*/journal\.sqlite-wal>", folder)
        receipt = _first(calls, rf"write\(.*receipt.*{nonce}")
        assert payload < folder < journal < receipt


def _first(calls: Sequence[str], pattern: str, after: int = 0) -> int:
    """The line of the first such call from there on, as the system ended it."""
    for place in range(after, len(calls)):
        if re.search(pattern, calls[place]):
            return place
    raise AssertionError(f"no call like {pattern}")
