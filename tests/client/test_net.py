"""Module ↔ flat vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.client.net import Net, layout_of, load_parameters, parameters_of
from shoal.protos.errors import ExperimentError, InvalidUpdate
from shoal.protos.parameters import Segment


class Tied(nn.Module):
    """An output layer that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.output = nn.Linear(3, 5, bias=False)
        self.output.weight = self.embedding.weight


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def test_segments() -> None:
    module = normed()
    module[0].bias.requires_grad_(False)  # type: ignore[index]
    layout = layout_of(module)

    assert layout.size(Segment.TRAINABLE) == 12 + 3 + 3 + 6 + 2
    assert [e.name for e in layout.of(Segment.BUFFERS)] == ["1.running_mean", "1.running_var"]
    assert [e.name for e in layout.of(Segment.COUNTERS)] == ["1.num_batches_tracked"]
    assert [e.name for e in layout.of(Segment.FROZEN)] == ["0.bias"]


def test_tied_tensors_cross_once() -> None:
    assert [e.name for e in layout_of(Tied()).entries] == ["embedding.weight"]
    net = Net(Tied())
    net.flat.fill_(2.0)

    assert net.module.state_dict()["output.weight"].unique().tolist() == [2.0]


def test_the_flat_vector_is_the_module() -> None:
    net = Net(normed())
    x = torch.randn(6, 4)
    before = net.module(x)
    net.flat.mul_(2)

    assert not torch.equal(before, net.module(x))
    assert torch.equal(parameters_of(net.module).trainable, net.flat)
    assert all(torch.equal(view, weight) for view, weight in zip(net.split(net.flat), net.weights, strict=True))


def test_named_values_are_the_state_dict() -> None:
    module = normed()
    named = parameters_of(module).named()

    assert named.keys() == module.state_dict().keys()
    assert all(torch.equal(named[name], value) for name, value in module.state_dict().items())


def test_buffers_are_copied_in_and_out() -> None:
    net = Net(normed())
    net.module.train()
    net.module(torch.randn(8, 4))
    buffers, counters = net.read(Segment.BUFFERS), net.read(Segment.COUNTERS)
    assert buffers is not None and counters is not None and counters.tolist() == [1]
    other = Net(normed())
    other.flat.copy_(net.flat)
    other.restore(buffers, counters)

    assert all(torch.equal(a, b) for a, b in zip(net.module.buffers(), other.module.buffers(), strict=True))
    assert torch.equal(other.flat, net.flat)


def test_load_parameters_into_a_fresh_module() -> None:
    module, fresh = normed(), normed()
    load_parameters(fresh, parameters_of(module))

    assert all(torch.equal(fresh.state_dict()[name], value) for name, value in module.state_dict().items())


def test_a_half_precision_model_is_refused() -> None:
    with pytest.raises(ExperimentError, match=r"'0.weight' is torch.bfloat16.*model.float\(\)"):
        layout_of(nn.Sequential(nn.Linear(2, 2)).bfloat16())


def test_mixed_precision_is_refused() -> None:
    with pytest.raises(InvalidUpdate, match="one dtype"):
        layout_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()))


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ExperimentError, match="requires_grad"):
        layout_of(nn.Flatten())


# --- the gradient of pooled images -----------------------------------------------------------------------------------


class Formats(TorchDispatchMode):
    """Notes how the gradients lie that max-pooling's backward pass is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is torch.ops.aten.max_pool2d_with_indices_backward.default:
            self.seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("between", [nn.Identity(), nn.ReLU()], ids=["flatten", "relu"])
def test_pooled_images_have_gradients_as_they_lie(between: nn.Module) -> None:
    """Wherever they come from, and the numbers are those of the module alone."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), between, nn.Flatten(), nn.Linear(27, 4)]
    module, x, y = nn.Sequential(*layers).double(), torch.randn(5, 2, 8, 8).double(), torch.arange(5) % 4
    alone = torch.autograd.grad(functional.cross_entropy(module(x), y), list(module.parameters()))
    net = Net(module)
    with Formats() as formats:
        for _ in range(2):
            loss = functional.cross_entropy(net.module(net.arrange(x)), y)
            for mine, theirs in zip(torch.autograd.grad(loss, net.weights), alone, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)

    assert formats.seen == [True, True]
