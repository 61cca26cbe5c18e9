"""The papers' scripts in short: their data and measures, and the one experiment that takes seconds."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from shoal.strategies.base import Context, Update, vector

FOLDER = Path(__file__).parents[1] / "examples" / "papers"


@pytest.fixture
def papers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, ModuleType]]:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)
    yield {name: importlib.import_module(name) for name in ("mcmahan2017", "fedprox2020", "niidbench2022", "page")}


def test_rounds_to_a_target_are_interpolated_on_the_best_so_far(papers: dict[str, Any]) -> None:
    crossing = papers["mcmahan2017"].crossing
    assert crossing(np.array([0.1, 0.9, 0.5, 0.96, 0.98, 0.90])) == pytest.approx(3.5)
    assert crossing(np.array([0.1, 0.9])) == math.inf


def test_who_is_late_is_dropped(papers: dict[str, Any]) -> None:
    """Of one client and of a block; a round of stragglers leaves the model."""
    strategy, context = papers["fedprox2020"].Dropping(), Context(1, 3, 3)
    done, late = (Update(torch.ones(2), 25.0, steps, 0.0) for steps in (60, 59))
    assert strategy.contribute({}, done, context)["weight"] == 25
    assert strategy.contribute({}, late, context)["weight"] == 0
    block = Update(torch.ones(2, 2), torch.tensor([[25.0], [25.0]]), torch.tensor([[60.0], [59.0]]))
    assert strategy.contribute({}, block, context)["weight"].tolist() == [[25.0], [0.0]]
    state = {"parameters": torch.zeros(2)}
    assert strategy.finish(state, {"delta": torch.zeros(2), "weight": 0.0}, context) is state
    moved = strategy.finish(state, {"delta": torch.ones(2) * 25, "weight": 25.0}, context)
    assert vector(moved, "parameters").tolist() == [1, 1]


@pytest.mark.slow
def test_fcube_is_solved(papers: dict[str, Any]) -> None:
    module = papers["niidbench2022"]
    assert module.accuracy(*module.STRATEGIES["FedNova"], seed=0, rounds=10) > 98


def test_a_table_and_a_spread(papers: dict[str, Any]) -> None:
    page = papers["page"]
    assert page.spread([1.0, 3.0]) == "2.0 ± 1.4" and page.spread([2.0]) == "2.0"
    assert page.table(["a", "b"], [["c", "d"]]).splitlines() == ["| a | b |", "| --- | --: |", "| c | d |"]
