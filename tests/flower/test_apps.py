"""Every app's result is that of flwr's own simulation, which ``benchmarks/flower_apps.py --record`` has kept."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.flower.conftest import APPS, Play

EXPECTED: dict[str, Any] = json.loads((APPS.parent / "expected.json").read_text())["results"]
TOLERANCES = {"secagg": 1e-3, "trees": 1e-5}  # one rounds at random, the other computes in single precision
NEEDS = {"sklearn_logistic": "sklearn", "trees": "xgboost"}


NAMES = sorted(path.parent.name for path in APPS.glob("*/pyproject.toml"))
HEAVY = {"sklearn_logistic", "torch_adam", "trees"}  # to import


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in HEAVY else name for name in NAMES]
)
def test_the_result_is_flwrs(name: str, play: Play) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    run, found = play(name)

    assert run.status == "finished"
    assert len(found) == len(EXPECTED[name])
    for array, expected in zip(found, EXPECTED[name], strict=True):
        np.testing.assert_allclose(array, expected, rtol=TOLERANCES.get(name, 1e-9), atol=TOLERANCES.get(name, 1e-12))
