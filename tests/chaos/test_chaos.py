"""A trial of what ``make chaos`` does for long."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.chaos.driver import Limits, campaign
from tests.chaos.outcome import Hit, Outcome, told
from tests.chaos.table import counted, rendered
from tests.chaos.world import World

FEW = Limits(faults=3, patience=60.0, small=True, long=False)
SEED, GROUPS = 337, {"all", "client", "server"}  # draws one fault of each, and clients that keep a state


@pytest.mark.slow
@pytest.mark.timeout(400)  # on a machine that does other things too
def test_whatever_is_killed_the_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    outcomes = list[Outcome]()
    asyncio.run(campaign([SEED], 1, lambda: True, tmp_path, FEW, outcomes.append))

    (outcome,) = outcomes
    assert not outcome.problems, told(outcome)
    assert {hit.group for hit in outcome.hits} == GROUPS, "the deck has changed: take a seed that draws these"
    assert len(outcome.hits) == FEW.faults
    assert all(hit.survived for hit in outcome.hits)


def test_a_seed_draws_the_same_world_again() -> None:
    assert World.draw(random.Random(5)) == World.draw(random.Random(5))
    assert len({World.draw(random.Random(seed)) for seed in range(20)}) > 15


def test_results_are_counted_by_fault() -> None:
    name, world = "server killed at a drawn time", World.draw(random.Random(0))
    good = Outcome(1, world, [Hit(name, "server", True, seconds) for seconds in (1.0, 2.0, 3.0)])
    bad = Outcome(2, world, [Hit(name, "server", True, None), Hit("all connections reset", "network")], ["it hung"])
    results = counted([good, bad])

    assert [row["fault"] for row in results["rows"]] == [name, "all connections reset"]
    assert results["rows"][0] | {"recovery_p95": 2.9} == {
        "fault": name,
        "group": "server",
        "trials": 4,
        "survived": 4,
        "identical": 3,
        "recovery_p50": 2.0,
        "recovery_p95": 2.9,
        "hits": [[True, True, 1.0], [True, True, 2.0], [True, True, 3.0], [True, False, None]],
    }
    assert counted([bad], counted([good]))["rows"] == results["rows"]
    assert results["failed"] == [{"seed": 2, "problems": ["it hung"], "again": bad.command}]
    assert "| all connections reset | 1 | 0 | 0 | – | – |" in rendered(results)
