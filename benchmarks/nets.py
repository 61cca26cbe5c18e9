"""The models of the workloads in plain PyTorch, the same for every contender that has PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["NETS", "VOCABULARY", "loaded", "weights_of"]

VOCABULARY = 90  # characters


def logistic() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def two_nn() -> nn.Module:
    """The 2NN of McMahan et al. 2017: 199,210 parameters."""
    hidden = [nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(200, 10))


def lenet() -> nn.Module:
    """LeNet-5 with ReLU and max-pooling on 3×32×32: 62,006 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def pfl_cnn(dropout: bool = False) -> nn.Module:
    """The CNN of pfl-research's CIFAR10 benchmark: 1,626,442 parameters. Without dropout, see :mod:`workloads`."""
    pooled = [nn.Dropout(0.25)] if dropout else []
    hidden = [nn.Dropout(0.5)] if dropout else []
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), *pooled),
        *(nn.Flatten(), nn.Linear(12544, 128), nn.ReLU(), *hidden, nn.Linear(128, 10)),
    )


def pfl_cnn_dropout() -> nn.Module:
    return pfl_cnn(dropout=True)


class CharGru(nn.Module):
    """The next character at every place of a text: scores ``[n, characters, places]``."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.gru = nn.GRU(8, hidden, batch_first=True)
        self.head = nn.Linear(hidden, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.gru(self.embedding(x))[0])
        return scores.transpose(1, 2)


class CharTransformer(nn.Module):
    """The same from two layers of attention to what came before, with weights by hand in place of ``nn``'s layers."""

    def __init__(self, width: int = 64, heads: int = 4, places: int = 40) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(places, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        state = self.embedding(x) + self.place(torch.arange(x.shape[1], device=x.device))
        for layer in self.layers:
            state = layer(state)
        scores: Tensor = self.head(state)
        return scores.transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, state: Tensor) -> Tensor:
        n, places, width = state.shape
        parts = self.mix(self.norm(state)).view(n, places, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        state = state + self.out(seen.transpose(1, 2).reshape(n, places, width))
        fed: Tensor = state + self.feed(self.norm2(state))
        return fed


NETS: dict[str, Callable[[], nn.Module]] = {
    "logistic": logistic,
    "2nn": two_nn,
    "lenet": lenet,
    "pfl-cnn": pfl_cnn,
    "pfl-cnn-dropout": pfl_cnn_dropout,
    "gru": CharGru,
    "transformer": CharTransformer,
}


def loaded(net: str, weights: np.ndarray) -> nn.Module:
    """The net with these weights, which stand in the order of its parameters."""
    module = NETS[net]()
    parameters = list(module.parameters())
    parts = torch.split(torch.from_numpy(weights), [math.prod(parameter.shape) for parameter in parameters])
    with torch.no_grad():
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.copy_(part.view(parameter.shape))
    return module


def weights_of(module: nn.Module) -> np.ndarray:
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])
    return np.asarray(flat.numpy())
