"""Global generators seeded for an app: PyTorch's too, whenever the app imports it."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from shoal.flower.drawing import drawing_from

LATE = """
import sys
from shoal.flower.drawing import drawing_from, seed_all
from shoal.flower import running, worker

assert "torch" not in sys.modules, "what plays an app imports PyTorch by itself"
seed_all(1)
with drawing_from(2):
    import torch
    print(torch.rand(()).item())
print(torch.rand(()).item())
seed_all(3)
print(torch.rand(()).item())
"""


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_the_callers_generators_come_back() -> None:
    with drawing_from(1):
        first = draw()
        with drawing_from(2):
            assert draw() != first
        second = draw()
    with drawing_from(1):
        assert (draw(), draw()) == (first, second)


@pytest.mark.slow
def test_an_app_that_imports_pytorch_late_draws_the_same() -> None:
    expected = []
    for seed in (2, 1, 3):
        with drawing_from(seed):
            expected.append(float(torch.rand(())))
    shown = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=True).stdout

    assert [float(line) for line in shown.split()] == expected
