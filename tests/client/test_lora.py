"""Adapters: what is trained, what crosses, and that nothing else moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shoal import Experiment, FedAvg, LocalTraining
from shoal.client.data import Shard
from shoal.client.lora import lora
from shoal.client.net import Net, layout_of, parameters_of
from shoal.protos.errors import ExperimentError
from shoal.protos.parameters import Segment
from shoal.simulations.federated import ArrayData


def base() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 3))


def data() -> ArrayData:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 6, generator=generator), torch.randint(0, 3, (80,), generator=generator)
    return ArrayData(x, y, {f"c{i}": (20 * i, 20 * i + 20, 20 * i + 20) for i in range(4)}, Shard(x, y), classes=3)


def names(module: nn.Module, segment: Segment) -> list[str]:
    return [entry.name for entry in layout_of(module).of(segment)]


def test_it_begins_as_the_base_model() -> None:
    x = torch.randn(5, 6)
    assert torch.equal(lora(base(), rank=2)(x), base()(x))


def test_only_the_adapters_are_trained() -> None:
    adapted = lora(base(), rank=2)
    assert names(adapted, Segment.TRAINABLE) == ["0.a", "0.b", "3.a", "3.b"]
    assert Net(adapted).flat.numel() == 2 * (6 + 12) + 2 * (12 + 3)
    assert set(names(adapted, Segment.FROZEN)) == {f"{i}.{part}" for i in (0, 2, 3) for part in ("weight", "bias")}


def test_layers_are_chosen_by_name() -> None:
    chosen = lora(base(), rank=2, only=["3"], also=["2.*"], freeze_a=True)
    assert set(names(chosen, Segment.TRAINABLE)) == {"2.weight", "2.bias", "3.b"}
    wrong: list[Any] = [{"only": ["head"]}, {"also": ["head"]}]
    for patterns in wrong:
        with pytest.raises(ExperimentError, match="is called 'head'; the model has 0"):
            lora(base(), **patterns)


def test_what_attention_takes_without_calling_it_is_left_alone() -> None:
    layer = lora(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), rank=2)
    assert {name.partition(".")[0] for name in names(layer, Segment.TRAINABLE)} == {"linear1", "linear2"}


def test_a_product_of_means_is_the_mean_of_products_where_a_is_frozen() -> None:
    """So clients' mean output is that of their mean; with A trained it is not."""

    def apart(freeze_a: bool) -> float:
        generator = torch.Generator().manual_seed(3)
        models = [lora(nn.Linear(6, 5), rank=2, freeze_a=freeze_a) for _ in range(3)]
        x, base = torch.randn(4, 6, generator=generator), dict(models[0].named_parameters())
        for model in models[:2]:
            for name, p in model.named_parameters():
                p.data.copy_(torch.randn(p.shape, generator=generator) if p.requires_grad else base[name])
        for mean, *both in zip(*(models[i].parameters() for i in (2, 0, 1)), strict=True):
            mean.data.copy_((both[0].data + both[1].data) / 2)
        outputs = [model(x) for model in models]
        return float((outputs[2] - (outputs[0] + outputs[1]) / 2).detach().abs().max())

    assert apart(True) < 1e-4 < 1e-1 < apart(False)


def test_a_transformer_layer_does_not_pass_its_adapters_by() -> None:
    """PyTorch's fast path in evaluation reads the weights of dense layers without calling them."""
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(3, 5, 8)
    before = layer.eval()(x).detach()
    adapted = lora(layer, rank=2)
    nn.init.normal_(adapted.linear1.b)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        evaluated, trained = adapted.eval()(x), adapted.train()(x)

    torch.testing.assert_close(evaluated, trained, rtol=1e-5, atol=1e-5)
    assert (evaluated - before).abs().max() > 1e-2


def test_a_model_that_is_one_layer() -> None:
    made = lora(nn.Linear(6, 3), rank=2)
    assert names(made, Segment.TRAINABLE) == ["a", "b"]


@pytest.mark.parametrize("engine", ["lean", "fused:4"])
def test_a_run_moves_and_sends_nothing_else(engine: str, tmp_path: Path) -> None:
    local = LocalTraining(lr=0.02, batch_size=5)
    made = Experiment(
        model=lambda: lora(base(), rank=2), data=data(), strategy=FedAvg(), local=local, rounds=8, cohort=4
    )
    run = made.simulate(engine=engine, workers=0, out=tmp_path, progress="none")

    assert run.metrics["test_loss"].iloc[-1] < run.metrics["test_loss"].iloc[0]
    trained, before = run.parameters.named(), parameters_of(base()).named()
    for name, value in before.items():
        assert torch.equal(trained[name], value)
    assert run.metrics["bytes_up"].iloc[-1] == 4 * 4 * (2 * (6 + 12) + 2 * (12 + 3))
