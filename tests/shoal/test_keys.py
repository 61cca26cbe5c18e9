"""What makes two runs one, and what makes them two."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal import Experiment, FedAvg, FedProx, LocalTraining, datasets
from shoal.keys import data_key, run_key

X = np.arange(48, dtype="float32").reshape(16, 3)
Y = np.arange(16) % 2


def made(**changes: object) -> Experiment:
    data = datasets.from_arrays(X, Y, clients=[f"c{i % 4}" for i in range(16)], test=(X[:4], Y[:4]))
    return replace(Experiment(model="linear", data=data, rounds=2, cohort=2), **changes)  # type: ignore[arg-type]


def key(experiment: Experiment, engine: str = "lean") -> str:
    return run_key(experiment, data_key(experiment.data), engine)


def test_names_and_targets_make_no_other_run() -> None:
    same = made(name="another", target={"accuracy": 0.9}, checkpoint_every=3)

    assert key(made()) == key(made()) == key(same)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"rounds": 3}, {"strategy": FedProx()}, {"strategy": FedAvg("uniform")}, {"model": "mlp"},
     {"local": LocalTraining(lr=0.2)}, {"dtype": "float64"}, {"evaluation": {"every": 2}}],
    ids=str,
)  # fmt: skip
def test_what_changes_a_run_changes_its_key(change: dict[str, object]) -> None:
    assert key(made()) != key(made(**change))


def test_the_engine_is_part_of_it() -> None:
    assert len({key(made(), engine) for engine in ("lean", "fused:2", "fused:4")}) == 3


def test_data_counts_by_its_content() -> None:
    data = made().data
    assert isinstance(data, datasets.Dataset)
    moved = replace(data.train, x=data.train.x + 1)
    others = [
        replace(data, train=moved), replace(data, client_test=0.5), replace(data, test=None),
        replace(data, train=data.train.take(np.arange(15))),
    ]  # fmt: skip

    assert data_key(replace(data, spec={"name": "elsewhere"})) == data_key(data)
    assert len({data_key(data), *map(data_key, others)}) == 5
    assert data_key(data.split(0)) == data_key(data.split(0)) != data_key(replace(data, train=moved).split(0))


@pytest.mark.slow
def test_a_users_code_counts(tmp_path: Path) -> None:
    """Another process sees the file as it is then."""
    program = textwrap.dedent("""
        import sys; sys.path[:] = {path!r}
        from shoal import Experiment; from shoal.keys import data_key, run_key
        made = Experiment.from_file("e.toml", ["strategy=mine.py:Mine"])
        print(run_key(made, data_key(made.data), "lean"))
    """)
    (tmp_path / "e.toml").write_text('rounds = 1\ncohort = 1\nmodel = "linear"\n')
    mine = "import shoal\nclass Mine(shoal.Strategy):\n    citation = 'none'\n    local = contribute = finish = None\n"

    def run(code: str) -> str:
        (tmp_path / "mine.py").write_text(code)
        command = [sys.executable, "-c", program.format(path=sys.path)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    first, again, changed = run(mine), run(mine), run(mine.replace("none", "some"))

    assert first == again != changed


def test_objects_count_by_value() -> None:
    wide, narrow = (lambda: torch.nn.Linear(3, 2)), (lambda: torch.nn.Linear(3, 4))

    assert key(made(model=wide)) == key(made(model=wide)) != key(made(model=narrow))
