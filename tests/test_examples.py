"""Every experiment of examples/data for a few rounds, on small files of the real ones' form; it must learn."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import shoal
from shoal.protos import registry
from tests.simulations.real import real_data

FOLDER = Path(__file__).parents[1] / "examples" / "data"
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))
SMALL = {
    "mnist": ("data.partition.clients=20", "model.hidden=[32]"),
    "fashion-mnist": ("data.partition.clients=20", "model.channels=[4]", "model.hidden=16", "local.lr=0.1"),
    "shakespeare": ("cohort=2", "data.length=20", "model.hidden=16"),
    "har": ("model.hidden=[16]",),
    "adult": ("model.hidden=[8]",),
    "synthetic": ("cohort=30", "local.epochs=2", "local.stragglers=0.0"),  # so that the loss is over all devices
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_learns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_data(tmp_path / "data", monkeypatch)
    changes = ["rounds=3", "evaluation.every=1", *SMALL.get(name, ())]
    experiment = shoal.Experiment.from_file(FOLDER / f"{name}.toml", changes)
    run = experiment.simulate(engine="lean", workers=0, out=tmp_path / "runs", progress="none")

    losses = run.metrics["test_loss" if "test_loss" in run.metrics else "train_loss"].dropna()
    assert run.status == "finished"
    assert math.isfinite(losses.iloc[-1]) and losses.iloc[-1] < losses.iloc[0]


def test_every_data_set_has_an_example() -> None:
    files = {"csv", "image-folder", "npz", "parquet", "fashion-mnist-subset"}  # the user's own; examples/fashion.toml

    assert set(NAMES) == set(registry.names("shoal.datasets")) - files


@pytest.mark.slow
def test_a_million_clients_draw_from_the_subset(tmp_path: Path) -> None:
    crowd = '{ kind = "resampled", clients = 1000000, size = 60, alpha = 1.0 }'
    changes = [f"data.partition={crowd}", "model=linear", "rounds=3", "cohort=20", "evaluation.clients_every=0"]
    experiment = shoal.Experiment.from_file(FOLDER.parent / "fashion.toml", changes)
    run = experiment.simulate(engine="lean", workers=0, out=tmp_path, progress="none")

    assert run.metrics["test_accuracy"].iloc[-1] > 0.4
    asked = run.clients[run.clients["kind"] == "train"]
    assert asked["client"].astype(int).max() > 100_000 and (asked["examples"] == 48).all()
