"""The 2NN of McMahan et al. (2017), 784-200-200-10, on random examples: as benchmarks/workloads.py has it."""

import torch
from torch import nn


def model(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10))


def trained(weights: dict, partition: int) -> dict:
    """After an epoch of SGD on a client's 60 examples, in batches of 10."""
    generator = torch.Generator().manual_seed(1 + partition)
    x, y = torch.randn(60, 784, generator=generator), torch.randint(10, (60,), generator=generator)
    net = model(0)
    net.load_state_dict(weights)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for batch in torch.arange(60).split(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
    return net.state_dict()
