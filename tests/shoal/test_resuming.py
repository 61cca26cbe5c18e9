"""Comparisons that were killed, repeated or extended: what is there is not made again, and nothing changes by it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from shoal import Comparison, Run

Shoal = Callable[..., tuple[int, str, str]]
TIMES = ["seconds", "seconds_to_target", "seconds_to_target_median"]
WORDS = ("tiny.toml", "--strategies", "fedavg,fedprox:mu=0.5", "--seeds", "2", "--workers", "1", "--json")


def events(out: str, name: str) -> list[dict[str, object]]:
    return [event for line in out.splitlines() if (event := json.loads(line))["event"] == name]


def same(one: Comparison, other: Comparison) -> None:
    """Weights, every number of every round, and the table, all but times."""
    pd.testing.assert_frame_equal(one.table.drop(columns=TIMES), other.table.drop(columns=TIMES), check_exact=True)
    assert one.answer == other.answer
    for a, b in zip(one.cells["path"], other.cells["path"], strict=True):
        assert torch.equal(Run(a).parameters.trainable, Run(b).parameters.trainable)
        numbers = (Run(path).metrics.drop(columns=["seconds", "train_seconds"]) for path in (a, b))
        pd.testing.assert_frame_equal(*numbers, check_exact=True)


@pytest.mark.slow
def test_killed_and_started_again_it_ends_as_if_nothing_had_happened(folder: Path, command: Shoal) -> None:
    """Real processes, killed in the third round of its second cell; scaffold's clients have states."""
    arms = "scaffold,mine.py:PowerCut"
    words = (
        "compare",
        *(word.replace("fedavg,fedprox:mu=0.5", arms) for word in WORDS),
        "rounds=6",
        "checkpoint_every=1",
    )
    program = [sys.executable, "-c", "from shoal.cli import main; main()", *words]
    killed = subprocess.run(program, capture_output=True, text=True)
    there = {path.parent.name for path in Path("runs/cells").glob("*/summary.json") if '"finished"' in path.read_text()}

    assert killed.returncode == -signal.SIGKILL and len(events(killed.stdout, "cell")) == len(there) == 1
    assert len(list(Path("runs/cells").glob("*/checkpoints/round-00002"))) == 1  # begun, and not whole

    code, out, err = command(*words)
    untouched = command(*words, "--out", "whole")

    assert (code, untouched[0]) == (0, 0), err
    assert events(out, "start")[0]["reused"] == 1
    assert not {str(event["path"]).rpartition("/")[2] for event in events(out, "cell")} & there
    assert [path.name for path in Path("runs").iterdir() if path.name != "cells"] == ["0001-tiny-comparison"]
    same(Comparison("runs/1"), Comparison("whole/1"))
    resumed = Path(Comparison("runs/1").cells["path"][1]) / "log.jsonl"
    assert '"resumed", "round": 2' in resumed.read_text()


@pytest.mark.slow
def test_only_what_is_new_is_run(command: Shoal) -> None:
    first, again = command("compare", *WORDS), command("compare", *WORDS)
    more = command("compare", *(word.replace("fedavg", "fedavg,scaffold") for word in WORDS))
    seeds = command("compare", *WORDS, "--seeds", "3", "--target", "accuracy=0.6")
    ran = [
        {(event["arm"], event["seed"]) for event in events(out, "cell")} for _, out, _ in (first, again, more, seeds)
    ]

    assert ran == [
        {(arm, seed) for arm in ("fedavg", "fedprox mu=0.5") for seed in (0, 1)},
        set(),
        {("scaffold", 0), ("scaffold", 1)},
        {("fedavg", 2), ("fedprox mu=0.5", 2)},
    ]
    assert events(again[1], "end")[0]["comparison"] == events(first[1], "end")[0]["comparison"]
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "0001-tiny-comparison", "0002-tiny-comparison", "0003-tiny-comparison", "cells",
    ]  # fmt: skip
    assert Comparison("runs/3").table["target"].tolist() == [0.6, 0.6]
    assert "finished" in Comparison("runs/1").path.joinpath("report.html").read_text()


@pytest.mark.slow
def test_what_was_left_damaged_is_made_anew(command: Shoal) -> None:
    command("compare", *WORDS)
    cells = [Path(path) for path in Comparison("runs/1").cells["path"]]
    (cells[0] / "summary.json").unlink()  # killed before its end, with all its rounds
    (cells[1] / "summary.json").unlink()
    (cells[1] / "env.json").unlink()  # killed at its beginning
    before = Run(cells[2]).parameters.trainable
    code, out, _ = command("compare", *WORDS)

    assert code == 0 and len(events(out, "cell")) == 2
    assert torch.equal(Run(cells[2]).parameters.trainable, before)
    assert Comparison("runs/1").cells["status"].tolist() == ["finished"] * 4


@pytest.mark.slow
def test_objects_of_a_script_are_found_again(tmp_path: Path) -> None:
    """Two processes pickle the same lambda and array to the same key."""
    code = f"""
        import torch, numpy as np, shoal
        x = np.arange(180, dtype="float32").reshape(60, 3) / 180
        y = np.arange(60) % 2
        data = shoal.datasets.from_arrays(x, y, clients=[str(i % 6) for i in range(60)], test=(x, y))
        made = shoal.Experiment(model=lambda: torch.nn.Linear(3, 2), data=data, rounds=1, cohort=4)
        done = shoal.compare(made, ["fedavg"], seeds=1, workers=1, out={str(tmp_path)!r}, progress="none")
        print(done.summary["cells"][0]["reused"], done.path.name)
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    said = [subprocess.run([sys.executable, script], capture_output=True, text=True) for _ in range(2)]

    assert [one.stdout for one in said] == ["False 0001-run-comparison\n", "True 0001-run-comparison\n"], said


@pytest.mark.slow
def test_scenarios_and_alternatives(command: Shoal) -> None:
    words = [
        "compare",
        "tiny.toml",
        "--strategies",
        "fedavg,fedprox:mu=0.1|1",
        "--vary",
        "local.lr=0.1|0.5",
        "--seeds",
        "1",
    ]
    code, out, err = command(*words, "--engine", "fused:2")
    made = Comparison("runs/1")

    assert (code, err) == (0, "")
    assert made.table.index.tolist() == [
        (scenario, arm) for scenario in ("lr=0.1", "lr=0.5") for arm in ("fedavg", "fedprox mu=0.1", "fedprox mu=1.0")
    ]
    assert [Run(path).summary["status"] for path in made.cells["path"]] == ["finished"] * 6
    assert "lr = 0.5" in (Path(made.cells["path"][3]) / "experiment.toml").read_text()
    assert set(made.curves("test_loss", "lr=0.5")) == {"fedavg", "fedprox mu=0.1", "fedprox mu=1.0"}
    assert "fused:2" in made.description["command"] and "local.lr=0.1|0.5" in made.description["command"]
    assert "With lr=0.1, the best mean accuracy over 1 seed" in " ".join(out.split())
    assert made.path.joinpath("report.html").read_text().count("Plotly.newPlot(") >= 8


@pytest.mark.slow
def test_tables_are_exported(command: Shoal) -> None:
    """Four cores for two cells: each has two worker processes."""
    command("compare", *WORDS, "data.client_test=0.2", "evaluation.clients_every=2", "--seeds", "1", "--workers", "4")
    for form, read in {"csv": pd.read_csv, "parquet": pd.read_parquet}.items():
        code, out, _ = command("export", "runs/1", "--to", "paper", "--format", form)
        frames = {Path(line).stem: read(line) for line in out.splitlines()}

        assert [Run(path)._folder.read("env.json")["workers"] for path in frames["cells"]["path"]] == [2, 2]
        assert code == 0 and list(frames) == ["table", "cells", "metrics", "clients"]
        assert frames["metrics"].columns.tolist() == ["scenario", "arm", "seed", "round", "metric", "value"]
        clients = frames["clients"].query("arm == 'fedavg' and metric == 'accuracy' and round == 3")
        assert sorted(clients["client"]) == list("abcdef")
        assert frames["table"].loc[0, "clients_mean"] == pytest.approx(clients["value"].mean())
        assert frames["table"].loc[0, "clients_worst_10"] == pytest.approx(clients["value"].min())
    assert command("export", "runs/1", "--to", "paper", "--format", "xls")[0] == 2
