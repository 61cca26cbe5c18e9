"""MKL's vector functions are called by one thread before two can meet at them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.strategies.kernels import NAMES, settle

# The functions that PyTorch hands to MKL (aten/src/ATen/cpu/vml.h).
OF_MKL = (
    *("acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "exp", "expm1", "lgamma"),
    *("log", "log10", "log1p", "log2", "sin", "sinh", "sqrt", "tan", "tanh", "trunc"),
)


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made = set[tuple[str, torch.dtype]]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if isinstance(args[0], torch.Tensor) and args[0].numel() == 1:  # more may be shared between threads
            self.made.add((function.overloadpacket.__name__, args[0].dtype))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_function_of_mkl_is_called_with_one_number(dtype: torch.dtype) -> None:
    with Calls() as calls:
        settle()

    assert {(name, dtype) for name in (*OF_MKL, *NAMES)} <= calls.made


def test_it_is_done_before_anybody_computes() -> None:
    program = """
import torch
called = []
sqrt, torch.sqrt = torch.sqrt, lambda x: called.append(x.numel()) or sqrt(x)
import shoal.ROOM
assert called == [1, 1], called
"""
    for room in ("server.coordinator", "client.trainer", "simulations.engine", "strategies.fedadam"):
        subprocess.run([sys.executable, "-c", program.replace("ROOM", room)], check=True)
