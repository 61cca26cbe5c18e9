"""The lean engine against the hand-written loop of ``examples/plain_fedavg.py``, on the same shards and batches."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal import Experiment, LocalTraining
from shoal.client.data import Shard
from shoal.client.net import build_module
from shoal.protos import seeds
from shoal.simulations.engine import Assignment, Engine, Job
from shoal.simulations.federated import ArrayData
from shoal.strategies.base import Context
from shoal.strategies.fedavg import FedAvg
from shoal.strategies.sums import Carried

ROOT = Path(__file__).parents[2]


def plain_loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plain_fedavg", ROOT / "examples" / "plain_fedavg.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)
    )


def data(dtype: torch.dtype) -> ArrayData:
    generator = torch.Generator().manual_seed(0)
    sizes = [30, 7, 19, 10, 25, 13]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    x = torch.randn(sum(sizes), 12, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 4, (sum(sizes),), generator=generator)
    offsets = {f"c{i}": (end - size, end, end) for i, (size, end) in enumerate(zip(sizes, ends, strict=True))}
    return ArrayData(x, y, offsets, classes=4)


def by_hand(model: nn.Module, d: ArrayData, rounds: int, cohort: int, lr: float, batch: int, epochs: int) -> Tensor:
    """The example's loop, fed with Shoal's cohorts and orders, which are named by the seed alone."""
    shards = {client: (d.shard(client).x, d.shard(client).y) for client in d.clients}
    cohorts = []
    for number in range(1, rounds + 1):
        rng = seeds.stream(0, "cohort", number)
        cohorts.append([d.clients[i] for i in rng.choice(len(d.clients), size=cohort, replace=False)])

    def orders(number: int, client: str) -> list[Tensor]:
        rng, n = seeds.stream(0, "batches", number, client), len(shards[client][0])
        return [torch.arange(n) if batch >= n else torch.from_numpy(rng.permutation(n)) for _ in range(epochs)]

    plain_loop().fedavg(model, shards, cohorts, orders, lr, batch)
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@pytest.mark.parametrize("make", [mlp, conv])
def test_equals_the_plain_loop_in_float64(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    d, local = data(torch.float64), LocalTraining(lr=0.2, batch_size=8, epochs=2)
    made = Experiment(model=make, data=d, local=local, rounds=5, cohort=4, dtype="float64")
    ours = made.simulate(workers=0, out=tmp_path, progress="none").parameters.trainable
    theirs = by_hand(build_module(make, 0, "float64"), d, rounds=5, cohort=4, lr=0.2, batch=8, epochs=2)

    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert (
        ours - torch.cat([p.detach().reshape(-1) for p in build_module(make, 0, "float64").parameters()])
    ).norm() > 0.1


@pytest.mark.parametrize("make", [mlp, conv])
def test_equals_the_plain_loop_in_float32_after_one_step(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    d, local = data(torch.float32), LocalTraining(lr=0.2, batch_size=8, steps=1)
    whole = ArrayData(d.x[:30], d.y[:30], {"c0": (0, 30, 30)}, classes=4)
    made = Experiment(model=make, data=whole, local=local, rounds=1, cohort=1)
    ours = made.simulate(workers=0, out=tmp_path, progress="none").parameters.trainable
    model = build_module(make, 0, "float32")
    order = torch.from_numpy(seeds.stream(0, "batches", 1, "c0").permutation(30))[:8]
    plain_loop().train(model, whole.x, whole.y, [order], 0.2, 8)
    theirs = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])

    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_the_example_runs_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(ROOT / "examples" / "plain_fedavg.py"), run_name="__main__")

    assert float(capsys.readouterr().out.split()[-1]) > 0.9


def engine(model: Callable[[], nn.Module] = mlp, d: Any = None, **changes: Any) -> Engine:
    fields: dict[str, Any] = {"strategy": FedAvg(), "local": LocalTraining(batch_size=8)} | changes
    return Engine(Assignment(model, d or data(torch.float32), **fields))


def run(made: Engine, clients: list[str], train: bool = True, seconds: float | None = None) -> Any:
    flat = torch.cat([p.detach().reshape(-1) for p in build_module(mlp, 0, "float32").parameters()])
    carried = Carried(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    job = Job(0, [(client, None) for client in clients], Context(1, 6, 6), train)
    with torch.random.fork_rng(devices=[]):
        return made.run(job, {"parameters": flat}, carried, seconds)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    def flat(seed: int) -> Mapping[str, Tensor]:
        return build_module(mlp, seed, "float32").state_dict()

    torch.manual_seed(9)
    first = flat(0)
    assert all(torch.equal(value, flat(0)[name]) for name, value in first.items())
    assert not torch.equal(first["0.weight"], flat(1)["0.weight"])


def test_the_deadline_holds_between_clients() -> None:
    result = run(engine(), ["c0", "c1"], seconds=-1.0)

    assert [f.reason for f in result.parts[0].failures] == [
        f"client 'c{i}' did not answer before the deadline" for i in (0, 1)
    ]
    assert result.parts[0].total is None and not result.staged


def test_an_unknown_client_fails_alone() -> None:
    result = run(engine(), ["c0", "nobody", "c1"])

    assert [report.client for report in result.parts[0].reports] == ["c0", "c1"]
    assert "nobody" in result.parts[0].failures[0].reason
    assert result.parts[0].total.counted == 2


def test_evaluation_is_of_the_held_out_examples() -> None:
    base = data(torch.float32)
    held = ArrayData(base.x, base.y, {"a": (0, 10, 15), "b": (15, 30, 30)}, Shard(base.x, base.y), 4)
    result = run(engine(d=held), ["a", "b"], train=False)

    assert [(report.client, report.numbers["examples"]) for report in result.parts[0].reports] == [("a", 5.0)]
    model = build_module(mlp, 0, "float32").eval()
    expected = float((model(base.x[10:15]).argmax(1) == base.y[10:15]).float().mean())
    assert result.parts[0].reports[0].numbers["accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_metrics_over_chunks_are_means_over_examples(rows: int) -> None:
    from shoal.client.net import Net
    from shoal.client.participant import evaluate

    d, net = data(torch.float64), Net(build_module(mlp, 0, "float64"))
    shard, local = Shard(d.x, d.y), LocalTraining()

    assert evaluate(net, local, shard, chunk=rows) == pytest.approx(evaluate(net, local, shard))
