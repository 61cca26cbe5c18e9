"""The kernel floor: forward and backward alone, with PyTorch's own kernels, on batches that lie ready in memory.

No optimizer, no reset of weights, nothing federated: what a round costs a loop that calls the stock kernels once for
each step of each client, and nothing else. An engine that calls other kernels, or fewer, can be below it. The process
measures the machine as well: its fastest product or convolution, and what memory copies.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders import Tensors
from benchmarks.nets import loaded
from benchmarks.tasks import Task

__all__ = ["floor"]

Batches = list[tuple[Tensor, Tensor]]


def floor(task: Task) -> dict[str, Any]:
    """The seconds of each round in the better layout, and what else was measured."""
    module, tensors = loaded(task.net, task.initial), Tensors(task)
    layouts = {"contiguous": torch.contiguous_format}
    if any(parameter.dim() == 4 for parameter in module.parameters()):
        layouts["channels_last"] = torch.channels_last
    taken = {name: [_timed(module, tensors, task, r, form) for r in _rounds(task)] for name, form in layouts.items()}
    best = min(taken, key=lambda name: median(taken[name][1:]))
    measured = {"peak_gflops": _peak(), "copy_gbytes": _copy()}
    return {"seconds": taken[best], "layout": best, **_work(module, tensors, task), **measured}


def _rounds(task: Task) -> range:
    return range(1, task.rounds + 1)


def _batches(tensors: Tensors, task: Task, round: int, form: torch.memory_format) -> Batches:
    """Those of a round."""
    batches = Batches()
    for client, order in task.asked(round):
        x, y = tensors[str(client)]
        parts = [(x[rows], y[rows]) for rows in torch.split(torch.from_numpy(order), task.batch)]
        batches += [(x.contiguous(memory_format=form) if x.dim() == 4 else x, y) for x, y in parts]
    return batches


def _pass(module: nn.Module, x: Tensor, y: Tensor, weights: list[nn.Parameter]) -> None:
    torch.autograd.grad(functional.cross_entropy(module(x), y), weights)


def _timed(module: nn.Module, tensors: Tensors, task: Task, round: int, form: torch.memory_format) -> float:
    """Seconds of a round's passes, its batches made before."""
    module.to(memory_format=form)  # type: ignore[call-overload]  # not in PyTorch's stubs
    batches, weights = _batches(tensors, task, round, form), list(module.parameters())
    began = time.perf_counter()
    for x, y in batches:
        _pass(module, x, y, weights)
    return time.perf_counter() - began


def _work(module: nn.Module, tensors: Tensors, task: Task) -> dict[str, float]:
    """Operations as PyTorch counts those of products and convolutions, and bytes to be read."""
    x, y = _batches(tensors, task, 1, torch.contiguous_format)[0]
    with FlopCounterMode(display=False) as counter:
        _pass(module, x, y, list(module.parameters()))
    flop = counter.get_total_flops() / len(x)
    return {"flop_of_an_example": flop, "bytes_of_an_example": (x.nbytes + y.nbytes) / len(x)}


def _peak() -> float:
    """The fastest of PyTorch's matrix products and of a convolution that suits them, on one core."""
    a, b, ran = torch.randn(1024, 1024), torch.randn(1024, 1024), list[float]()
    ran.append(2 * 1024**3 / _fastest(lambda: torch.mm(a, b)))
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # oneDNN's, where this build has it
    if linear is not None:
        ran.append(2 * 1024**3 / _fastest(lambda: linear(a, b, None, "none", [], "")))
    for layout in (torch.contiguous_format, torch.channels_last):
        x, w = (torch.randn(n, 64, k, k).contiguous(memory_format=layout) for n, k in ((16, 56), (64, 3)))
        ran.append(2 * 16 * 64 * 54**2 * 64 * 9 / _fastest(lambda x=x, w=w: torch.conv2d(x, w)))  # type: ignore[misc]
    return max(ran) / 1e9


def _copy() -> float:
    """Bytes read and written a second, from memory to memory."""
    source, target = torch.zeros(2**26), torch.ones(2**26)
    return 2 * source.nbytes / 1e9 / _fastest(lambda: target.copy_(source))


def _fastest(do: Callable[[], Any], times: int = 10) -> float:
    taken = list[float]()
    for _ in range(times + 1):
        began = time.perf_counter()
        do()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])
