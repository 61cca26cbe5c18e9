"""What models do beside calling layers: a block gives the numbers of the lean trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

Linear = nn.Linear
Parameter = nn.Parameter
Make = Callable[[], nn.Module]


class Model(nn.Module):
    """Its forward pass is a function of the module and its input; tensors among the ``parts`` are buffers."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def between(function: Callable[[Any, Tensor], Tensor], **parts: Callable[[], Any]) -> Make:
    """A model that does something with the hidden features ``[b, 5]`` between two dense layers."""

    def make() -> nn.Module:
        made = {name: part() for name, part in parts.items()}
        return Model(lambda m, x: m.last(function(m, m.first(x))), first=Linear(6, 5), last=Linear(5, 3), **made)

    return make


def inner(function: Callable[[Tensor], Tensor]) -> Make:
    return between(lambda m, h: function(h))


def weight(*shape: int) -> Callable[[], Parameter]:
    return lambda: Parameter(torch.randn(shape) / 3)


# --- memory: what is changed in place, and seen through views --------------------------------------------------------


def new(h: Tensor, make: Callable[..., Tensor] = torch.zeros) -> Tensor:
    return make(h.shape, dtype=h.dtype)


def columns(h: Tensor) -> Tensor:
    out = new(h, torch.empty)
    out[:, :2], out[:, 2:] = h[:, 3:], h[:, :3]
    return out


def through_views(h: Tensor) -> Tensor:
    h = h * 1
    h.view(2, 2, 5)[1] *= 3
    h.t()[3].mul_(2)
    h.detach().add_(1)
    return h


def rows(h: Tensor) -> Tensor:
    h = h * 1
    h[:, 2], h[torch.arange(4), h.argmax(1)] = 0, 0.25
    h[0] += 1
    return h


def masked(h: Tensor) -> Tensor:
    h = h * 1
    h[h > 0.2], h[h[:, 0] < 0] = 0.5, h.detach().mean()
    return h.masked_fill_(h < -0.3, -1)


def scalars(h: Tensor) -> Tensor:
    total = torch.tensor(0.0, dtype=h.dtype)
    for column in h.unbind(1):
        total += column.mean()
    before = total.sum()
    total += 1
    return h * before + total


def diagonal(h: Tensor) -> Tensor:
    product = h.unsqueeze(1) * h.unsqueeze(2)
    product.diagonal(dim1=1, dim2=2).mul_(0.5)
    return product.sum(1)


def into(h: Tensor) -> Tensor:
    out = new(h, torch.empty)
    with torch.no_grad():
        torch.mul(h, 2.0, out=out)
    return h * out


MEMORY: dict[str, Make] = {
    "relu_": inner(lambda h: h.relu_()),
    "a new tensor added to": inner(lambda h: new(h).add_(h)),
    "a new tensor scattered into": inner(lambda h: h * new(h).scatter_(1, h.argmax(1, keepdim=True), 1.0)),
    "columns of a new tensor": inner(columns),
    "through views": inner(through_views),
    "rows and elements": inner(rows),
    "masked": inner(masked),
    "scalars": inner(scalars),
    "a diagonal": inner(diagonal),
    "out=": inner(into),
    "the input": lambda: Model(lambda m, x: m.a(x.mul_(2)) + x.sum(1, keepdim=True), a=Linear(6, 3)),
    "a view of the input": lambda: Model(lambda m, x: x[:, :3] * m.w, w=weight(3)()),
}

# --- weights, and gradients that need care where they go straight into them ------------------------------------------


class Bent(torch.autograd.Function):
    """A product whose gradients are sums with a factor, changed after a product was taken of them, and a weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b)
        return x @ a + b.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, a, b = ctx.saved_tensors
        g = g.clone()
        product = x.t() @ g
        g.mul_(3)
        return g @ a.t(), torch.add(product, product, alpha=2), b.detach()


def clamped(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.a.weight.clamp_(-0.2, 0.2)
    return torch.as_tensor(m.a(x))


def tied() -> nn.Module:
    model = nn.Sequential(Linear(6, 6), nn.Tanh(), Linear(6, 6), nn.Tanh(), Linear(6, 3))
    model[2].weight = model[0].weight
    return model


def half_frozen() -> nn.Module:
    model = nn.Sequential(Linear(6, 5), nn.BatchNorm1d(5), Linear(5, 3))
    model[1].requires_grad_(False)
    return model


def normed(norm: Any) -> Make:
    return lambda: nn.Sequential(norm(Linear(6, 6)), nn.Tanh(), Linear(6, 3))


WEIGHTS: dict[str, Make] = {
    "a product of weights": lambda: Model(lambda m, x: x @ (m.a @ m.b @ m.a), a=weight(6, 3)(), b=weight(3, 6)()),
    "a low rank": lambda: Model(
        lambda m, x: x @ (m.w + m.a @ m.b), w=weight(6, 3)(), a=weight(6, 2)(), b=weight(2, 3)()
    ),
    "twice": lambda: Model(lambda m, x: torch.tanh(x @ m.w) @ m.w.t() @ m.v, w=weight(6, 5)(), v=weight(6, 3)()),
    "tied": tied,
    "scalars": lambda: Model(lambda m, x: m.a(x) * m.w.sum() + m.w * m.w, a=Linear(6, 3), w=weight()()),
    "a scalar added": lambda: Model(lambda m, x: torch.addmm(m.w, x, m.a), a=weight(6, 3)(), w=weight()()),
    "gradients of its own": lambda: Model(lambda m, x: Bent.apply(x, m.a, m.b), a=weight(6, 3)(), b=weight(2)()),
    "clamped": lambda: Model(clamped, a=Linear(6, 3)),
    "weight norm": normed(parametrizations.weight_norm),
    "spectral norm": normed(parametrizations.spectral_norm),
    "orthogonal": normed(parametrizations.orthogonal),
    "half frozen": half_frozen,
}

# --- buffers ---------------------------------------------------------------------------------------------------------


def running(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.kept.mul_(0.9).add_(x.mean(0), alpha=0.1)
        m.kept[:2] = x.mean(0)[:2]
        m.n += 1
    return torch.as_tensor(m.a(x - m.kept))


def bound_anew(m: Any, x: Tensor) -> Tensor:
    m.kept, m.other = m.other, 0.9 * m.kept + 0.1 * x.detach().mean(0)
    m.kept += 1
    m.n = m.n + 1
    return torch.as_tensor(m.a(x - m.kept * m.other))


def flags(m: Any, x: Tensor) -> Tensor:
    m.flags.logical_not_()
    return torch.as_tensor(m.a(torch.where(m.flags, x, -x).masked_fill(~m.flags, 0.5)[:, m.order] * (m.bytes + 10)))


def counted() -> dict[str, Tensor]:
    return {"kept": torch.randn(6), "other": torch.randn(6), "n": torch.zeros((), dtype=torch.int64)}


def aside(m: Any, x: Tensor) -> Tensor:
    m.norm(x)
    return torch.as_tensor(m.a(x))


MASKS = {
    "flags": torch.tensor([True, False] * 3),
    "order": torch.tensor([3, 1, 0, 2, 5, 4], dtype=torch.int32),
    "bytes": torch.tensor([250, 251, 252, 0, 2, 3], dtype=torch.uint8),
}


def norm1d(**how: Any) -> Make:
    return lambda: nn.Sequential(Linear(6, 5), nn.BatchNorm1d(5, **how), nn.ReLU(), Linear(5, 3))


BUFFERS: dict[str, Make] = {
    "running": lambda: Model(running, a=Linear(6, 3), **counted()),
    "bound anew": lambda: Model(bound_anew, a=Linear(6, 3), **counted()),
    "of other dtypes": lambda: Model(flags, a=Linear(6, 3), **{name: mask.clone() for name, mask in MASKS.items()}),
    "changed aside": lambda: Model(aside, a=Linear(6, 3), norm=nn.BatchNorm1d(6)),
    "batch norm": norm1d(momentum=0.3),
    "batch norm without weights": norm1d(affine=False),
    "batch norm without statistics": norm1d(track_running_stats=False),
}

# --- operations that stacking can get wrong --------------------------------------------------------------------------

OPERATIONS: dict[str, Make] = {
    "unsqueeze": inner(lambda h: h - h.max(1)[0][:, None] + h.mean(1).unsqueeze(-1) * h.sum(0).unsqueeze(0)),
    "over all": inner(lambda h: (h - h.amax()) / (h.std() + h.amin().abs()) + h.norm()),
    "order": inner(lambda h: h.sort(1)[0] + h.gather(1, h.argsort(1)) + h.topk(2, 1)[0][:, :1] + h.cumsum(1)),
    "scatter": inner(lambda h: h + torch.zeros_like(h).scatter_add(1, h.argsort(1) % 3, h)),
    "index": between(lambda m, h: m.w[(h > 0).sum(1)] + h[:, [1, 0, 2, 4, 3]], w=weight(6, 5)),
    "numbers of another dtype": inner(lambda h: h * h.detach().sum().float() + (h > 0).sum() + h.mean().float()),
    "complex": inner(lambda h: torch.fft.irfft(torch.fft.rfft(h, 6) * 1j, 6)[:, :5] + torch.complex(h, h).conj().abs()),
    "einsum": between(lambda m, h: torch.einsum("bi,bj,ijk->bk", h, h, m.w), w=weight(5, 5, 5)),
    "lower precision": inner(lambda h: h + h.bfloat16().mul(2).to(h.dtype)),
    "a gradient inside": inner(lambda h: h + torch.autograd.grad((h**3).sum(), h, create_graph=True)[0]),
    "recomputed": between(lambda m, h: checkpoint(m.c, h, use_reentrant=False), c=lambda: Linear(5, 5)),
    "dropout": inner(lambda h: functional.dropout(h) + functional.dropout(h.t(), 0.3).t()),
    "alpha dropout": inner(lambda h: functional.alpha_dropout(h, 0.3, training=True)),
}


MODELS = MEMORY | WEIGHTS | BUFFERS | OPERATIONS


@pytest.mark.parametrize("fuse", [False, True], ids=["captured", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_a_block_does_what_the_model_does(name: str, fuse: bool, compare: Callable[..., None]) -> None:
    compare(MODELS[name], fuse=fuse)
