"""What a model does beside operations on tensors, and which a replay of these would therefore miss."""

from __future__ import annotations

import random
from collections.abc import Callable, Sized
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Readers", "outside", "random_state"]

READS = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)  # values, without an operation of PyTorch


class Readers(TorchFunctionMode):
    """Tells ``found`` of each tensor whose values code other than PyTorch's is given."""

    def __init__(self, found: Callable[[Tensor, str], None]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self._found(args[0], func.__name__)
        return func(*args, **(kwargs or {}))


def outside(module: nn.Module) -> list[object]:
    """What Python keeps from one step to the next: numbers and lengths in the modules, states of random generators."""
    kept = [(name, _told(value)) for m in module.modules() for name, value in vars(m).items()]
    dice: Any = np.random.get_state(legacy=False)
    return [kept, random.getstate(), {name: np.asarray(part).tobytes() for name, part in dice["state"].items()}]


def _told(value: object) -> object:
    if value is None or isinstance(value, Number | str):
        return value
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    return len(value) if isinstance(value, Sized) and not isinstance(value, Tensor) else type(value)


def random_state(device: torch.device) -> Tensor:
    """Of PyTorch's own generator."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
