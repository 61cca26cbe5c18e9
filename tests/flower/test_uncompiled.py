"""PyTorch's compiler is imported where somebody compiles, and not by the first step of an optimizer."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEPS = """
import sys
from shoal.flower.uncompiled import compiler_later
compiler_later()
import torch

def steps(compiled):
    torch.manual_seed(1)
    net = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(net.parameters())
    forward = torch.compile(net, backend="eager") if compiled else net
    for _ in range(3):
        optimizer.zero_grad()
        forward(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])

first = steps(False)
assert not [name for name in sys.modules if name.startswith("torch._dynamo.")]
assert not hasattr(sys.modules["torch._dynamo"], "__file__")  # as those ask who look at all modules
assert torch.equal(steps(True), first)
assert torch._dynamo is sys.modules["torch._dynamo"] and "torch._dynamo.eval_frame" in sys.modules
zero_grad = torch.optim.Optimizer.zero_grad.__wrapped__
assert zero_grad.__dynamo_disable is not zero_grad
assert torch.equal(steps(False), first)
"""


@pytest.mark.slow
def test_steps_before_and_after_somebody_compiles() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
