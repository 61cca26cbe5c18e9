"""Federated averaging as one would write it by hand: plain PyTorch, no Shoal in the loop.

It reads like Algorithm 1 of McMahan et al. 2017, and the tests hold Shoal's engines to its numbers. Random choices (who
is in the cohort, in which order a client sees its examples) are handed in, so that both see the same.

Run it:  python examples/plain_fedavg.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

Shards = Mapping[str, tuple[Tensor, Tensor]]


def train(model: nn.Module, x: Tensor, y: Tensor, orders: Sequence[Tensor], lr: float, batch: int) -> None:
    """One epoch of SGD for each order."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for order in orders:
        for rows in order.split(batch):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


def fedavg(
    model: nn.Module,
    shards: Shards,
    cohorts: Sequence[Sequence[str]],
    orders: Callable[[int, str], Sequence[Tensor]],
    lr: float,
    batch: int,
) -> None:
    """Train ``model`` in place: one round for each cohort; ``orders(round, client)`` gives a row order an epoch."""
    for number, cohort in enumerate(cohorts, start=1):
        start = {name: value.clone() for name, value in model.state_dict().items()}
        total = {name: torch.zeros_like(value) for name, value in start.items()}
        examples = sum(len(shards[client][0]) for client in cohort)
        for client in cohort:
            model.load_state_dict(start)
            train(model, *shards[client], orders(number, client), lr, batch)
            for name, value in model.state_dict().items():
                total[name] += (value - start[name]) * (len(shards[client][0]) / examples)
        model.load_state_dict({name: start[name] + total[name] for name in start})


if __name__ == "__main__":
    torch.manual_seed(0)
    x, hidden = torch.randn(1000, 20), torch.randn(20, 3)
    y = (x @ hidden).argmax(dim=1)
    shards = {str(i): (x[i::10], y[i::10]) for i in range(10)}
    model = nn.Linear(20, 3)
    cohorts = [[str(int(i)) for i in torch.randperm(10)[:5]] for _ in range(20)]
    fedavg(model, shards, cohorts, lambda _, client: [torch.randperm(len(shards[client][0]))], lr=0.5, batch=10)
    print(f"accuracy {float((model(x).argmax(dim=1) == y).float().mean()):.3f}")
