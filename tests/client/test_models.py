"""The models by name, and losses and metrics against PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from shoal.client import losses, models
from shoal.client.net import layout_of
from shoal.protos.errors import ExperimentError
from shoal.protos.parameters import Segment


def test_sizes() -> None:
    """The 2NN has McMahan's 199,210 parameters; LeNet on CIFAR shapes the 62,006 of PyTorch's tutorial."""
    assert layout_of(models.mlp((1, 28, 28), 10)).size(Segment.TRAINABLE) == 199_210
    assert layout_of(models.lenet((3, 32, 32), 10)).size(Segment.TRAINABLE) == 62_006
    assert layout_of(models.linear((784,), 10)).size(Segment.TRAINABLE) == 7_850


def test_a_gru_says_what_follows_each_token() -> None:
    """McMahan's 2 × 256 with GRUs: three gates of (in + hidden) weights and two biases; the future does not leak."""
    model = models.gru(82, hidden=256, layers=2)
    gates = 3 * 256 * ((8 + 256) + 2) + 3 * 256 * ((256 + 256) + 2)
    assert layout_of(model).size(Segment.TRAINABLE) == 82 * 8 + gates + 82 * 257
    tokens = torch.randint(0, 82, (3, 12))
    changed = torch.cat([tokens[:, :7], (tokens[:, 7:] + 1) % 82], dim=1)
    before, after = model(tokens), model(changed)
    assert before.shape == (3, 82, 12)
    assert torch.equal(before[:, :, :7], after[:, :, :7]) and not torch.equal(before[:, :, 7:], after[:, :, 7:])
    assert losses.cross_entropy(before, tokens).ndim == 0 and losses.accuracy(before, tokens).shape == (3,)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 17, 30)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(2, *shape)
    for model in (models.linear(shape, 5), models.mlp(shape, 5, (7,)), models.lenet(shape, 5)):
        assert model(x).shape == (2, 5)
    assert models.cnn(shape, 5, norm=True)(x).shape == (2, 5)
    assert layout_of(models.cnn(shape, 5, norm=True)).size(Segment.BUFFERS) == 2 * (16 + 32)


@pytest.mark.parametrize("make", [models.cnn, models.lenet])
def test_images_are_needed(make: object) -> None:
    for shape in ((784,), (1, 2, 28)):
        with pytest.raises(ExperimentError, match="needs images"):
            make(shape, 10)  # type: ignore[operator]


def test_losses() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    single, binary = torch.randn(6, 1), torch.tensor([0, 1, 1, 0, 0, 1])

    assert losses.cross_entropy(logits, labels) == functional.cross_entropy(logits, labels)
    assert losses.mse(single, labels) == ((single[:, 0] - labels) ** 2).mean()
    expected = functional.binary_cross_entropy_with_logits(single[:, 0], binary.float())
    torch.testing.assert_close(losses.binary_cross_entropy(single, binary), expected)


def test_metrics_are_one_number_an_example() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])

    assert losses.accuracy(logits, torch.tensor([0, 1, 1])).tolist() == [1, 1, 0]
    assert losses.accuracy(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 1])).tolist() == [1, 0]
    assert losses.accuracy(torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)).shape == (2,)
    assert losses.mae(torch.tensor([[1.0], [3.0]]), torch.tensor([2, 2])).tolist() == [1, 1]
