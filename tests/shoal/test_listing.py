"""The list of runs: how each stands, and what tells them apart."""

from __future__ import annotations

from pathlib import Path

from shoal.listing import listed, told_apart
from shoal.server.runs import RunFolder


def test_only_what_differs_within_a_name_tells_runs_apart() -> None:
    settings = [
        {"name": "a", "lr": 1, "seed": 0},
        {"name": "a", "lr": 2, "seed": 0, "strategy.mu": 0.1},
        {"name": "b", "lr": 3, "seed": 1},
    ]

    assert told_apart(settings) == [{"lr": 1}, {"lr": 2, "strategy.mu": 0.1}, {}]
    assert told_apart(settings[1::-1]) == [{"lr": 2, "strategy.mu": 0.1}, {"lr": 1}]
    assert told_apart([]) == []


def run(out: Path, settings: str, status: str = "finished") -> Path:
    folder = RunFolder.create(out, "a")
    folder.write("experiment.toml", settings)
    folder.write("summary.json", {"status": status, "rounds": 3})
    folder.close()
    return folder.path


def test_settings_have_the_names_of_overrides(tmp_path: Path) -> None:
    run(tmp_path, 'name = "a"\n[strategy]\nname = "fedavg"\n[data.partition]\nalpha = 0.1')
    run(tmp_path, 'name = "a"\n[strategy]\nname = "fedprox"\nmu = 0.5\n[data.partition]\nalpha = 0.3')
    first, second = listed(tmp_path)

    assert first["differs"] == {"strategy": "fedavg", "data.partition.alpha": 0.1}
    assert second["differs"] == {"strategy": "fedprox", "strategy.mu": 0.5, "data.partition.alpha": 0.3}


def test_a_run_that_nobody_is_at_any_more_was_killed(tmp_path: Path) -> None:
    run(tmp_path, 'name = "a"', status="running")

    assert [row["status"] for row in listed(tmp_path)] == ["killed"]


def test_damaged_files_are_no_obstacle(tmp_path: Path) -> None:
    run(tmp_path, 'name = "a"\nseed = 1')
    path = run(tmp_path, "name = ")
    (path / "summary.json").write_text("{")
    rows = listed(tmp_path)

    assert [row["status"] for row in rows] == ["finished", "unreadable"]
    assert [row["differs"] for row in rows] == [{}, {}]
