"""What the faults done to Flower are measured with: the end in closed form, the counting, the killing."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.flower_faults.__main__ import Outcome, counted, rendered
from benchmarks.flower_faults.actors import Actor, command, environment
from benchmarks.flower_faults.app import pulled
from benchmarks.flower_faults.faults import FAULTS


def test_the_end_is_that_of_federated_averaging_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulled, "SIZE", 7)
    model = np.zeros(7)
    for number in range(1, 5):
        trained = [pulled.point(node) + pulled.KEPT * (model - pulled.point(node)) for node in range(3)]
        model = np.average(trained, axis=0, weights=[pulled.examples(node) for node in range(3)])
        np.testing.assert_allclose(pulled.expected(3, number), model, rtol=1e-12)


def test_trials_are_counted_by_fault_and_those_of_a_broken_harness_are_not() -> None:
    one, other = FAULTS[1].name, FAULTS[4].name
    outcomes = [
        Outcome(other, 1, "finished:failed", submitted=2, finished=True, equal=True),
        Outcome(one, 1, "finished:completed", submitted=1, finished=True, equal=True),
        Outcome(one, 2, "finished:completed", submitted=1, finished=True, equal=False),
        Outcome(one, 3, "hung", submitted=3, finished=False, equal=True),
        Outcome(one, 4, problem="no processor"),
    ]
    table = rendered(counted(outcomes)).splitlines()

    assert table[-2:] == [f"| {one} | 3 | 2 | 1 | 1 | 0 |", f"| {other} | 1 | 0 | – | 1 | 1 |"]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the system does not tell")
def test_whatever_a_process_has_started_is_killed_with_it(tmp_path: Path) -> None:
    async def main() -> None:
        actor = Actor("a", ["sh", "-c", "sleep 100 & setsid sleep 101 & wait"], tmp_path, dict(os.environ))
        await actor.start()
        async with asyncio.timeout(10):
            while len(actor.members("sleep")) < 2 or not actor.members("101"):
                await asyncio.sleep(0.01)
        assert actor.alive
        await actor.kill()
        assert (actor.members(), actor.alive) == ([], False)

    asyncio.run(main())


def test_flower_says_no_word_to_anybody(tmp_path: Path) -> None:
    told = environment(tmp_path)

    assert (told["FLWR_TELEMETRY_ENABLED"], told["FLWR_DISABLE_UPDATE_CHECK"], told["FLWR_HOME"]) == (
        "0",
        "1",
        str(tmp_path),
    )
    with pytest.raises(FileNotFoundError, match="there is no flower-hyperlink on the path; install flwr"):
        command("flower-hyperlink")
