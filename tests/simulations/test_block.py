"""A block of clients against the lean trainer, one after the other: the same numbers, whatever the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal import LocalTraining
from shoal.client.data import Shard
from shoal.client.models import cnn, lenet, linear, mlp
from shoal.client.net import Net, build_module, parameters_of
from shoal.client.trainer import LeanTrainer, Turn, turn_of
from shoal.protos import seeds
from shoal.protos.errors import InvalidUpdate
from shoal.simulations.block import BlockTrainer, Programs
from shoal.simulations.step import Unsuitable
from shoal.strategies.base import Batch, Drift, Slope, Update
from shoal.strategies.sums import Carried

LENGTHS = [23, 23, 14, 10, 10, 7, 3]


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embed, self.core, self.head = nn.Embedding(11, 6), kind(6, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.core(self.embed(x))[0][:, -1])
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.core = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.core(self.embed(x)).mean(dim=1))
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.unused, self.frozen = nn.Linear(6, 6), nn.Linear(3, 3), nn.Linear(6, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.frozen(self.a(torch.relu(self.a(x))))
        return out


IMAGE, TOKENS = (2, 16, 16), (5,)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: linear((6,), 4), (6,)),
    "mlp": (lambda: mlp((6,), 4, (7, 5)), (6,)),
    "activations": (
        lambda: nn.Sequential(
            *(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6), nn.SiLU()),
            *(nn.Linear(6, 6), nn.Sigmoid(), nn.Linear(6, 6), nn.LeakyReLU(), nn.Linear(6, 4), nn.ReLU(inplace=True)),
        ),
        (6,),
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 4)),
        (6,),
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)), (6,)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), (6,)),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * 14 * 14, 4)),
        IMAGE,
    ),
    "lenet": (lambda: lenet(IMAGE, 4), IMAGE),
    "cnn with batch norm": (lambda: cnn(IMAGE, 4, norm=True), IMAGE),
    "tied, frozen, unused": (Tied, (6,)),
    "gru": (lambda: Recurrent(nn.GRU), TOKENS),
    "lstm": (lambda: Recurrent(nn.LSTM), TOKENS),
    "attention": (Attention, TOKENS),
}


class Clients:
    """Some clients with a model in float64, trained by either trainer."""

    def __init__(self, name: str, local: LocalTraining, lengths: list[int] = LENGTHS) -> None:
        make, shape = NETS[name]
        self.net, self.local = Net(build_module(make, 0, "float64")), local
        self.carried = Carried(*self._carried())
        generator = torch.Generator().manual_seed(1)

        def shard(n: int) -> Shard:
            draw = (lambda: torch.randint(0, 11, (n, *shape), generator=generator)) if shape == TOKENS else None
            x = draw() if draw else torch.randn(n, *shape, generator=generator, dtype=torch.float64)
            return Shard(x, torch.randint(0, 4, (n,), generator=generator))

        self.shards = [shard(n) for n in lengths]
        self.start = self.net.flat.clone()

    def _carried(self) -> tuple[Tensor, Tensor]:
        values = parameters_of(self.net.module)
        return values.buffers, values.counters

    def turns(self) -> list[Turn]:
        return [turn_of(self.local, 0, str(k), 3, shard) for k, shard in enumerate(self.shards)]

    def lean(self, drift: Callable[[int], Drift | None] = lambda k: None, **run: Any) -> list[Update]:
        updates = []
        for k, turn in enumerate(self.turns()):
            torch.manual_seed(seeds.integer(0, "torch", 3, str(k)))
            trainer = LeanTrainer(self.net, self.local, turn, self.carried)
            updates.append(trainer.run(self.start, drift=drift(k), **run))
        return updates

    def block(self, fuse: bool, drift: Drift | None = None, **run: Any) -> Update:
        programs = Programs(self.net, self.local, fuse=fuse)
        trainer = BlockTrainer(programs, self.turns(), 0, self.carried)
        return trainer.run(self.start, drift=drift, **run)


def check(block: Update, lean: list[Update]) -> None:
    for k, one in enumerate(lean):
        torch.testing.assert_close(block.delta[k], one.delta, rtol=1e-10, atol=1e-12)
        assert one.delta.abs().max() > 0
        numbers = (block.examples[k].item(), block.steps[k].item(), block.lr_sum[k].item())  # type: ignore[index]
        assert numbers == pytest.approx((one.examples, one.steps, one.lr_sum))
        assert float(block.metrics["loss"][k]) == pytest.approx(one.metrics["loss"], abs=1e-10)  # type: ignore[index]
        for stacked, single in ((block.buffers, one.buffers), (block.counters, one.counters)):
            assert (stacked is None) == (single is None)
            if stacked is not None and single is not None:
                torch.testing.assert_close(stacked[k], single, rtol=1e-10, atol=1e-12)


SGD = LocalTraining(batch_size=5, drop_last=True)


@pytest.mark.parametrize("fuse", [False, True], ids=["captured", "fused"])
@pytest.mark.parametrize("name", NETS)
def test_every_net_equals_the_lean_trainer(name: str, fuse: bool) -> None:
    clients = Clients(name, SGD)
    check(clients.block(fuse), clients.lean())


LOCALS = {
    "epochs": LocalTraining(batch_size=5, epochs=3),
    "steps": LocalTraining(batch_size=5, steps=7),
    "one batch": LocalTraining(batch_size=0, epochs=2),
    "drop last": LocalTraining(batch_size=4, epochs=2, drop_last=True),
    "weight decay": LocalTraining(batch_size=5, epochs=2, weight_decay=0.1),
    "momentum": LocalTraining(batch_size=5, epochs=2, momentum=0.9),
    "nesterov": LocalTraining(batch_size=5, steps=6, momentum=0.9, nesterov=True, weight_decay=0.1),
    "clip": LocalTraining(batch_size=5, epochs=2, clip=0.1),
    "stragglers": LocalTraining(batch_size=5, epochs=4, stragglers=0.6),
    "adam": LocalTraining(batch_size=5, epochs=3, optimizer="adam", weight_decay=0.1),
    "adamw": LocalTraining(batch_size=5, steps=9, optimizer="adamw", weight_decay=0.1),
}
PLAIN = ("epochs", "steps", "stragglers", "one batch", "drop last", "weight decay")


@pytest.mark.parametrize(("name", "fuse"), [(n, False) for n in LOCALS] + [(n, True) for n in PLAIN])
def test_every_local_training_equals_the_lean_trainer(name: str, fuse: bool) -> None:
    clients = Clients("mlp", LOCALS[name])
    check(clients.block(fuse), clients.lean())


@pytest.mark.parametrize("fuse", [False, True], ids=["captured", "fused"])
def test_drifts_constant_or_not_one_for_all_or_each_its_own(fuse: bool) -> None:
    clients = Clients("mlp", LocalTraining(batch_size=5, epochs=2, weight_decay=0.01))
    start, own = clients.start, torch.randn(len(LENGTHS), len(clients.start), dtype=torch.float64) / 10
    check(clients.block(fuse, own), clients.lean(lambda k: own[k]))
    check(clients.block(fuse, own[0]), clients.lean(lambda k: own[0]))
    check(clients.block(fuse, lambda w: 0.3 * (w - start)), clients.lean(lambda k: lambda w: 0.3 * (w - start)))
    check(clients.block(fuse, lambda w: 0.3 * (w - own)), clients.lean(lambda k: lambda w: 0.3 * (w - own[k])))


@pytest.mark.parametrize("fuse", [False, True], ids=["captured", "fused"])
def test_a_drift_may_be_the_weights_themselves(fuse: bool) -> None:
    clients = Clients("mlp", LocalTraining(batch_size=5))
    check(clients.block(fuse, lambda w: w), clients.lean(lambda k: lambda w: w))


ENGINES = pytest.mark.parametrize("fuse", [False, True], ids=["captured", "fused"])


def ahead(at: Slope, w: Tensor) -> Tensor:
    """On a half of the batch, from where the other half leads."""
    half = max(1, at.size // 2)
    return at(w - 0.3 * at(w, slice(0, half)), slice(at.size - half, None))


@ENGINES
@pytest.mark.parametrize("name", ["mlp", "dropout", "layer norm", "lenet", "tied, frozen, unused", "gru", "attention"])
def test_gradients_of_a_strategys_own(name: str, fuse: bool) -> None:
    clients = Clients(name, LocalTraining(batch_size=4, epochs=2))
    check(clients.block(fuse, gradient=ahead), clients.lean(gradient=ahead))


@ENGINES
@pytest.mark.parametrize("local", ["momentum", "clip", "adam", "weight decay", "stragglers"])
def test_any_optimizer_takes_them(local: str, fuse: bool) -> None:
    clients, pull = Clients("mlp", LOCALS[local]), torch.full((1,), 0.1, dtype=torch.float64)
    check(clients.block(fuse, pull, gradient=ahead), clients.lean(lambda k: pull, gradient=ahead))


@ENGINES
def test_what_a_gradient_keeps_is_each_clients_own(fuse: bool) -> None:
    """Also of those who have fewer batches than their neighbours."""
    clients = Clients("mlp", LocalTraining(batch_size=5, epochs=2))
    size = len(clients.start)

    def summing(into: Tensor) -> Any:
        def gradient(at: Slope, w: Tensor) -> Tensor:
            g = at(w + into[at.part] / 10)
            into[at.part] = into[at.part] + g
            return g

        return gradient

    own = torch.zeros(len(LENGTHS), size, dtype=torch.float64)
    block, lean = clients.block(fuse, gradient=summing(own)), list[Update]()
    for k, turn in enumerate(clients.turns()):
        mine = torch.zeros(size, dtype=torch.float64)
        trainer = LeanTrainer(clients.net, clients.local, turn, clients.carried)
        lean.append(trainer.run(clients.start, gradient=summing(mine)))
        torch.testing.assert_close(own[k], mine, rtol=1e-10, atol=1e-12)
    check(block, lean)


@ENGINES
@pytest.mark.parametrize("local", ["epochs", "weight decay", "momentum", "clip", "adam", "adamw"])
def test_masked_weights_stay_as_they_are(local: str, fuse: bool) -> None:
    if fuse and local not in PLAIN:
        pytest.skip("the fused engine takes plain SGD")
    clients = Clients("mlp", LOCALS[local])
    mask = torch.arange(len(clients.start)) % 3 > 0
    block, lean = clients.block(fuse, mask=mask), clients.lean(mask=mask)
    check(block, lean)
    for delta in (block.delta, *(update.delta for update in lean)):
        assert not delta[..., ~mask].any() and delta[..., mask].abs().max() > 0


def test_a_mask_is_out_of_the_norm_that_is_clipped() -> None:
    """The step is as long as the limit allows for what moves."""
    clients = Clients("mlp", LocalTraining(batch_size=0, steps=1, clip=1e-3, lr=0.5))
    mask = torch.arange(len(clients.start)) >= len(clients.start) - 4  # the last layer's biases
    for update in clients.lean(mask=mask):
        assert float(update.delta.norm()) == pytest.approx(0.5e-3, rel=1e-2)


@pytest.mark.parametrize("name", ["mlp", "dropout", "batch norm", "lenet"])
def test_a_loss_of_its_own_is_that_of_the_lean_trainer_to_the_bit(name: str) -> None:
    clients = Clients(name, SGD)
    rates = torch.arange(1.0, len(LENGTHS) + 1, dtype=torch.float64)
    mask, pull = torch.arange(len(clients.start)) % 2 > 0, torch.randn(len(LENGTHS), len(clients.start)).double()

    def weighted(batch: Batch) -> Tensor:
        return batch.loss(batch.output) * rates[batch.part] + batch.features.square().mean() * len(batch.labels)

    block = clients.block(True, pull, loss=weighted, mask=mask)
    for k, turn in enumerate(clients.turns()):
        trainer = LeanTrainer(clients.net, clients.local, turn, clients.carried, k)
        torch.manual_seed(seeds.integer(0, "torch", 3, str(k)))
        lean = trainer.run(clients.start, drift=pull[k], loss=weighted, mask=mask)
        assert torch.equal(block.delta[k], lean.delta) and lean.delta.abs().max() > 0
        assert float(block.metrics["loss"][k]) == lean.metrics["loss"]  # type: ignore[index]
    with pytest.raises(Unsuitable, match="drift that changes"):
        clients.block(True, lambda w: w, loss=weighted)


@ENGINES
def test_a_gradient_that_does_not_look_at_the_batch(fuse: bool) -> None:
    clients = Clients("mlp", SGD)
    for train in (clients.block, lambda fuse, **run: clients.lean(**run)):
        with pytest.raises(InvalidUpdate, match="without looking at the batch"):
            train(fuse, gradient=lambda at, w: w)


def test_losses_and_gradients_of_whole_shards_before_and_after_training() -> None:
    """Random masks go on in each client's own stream."""
    clients = Clients("dropout", LocalTraining(batch_size=5))
    clients.shards = [Shard(shard.x.float(), shard.y) for shard in clients.shards]

    def all_of(trainer: LeanTrainer | BlockTrainer) -> tuple[Tensor, Tensor, Tensor]:
        before = trainer.gradient(clients.start)
        moved = clients.start + trainer.run(clients.start).delta
        return before, moved, trainer.loss(moved)

    block = all_of(BlockTrainer(Programs(clients.net, clients.local, fuse=True), clients.turns(), 0, clients.carried))
    assert block[2].shape == (len(LENGTHS), 1)
    for k, turn in enumerate(clients.turns()):
        torch.manual_seed(seeds.integer(0, "torch", 3, str(k)))
        placed = replace(turn, shard=Shard(turn.shard.x.double(), turn.shard.y))
        trainer = LeanTrainer(clients.net, clients.local, placed, clients.carried)
        for mine, lean in zip(block, all_of(trainer), strict=True):
            torch.testing.assert_close(mine[k].reshape(lean.shape), lean, rtol=1e-10, atol=1e-12)
