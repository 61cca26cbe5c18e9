"""PyTorch's layers and losses in a block: the numbers of the lean trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

Make = Callable[[], nn.Module]
Compare = Callable[..., None]
Linear = nn.Linear
IMAGE = (2, 8, 8)


class Text(nn.Module):
    """Token ids ``[n, T]`` through a core that gives features ``[n, 8]``."""

    def __init__(self, core: Callable[[Tensor], Tensor], **embedding: Any) -> None:
        super().__init__()
        self.embed, self.core, self.head = nn.Embedding(9, 8, **embedding), core, Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.core(self.embed(x)))
        return out


class Last(nn.Module):
    """A recurrent core's last output."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.core(x)[0][:, -1]
        return out


class Causal(nn.Module):
    """Attention as in small GPTs, with a mask in a buffer."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inward = Linear(8, 24)
        self.register_buffer("mask", torch.tril(torch.ones(4, 4, dtype=torch.bool)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.view(len(x), 4, 2, 4).transpose(1, 2) for part in self.inward(x).split(8, 2))
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return y.transpose(1, 2).reshape(len(x), 4, 8).mean(1)


class Encoder(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **how)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x).mean(1)
        return out


def mean(x: Tensor) -> Tensor:
    return x.mean(1)


TEXTS: dict[str, Make] = {
    "padding": lambda: Text(mean, padding_idx=0),
    "max norm": lambda: Text(mean, max_norm=1.0),
    "by frequency": lambda: Text(mean, scale_grad_by_freq=True),
    "bag": lambda: nn.Sequential(nn.EmbeddingBag(9, 6), Linear(6, 3)),
    "rnn": lambda: Text(Last(nn.RNN(8, 8, nonlinearity="relu", batch_first=True))),
    "gru": lambda: Text(Last(nn.GRU(8, 8, 2, dropout=0.3, batch_first=True))),
    "lstm": lambda: Text(Last(nn.LSTM(8, 4, bidirectional=True, batch_first=True))),
    "causal": lambda: Text(Causal()),
    "encoder": lambda: Text(Encoder(dropout=0.2)),
    "encoder, norms first": lambda: Text(Encoder(dropout=0.1, norm_first=True, activation="gelu")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_text(name: str, compare: Compare) -> None:
    compare(TEXTS[name], (4,), tokens=True, fuse=True)


@pytest.mark.slow
def test_an_lstm_in_float32(compare: Compare) -> None:
    """Which oneDNN does in one piece, with memory of its own between the passes."""
    compare(TEXTS["lstm"], (4,), tokens=True, fuse=True, dtype="float32")


def images(*layers: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *layers, nn.Flatten(), Linear(width, 3))


IMAGES: dict[str, Make] = {
    "batch norm": lambda: images(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), width=64),
    "instance norm": lambda: images(nn.InstanceNorm2d(4, affine=True, track_running_stats=True), width=256),
    "group norm": lambda: images(nn.GroupNorm(2, 4), nn.AvgPool2d(3, 2, 1, count_include_pad=False), width=64),
    "depthwise": lambda: images(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.AdaptiveAvgPool2d(2), width=16),
    "transposed": lambda: images(nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1), width=648),
    "upsampled": lambda: images(nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear"), width=256),
    "dropout of channels": lambda: images(nn.Dropout2d(0.3), width=256),
    "dropout at the end": lambda: images(nn.Flatten(), nn.Dropout(0.5), width=256),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str, compare: Compare) -> None:
    compare(IMAGES[name], IMAGE, fuse=True)


SERIES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.MaxPool1d(2), nn.Flatten(), Linear(12, 3)), (2, 8)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.AvgPool3d(2), nn.Flatten(), Linear(2, 3)), (1, 4, 4, 4)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm((2, 6)), nn.PReLU(2), nn.Flatten(), Linear(12, 3)), (2, 6)),
    "rms norm": (lambda: nn.Sequential(nn.Flatten(), nn.RMSNorm(6), Linear(6, 3), nn.LogSoftmax(1)), (6,)),
}


@pytest.mark.parametrize("name", SERIES)
def test_series_and_volumes(name: str, compare: Compare) -> None:
    compare(*SERIES[name], fuse=True)


# --- losses ----------------------------------------------------------------------------------------------------------

Labels = Callable[[int, torch.Generator], Tensor]
WEIGHTS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def classes(*shape: int, ignored: bool = False) -> Labels:
    def draw(n: int, generator: torch.Generator) -> Tensor:
        labels = torch.randint(0, 3, (n, *shape), generator=generator)
        return torch.where(torch.rand(n, *shape, generator=generator) < 0.3, -100, labels) if ignored else labels

    return draw


def numbers(*shape: int) -> Labels:
    return lambda n, generator: torch.rand(n, *shape, generator=generator)


def cross_entropy(**how: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: functional.cross_entropy(output, target, **how)


def focal(output: Tensor, target: Tensor) -> Tensor:
    sure = output.softmax(1).gather(1, target[:, None]).squeeze(1)
    return ((1 - sure) ** 2 * cross_entropy(reduction="none")(output, target)).mean()


def brier(output: Tensor, target: Tensor) -> Tensor:
    return (output.softmax(1) - torch.zeros_like(output).scatter_(1, target[:, None], 1.0)).square().mean()


def weighted_bce(output: Tensor, target: Tensor) -> Tensor:
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=output.dtype)
    return functional.binary_cross_entropy_with_logits(output, target.to(output.dtype), pos_weight=weight)


LOSSES: dict[str, tuple[Any, Labels]] = {
    "weighted": (cross_entropy(weight=WEIGHTS), classes()),
    "smooth": (nn.CrossEntropyLoss(label_smoothing=0.1), classes()),
    "smooth, weighted, ignored": (cross_entropy(label_smoothing=0.1, weight=WEIGHTS), classes(ignored=True)),
    "ignored": ("cross-entropy", classes(ignored=True)),
    "ignored, weighted": (cross_entropy(weight=WEIGHTS), classes(ignored=True)),
    "sum": (cross_entropy(reduction="sum"), classes()),
    "the worst": (lambda o, t: cross_entropy(reduction="none")(o, t).topk(2)[0].mean(), classes()),
    "soft labels": (lambda o, t: functional.cross_entropy(o, t.to(o.dtype).softmax(1)), numbers(3)),
    "focal": (focal, classes()),
    "brier": (brier, classes()),
    "picked": (lambda o, t: -o.log_softmax(1)[torch.arange(len(t)), t].mean(), classes()),
    "margin": (functional.multi_margin_loss, classes()),
    "mse": ("mse", numbers(3)),
    "huber": (lambda o, t: functional.huber_loss(o, t.to(o.dtype)), numbers(3)),
    "bce": ("binary-cross-entropy", lambda n, g: torch.randint(0, 2, (n, 3), generator=g)),
    "bce, weighted": (weighted_bce, lambda n, g: torch.randint(0, 2, (n, 3), generator=g)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str, compare: Compare) -> None:
    loss, labels = LOSSES[name]
    compare(lambda: Linear(6, 3), (6,), loss, labels, fuse=True)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("loss", ["cross-entropy", cross_entropy(weight=WEIGHTS)], ids=["plain", "weighted"])
def test_losses_of_each_token(loss: Any, ignored: bool, compare: Compare) -> None:
    compare(lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 5), loss, classes(5, ignored=ignored), fuse=True)
