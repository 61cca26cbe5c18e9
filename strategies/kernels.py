"""Kernels of PyTorch that two threads must not meet first.

MKL chooses the code of a vector function when it is first called, and not safely between threads: of two that call it
at once, one may compute its part of the vector, that once, with code that is right to four digits only (PyTorch issue
188792; seen here in one process of a thousand). Results would not be the same bits each time. So one thread calls each
of these functions before anybody else can.
"""

from __future__ import annotations

import torch

__all__ = ["NAMES", "settle"]

NAMES = (
    *("acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "sin", "sinh", "tan", "tanh"),
    *("erf", "erfc", "erfinv", "exp", "exp2", "expm1", "lgamma", "log", "log10", "log1p", "log2"),
    *("ceil", "floor", "round", "rsqrt", "sigmoid", "sqrt", "trunc"),
)


def settle() -> None:
    """Let MKL choose: one number needs one thread."""
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype)
        for name in NAMES:
            getattr(torch, name)(one)
