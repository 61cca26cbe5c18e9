"""The simulator's benchmark does equal work, and fails where it does not. What it measures is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Benchmarks are run from the root of the repository, and imported from there."""
    monkeypatch.syspath_prepend(str(ROOT))
    yield


def test_every_peer_has_a_recipe_and_every_workload_a_net() -> None:
    from benchmarks.nets import NETS
    from benchmarks.peers import environments
    from benchmarks.roster import CONTENDERS, ENVIRONMENT, PEERS
    from benchmarks.workloads import WORKLOADS

    assert set(ENVIRONMENT) == set(PEERS) < set(CONTENDERS)
    assert set(ENVIRONMENT.values()) == set(environments.NAMES)
    assert {work.net for work in WORKLOADS.values()} == set(NETS)


def test_nets_have_the_published_sizes() -> None:
    from benchmarks.nets import NETS, loaded, weights_of

    sizes = {name: len(weights_of(NETS[name]())) for name in ("logistic", "2nn", "lenet", "pfl-cnn")}

    assert sizes == {"logistic": 7_850, "2nn": 199_210, "lenet": 62_006, "pfl-cnn": 1_626_442}
    given = np.arange(7_850, dtype=np.float32)
    assert np.array_equal(weights_of(loaded("logistic", given)), given)


def test_skewed_clients_lie_between_the_bounds() -> None:
    from benchmarks.workloads import SKEW, WORKLOADS

    sizes = WORKLOADS["skewed"].sizes()

    assert SKEW[0] <= sizes.min() < 0.2 * np.median(sizes) < 5 * np.median(sizes) < sizes.max() <= SKEW[1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), [("test", {}), ("test", {"registered": 1000}), ("gru", {"cohort": 2})])
def test_shoal_draws_what_the_task_says(name: str, settings: dict[str, Any]) -> None:
    from benchmarks.contenders import plain
    from benchmarks.engines import simulated
    from benchmarks.tasks import Task
    from benchmarks.workloads import WORKLOADS, prepared

    with prepared(replace(WORKLOADS[name], rounds=2, **settings)) as task:
        by_hand, twin = plain(task), Task(task.folder)
        by_shoal, used = simulated(twin, "lean", 0)

        assert np.linalg.norm(by_shoal - by_hand) < 1e-4 * np.linalg.norm(by_hand - task.initial)
        assert used == "lean"
        assert len(task.laps) == len(twin.laps) == 2


@pytest.mark.slow
def test_the_floor_times_every_round_and_the_machine() -> None:
    from benchmarks.floor import floor
    from benchmarks.workloads import WORKLOADS, prepared

    with prepared(replace(WORKLOADS["lenet"], shards=2, cohort=1, rounds=2)) as task:
        found = floor(task)

    assert len(found["seconds"]) == 2 and min(found["seconds"]) > 0
    assert found["layout"] in ("contiguous", "channels_last")
    assert min(found["peak_gflops"], found["copy_gbytes"], found["flop_of_an_example"]) > 0
    assert found["bytes_of_an_example"] == 3 * 32 * 32 * 4 + 8


def test_figures_are_medians_of_ratios_and_wrong_weights_are_found() -> None:
    from benchmarks.measure import Answer, Contender
    from benchmarks.report import figures, put, table, wrong
    from benchmarks.workloads import WORKLOADS, prepared

    def runs(weights: float, *seconds: float) -> list[Answer]:
        return [Answer([s, s], 1.0, 10**6, np.full(7850, weights), {}) for s in seconds]

    cast = {name: Contender((), cores) for name, cores in [("plain", 1), ("shoal-lean-2", 2), ("pfl-1", 1)]}
    with prepared(WORKLOADS["test"]) as task:
        made: Any = {
            "plain": runs(1.0, 1.0, 2.0, 9.0),
            "shoal-lean-2": runs(1.1, 0.5, 0.5, 1.0),
            "pfl-1": "exit code 1",
        }
        lines = figures(task, made, cast, {3: np.full(7850, 1.0)})

    assert lines["shoal-lean-2"]["plain_over_this"] == 4.0
    assert lines["shoal-lean-2"]["core_us_per_step"] == pytest.approx(1e6 * 0.5 * 2 / (8 * 3))
    assert lines["plain"]["difference"] == 0 and lines["pfl-1"] == {"failed": "exit code 1"}
    assert list(wrong(WORKLOADS["test"], lines, cast)) == ["pfl-1", "shoal-lean-2"]
    page = (ROOT / "docs" / "performance.md").read_text()
    assert "exit code 1" in put(page, "peers", table(lines))
    with pytest.raises(ValueError, match="no place for 'other'"):
        put(page, "other", "")


@pytest.mark.slow
def test_the_benchmark_runs_each_in_a_process_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "results" / "simulation.json"
    which = ["--only", "test", "--contenders", "floor", "shoal-lean-2"]
    command = [sys.executable, "-m", "benchmarks.simulation", "--quick", "--force", *which, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert {"machine", "versions", "load_average", "command"} <= report["test"]["circumstances"].keys()
    lines = report["test"]["lines"]
    assert list(lines) == ["plain", "floor", "shoal-lean-2"]
    assert lines["plain"]["difference"] == 0 < lines["shoal-lean-2"]["of_the_way"] < 1e-4
    assert lines["floor"]["ms_per_round"] > 0 and lines["floor"]["first_round_seconds"] is None
    shoal = lines["shoal-lean-2"]
    assert all(shoal[key] > 0 for key in ("ms_per_round", "first_round_seconds", "part_of_floor", "peak_megabytes"))
