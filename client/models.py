"""Models by name. ``shape`` (of one example) and ``classes`` are filled in from the data where they are not given."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn

from shoal.protos.errors import ExperimentError

__all__ = ["cnn", "gru", "lenet", "linear", "mlp"]


def linear(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Logistic regression."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes))


def mlp(shape: tuple[int, ...], classes: int, hidden: tuple[int, ...] = (200, 200), norm: bool = False) -> nn.Module:
    """A ReLU network; the default is the "2NN" of McMahan et al. 2017. ``norm`` adds BatchNorm."""
    widths = [math.prod(shape), *hidden]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), *([nn.BatchNorm1d(outputs)] if norm else []), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], classes))


def cnn(
    shape: tuple[int, ...], classes: int, channels: tuple[int, ...] = (16, 32), hidden: int = 64, norm: bool = False
) -> nn.Module:
    """3×3 convolutions, each followed by 2×2 max-pooling, then one hidden layer; ``norm`` adds BatchNorm."""
    depth, height, width = _image(shape, "cnn", 2 ** len(channels))
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([depth, *channels]):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), *([nn.BatchNorm2d(outputs)] if norm else [])]
        layers += [nn.MaxPool2d(2), nn.ReLU()]
        height, width = height // 2, width // 2
    flat = channels[-1] * height * width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def lenet(shape: tuple[int, ...], classes: int) -> nn.Module:
    """LeNet-5 with ReLU and max-pooling, as NIID-Bench (Li et al. 2022) uses it."""
    depth, height, width = _image(shape, "lenet", 16)
    left = [((side - 4) // 2 - 4) // 2 for side in (height, width)]
    flat = 16 * math.prod(left)
    return nn.Sequential(
        *(nn.Conv2d(depth, 6, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(flat, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)),
    )


def gru(classes: int, embedding: int = 8, hidden: int = 128, layers: int = 1) -> nn.Module:
    """What follows each token: tokens 0 to ``classes`` - 1 ``[n, T]`` to logits ``[n, classes, T]``.

    With two layers of 256 it is the character model of McMahan et al. 2017, with a GRU in place of the LSTM.
    """
    return _Gru(classes, embedding, hidden, layers)


class _Gru(nn.Module):
    def __init__(self, classes: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, embedding)
        self.core = nn.GRU(embedding, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.core(self.embed(tokens))[0])
        return logits.transpose(1, 2)


def _image(shape: tuple[int, ...], name: str, least: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < least:
        raise ExperimentError(
            f"model {name!r} needs images [channels, height, width] of at least {least}×{least}, the data has "
            f"{list(shape)}; use 'mlp' or 'linear'"
        )
    return shape[0], shape[1], shape[2]
