"""Tuning: what is tried, on which rows, and that the choice is the best of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shoal import Comparison, Experiment, datasets
from shoal.arms import bounds, read
from shoal.protos.errors import ExperimentError
from shoal.tuning import Optuna, Random, Search, validating

Shoal = Callable[..., tuple[int, str, str]]


def test_open_arguments_are_left_out_of_the_label() -> None:
    tuned = read(["fedavg", "fedprox:mu=0.01|0.1:weighting=uniform", "scaffold:server_lr=0.1..1"], tuned=True)

    assert list(tuned) == ["fedavg", "fedprox weighting=uniform", "scaffold"]
    assert tuned["fedprox weighting=uniform"].open == {"mu": ["0.01", "0.1"]}
    assert tuned["scaffold"].open == {"server_lr": ["0.1..1"]}
    assert list(read(["fedprox:mu=0.01|0.1"])) == ["fedprox mu=0.01", "fedprox mu=0.1"]
    with pytest.raises(ExperimentError, match="is a range, which only --tune searches"):
        read(["fedprox:mu=0.01..1"])


def test_ranges() -> None:
    assert bounds(["0.001..1"]) == (0.001, 1.0) and bounds(["0.1", "1"]) is None is bounds(["../data.csv"])
    for wrong in ("1..0.1", "0..1", "-1..1"):
        with pytest.raises(ExperimentError, match="is no range to draw from"):
            bounds([wrong])


def test_a_grid_within_the_budget_is_tried_whole() -> None:
    space = {"strategy.mu": ["0.1", "1"], "local.lr": ["0.3", "0.5"]}
    whole = Random(4, space, 0, "x").ask()

    assert sorted(map(tuple, whole)) == sorted(
        (f"strategy.mu={mu}", f"local.lr={lr}") for mu in ("0.1", "1") for lr in ("0.3", "0.5")
    )
    some = Random(3, space, 0, "x")
    asked = some.ask()
    assert len({tuple(one) for one in asked}) == 3 and all(one in whole for one in asked) and some.ask() == []
    assert asked == Random(3, space, 0, "x").ask()


def test_a_range_is_drawn_log_uniform() -> None:
    """Half the draws of 0.01..1 lie below 0.1: 1,000 draws, four standard errors."""
    drawn = [float(one[0].partition("=")[2]) for one in Random(1000, {"strategy.mu": ["0.01..1"]}, 0, "x").ask()]

    assert min(drawn) >= 0.01 and max(drawn) <= 1
    assert abs(np.mean(np.array(drawn) < 0.1) - 0.5) < 4 * 0.5 / 1000**0.5


@pytest.mark.slow
def test_optuna_finds_the_better_end() -> None:
    optuna = pytest.importorskip("optuna")
    assert optuna
    sampler, tried = Optuna(30, {"strategy.mu": ["0.001..1"], "local.lr": ["0.1", "0.5"]}, 0, "x"), []
    while asked := sampler.ask():
        for changes in asked:
            mu = float(changes[0].partition("=")[2])
            score = -abs(np.log10(mu) + 2) - (changes[1] == "local.lr=0.5")
            tried.append((score, changes))
            sampler.tell(changes, score)

    assert len(tried) == 30
    assert max(tried)[0] > -0.3 and np.mean([s for s, _ in tried[15:]]) > np.mean([s for s, _ in tried[:10]])


def test_rows_held_back_are_of_the_training_set() -> None:
    x, y = np.arange(100, dtype="float32").reshape(50, 2), np.arange(50) % 2
    test = (x[:10] + 1000, y[:10])
    data = datasets.from_arrays(x, y, clients=[f"c{i % 5}" for i in range(50)], test=test)
    made = validating(Experiment(model="linear", data=data, cohort=2), 3).data
    assert isinstance(made, datasets.Dataset) and made.test is not None

    assert (len(made.train), len(made.test)) == (40, 10)
    rows = {tuple(row) for part in (made.train, made.test) for row in part.x.tolist()}
    assert rows == {tuple(row) for row in x.tolist()}
    with pytest.raises(ExperimentError, match="tuning holds rows back"):
        validating(Experiment(model="linear", data=data.split(0), cohort=2), 3)


def test_bad_searches() -> None:
    for search, message in (
        ({"trials": 0}, "tune is 0"),
        ({"sampler": "grid"}, "there is no sampler 'grid'"),
    ):
        with pytest.raises(ExperimentError, match=message):
            Search(**({"trials": 2, "space": {}} | search))  # type: ignore[arg-type]


@pytest.mark.slow
def test_every_arm_is_tuned_and_then_compared(command: Shoal) -> None:
    words = ["compare", "tiny.toml", "--strategies", "fedavg,fedprox:mu=0.1|100", "--seeds", "1", "--tune", "4"]
    words += ["--search", "local.lr=0.0001|0.5", "--json"]
    code, out, err = command(*words)
    events = [json.loads(line) for line in out.splitlines()]
    made, trials = Comparison("runs/1"), [event for event in events if event["event"] == "trial"]
    tuning = {one["arm"]: one for one in made.description["tuning"]}

    assert (code, err) == (0, "")
    assert [one["trials"] for one in tuning.values()] == [2, 4] and len(trials) == 6
    for arm, one in tuning.items():
        best = max((trial for trial in trials if trial["name"].startswith(f"{arm}:")), key=lambda trial: trial["score"])
        assert best["name"] == f"{arm}: {' '.join(one['changes'])}" and one["score"] == best["score"]
        assert "local.lr=0.5" in one["changes"]
    assert made.table.index.tolist() == ["fedavg", "fedprox"]
    assert "lr = 0.5" in (Path(made.cells["path"][0]) / "experiment.toml").read_text()
    assert "Every strategy was tuned first" in (made.path / "report.html").read_text()
    assert "fedprox:mu=0.1|100:weighting=examples" in made.description["command"]
    again = [json.loads(line)["event"] for line in command(*words)[1].splitlines()]
    assert "cell" not in again and len(list(Path("runs/cells").iterdir())) == 6 + 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strategies", "fedavg", "--tune", "2"], r"there is nothing to tune for 'fedavg'"),
        (["--strategies", "fedavg", "--search", "local.lr=0.1|0.2"], r"search says what is tuned; say with how many"),
        (["--strategies", "fedavg", "--tune", "2", "--search", "local.lr"], r"--search 'local.lr' is not of the form"),
        (["--strategies", "fedavg", "--vary", "seed=1|2"], r"'seed' cannot be varied"),
        (["--strategies", "fedavg", "--vary", "local.lr=1|1"], r"the scenario 'lr=1' is given twice"),
        (["--strategies", "fedavg", "--vary", "local.lrr=1|2"], r"unknown key 'local\.lrr'"),
        (["--strategies", "fedavg", "--engine", "fused"], r"engine 'fused' has no block size"),
        (["--strategies", "fedavg", "--engine", "fast"], r"there is no engine 'fast'"),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, list) else "",
)
def test_what_is_refused(words: list[str], message: str, command: Shoal) -> None:

    code, _, err = command("compare", "tiny.toml", *words)

    assert code == 2 and re.fullmatch(rf"shoal: .*{message}.*\n", err), err
    assert not list(Path().glob("runs/0*"))


def test_a_key_is_varied_or_tuned(command: Shoal) -> None:
    words = ["--strategies", "fedavg", "--tune", "2", "--search", "local.lr=1|2", "--vary", "local.lr=1|2"]

    assert "'local.lr' is both varied and tuned" in command("compare", "tiny.toml", *words)[2]
