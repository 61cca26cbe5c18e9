"""Every point is where the table says, and is reached in an undisturbed run."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.points import POINTS, Arm, Side, Watch, Wiring, install, named
from tests.chaos.stage import served
from tests.chaos.world import World, differences

ROOT = Path(__file__).parents[2]
WORLD = replace(World.draw(random.Random(0), small=True), strategy="scaffold", rounds=2, clients_every=1)


def test_each_point_has_a_name_of_its_own() -> None:
    assert len({point.name for point in POINTS}) == len(POINTS)
    assert {point.side for point in POINTS} == set(Side)
    with pytest.raises(KeyError, match="'nowhere' is no point; there are opened, asked"):
        named("nowhere")


def test_a_function_that_was_renamed_is_missed() -> None:
    gone = replace(named("asked"), where="shoal.server.hub:Hub.beg")
    with pytest.raises(AttributeError, match=r"point 'asked' is at shoal\.server\.hub:Hub\.beg, which is not"):
        install([gone], Watch(Wiring()).passed)


def test_a_process_dies_at_the_passing_it_was_told_and_not_before(tmp_path: Path) -> None:
    arming = tmp_path / "arm"
    Arm("asked", 3).write(arming)
    wiring = Wiring(trace=str(tmp_path / "trace"), arming=str(arming))
    program = (
        "from tests.chaos.points import *; from tests.chaos.points import Watch\n"
        "watch = Watch(Wiring.read())\n"
        "for name in ['asked', 'begun', 'asked', 'begun', 'asked', 'begun']: watch.passed(named(name), {})"
    )
    environment = os.environ | wiring.environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment)

    assert done.returncode == -signal.SIGKILL
    points = [json.loads(line)["point"] for line in (tmp_path / "trace").read_text().splitlines()]
    assert points == ["asked", "begun", "asked", "begun", "asked", "died"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_point_is_reached_in_an_undisturbed_run(tmp_path: Path) -> None:
    stage = asyncio.run(served(WORLD, tmp_path))
    reached = {str(event["point"]) for event in stage.trace.events}
    assert {point.name for point in POINTS} <= reached
    assert not list(differences(WORLD, stage.run, WORLD.simulate(tmp_path, stage.run).path))
