"""Shoal's strategies inside Flower, and Flower's inside Shoal: the results are those of Shoal's own coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.server import strategy as legacy
from flwr.serverapp import ServerApp
from flwr.serverapp import strategy as flower
from torch import nn

import shoal
import shoal.flower
from shoal.flower.keep import read_arrays
from shoal.protos.errors import ExperimentError, RunError

ROUNDS, FEDAVG = 3, shoal.FedAvg()


class Normed(nn.Module):
    """With buffers and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.norm(self.first(x)).relu())
        return out


def experiment(clients: int, strategy: shoal.Strategy = FEDAVG, **given: Any) -> shoal.Experiment:
    rng = np.random.default_rng(0)
    sizes = [16 + 8 * k for k in range(clients)]
    x = rng.normal(size=(sum(sizes), 4))
    y = (x[:, 0] + x[:, 1] > 0).astype(np.int64)
    names = np.repeat([f"c{k}" for k in range(clients)], sizes)
    test = rng.normal(size=(40, 4))
    data = shoal.datasets.from_arrays(
        x, y, clients=names, test=(test, (test[:, 0] + test[:, 1] > 0).astype(np.int64)), client_test=0.25
    )
    local = shoal.LocalTraining(lr=0.1, batch_size=8, epochs=2)
    fixed: dict[str, Any] = {
        "model": Normed,
        "data": data,
        "local": local,
        "rounds": ROUNDS,
        "cohort": clients,
        "seed": 3,
    }
    return shoal.Experiment(strategy=strategy, **{**fixed, "dtype": "float64", **given})


def own(e: shoal.Experiment, tmp_path: Path) -> dict[str, np.ndarray]:
    run = e.simulate(engine="lean", workers=0, out=tmp_path / "own", progress="none")
    return {name: tensor.numpy() for name, tensor in run.parameters.named().items()}


def inside(e: shoal.Experiment, tmp_path: Path, server: shoal.Strategy | None = None, **options: Any) -> shoal.Run:
    """The experiment as a Flower app, on Shoal's grid."""
    app = ServerApp()
    model = Normed().to(getattr(torch, e.dtype))
    strategy = shoal.flower.strategy(server or e.strategy, model=model, seed=e.seed, **options)

    @app.main()
    def main(grid: Any, context: Any) -> None:
        strategy.start(grid=grid, initial_arrays=shoal.flower.initial_arrays(e), num_rounds=e.rounds)

    pair = app, shoal.flower.client_app(e)
    nodes = len(e.data.split(e.seed).clients)  # type: ignore[union-attr]
    return shoal.flower.run(pair, nodes=nodes, seed=1, workers=0, out=tmp_path / "flower", progress="none")


OURS = [
    shoal.FedAvg(),
    shoal.FedProx(mu=0.5),
    shoal.Scaffold(),
    shoal.FedNova(),
    shoal.FedAdam(server_lr=0.05),
    shoal.FedDyn(),
    shoal.FedBN(),
    shoal.APFL(),
    shoal.MimeLite(),
]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", OURS, ids=lambda strategy: type(strategy).__name__)
def test_inside_flower_it_is_the_same_algorithm(strategy: shoal.Strategy, tmp_path: Path) -> None:
    e = experiment(5, strategy)
    expected, run = own(e, tmp_path), inside(e, tmp_path)
    found = read_arrays(run.path)

    assert run.status == "finished" and not len(run.failures)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-11, atol=1e-13, err_msg=name)
    assert list(run.metrics.index) == [1, 2, 3] and "clients_loss" in run.metrics


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [shoal.Scaffold(), shoal.FedNova()], ids=lambda s: type(s).__name__)
def test_where_everybody_is_asked_the_bits_are_the_same(strategy: shoal.Strategy, tmp_path: Path) -> None:
    e = experiment(5, strategy, dtype="float32")
    expected, found = own(e, tmp_path), read_arrays(inside(e, tmp_path).path)

    assert all(np.array_equal(found[name], array) for name, array in expected.items())


def test_an_update_that_was_not_counted_leaves_no_state(tmp_path: Path) -> None:
    """SCAFFOLD where only some are asked: control variates must sum to the server's, n c = Σ cₖ."""
    e = experiment(4, shoal.Scaffold())
    app, client = ServerApp(), shoal.flower.client_app(e)
    strategy = shoal.flower.strategy(e.strategy, model=Normed().double(), fraction_train=0.5, fraction_evaluate=0.0)
    calls = list[int]()

    def losing(message: Message, context: Any, call: Any) -> Message:
        """Every third reply is lost after the client has trained."""
        calls.append(1)
        reply: Message = call(message, context)
        if len(calls) % 3 == 0:
            raise ConnectionError("lost")
        return reply

    client = shoal.flower.client_app(e, mods=[losing])
    states = list[Any]()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        strategy.start(grid=grid, initial_arrays=shoal.flower.initial_arrays(e), num_rounds=6)
        list(
            grid.send_and_receive(strategy.configure_evaluate(7, shoal.flower.initial_arrays(e), ConfigRecord(), grid))
        )
        states.extend(node.context.state for node in grid.nodes.values())

    shoal.flower.run((app, client), nodes=4, seed=1, workers=0, out=tmp_path, progress="none")
    kept = [state.get("shoal-staged", state.get("shoal-settled")) for state in states]
    controls = [record["control"].numpy() for record in kept if record is not None]

    assert len(calls) == 12
    np.testing.assert_allclose(sum(controls) / 4, strategy._state["control"], rtol=1e-9, atol=1e-12)


def test_any_client_app_will_do_where_the_client_half_is_plain(tmp_path: Path) -> None:
    """FedAvg by hand: clients that know nothing of Shoal."""
    app, client = ServerApp(), ClientApp()

    @client.train()
    def train(message: Message, context: Any) -> Message:
        k = int(context.node_config["partition-id"])
        w = message.content.array_records["arrays"]["w"].numpy() + k
        metrics = MetricRecord({"num-examples": 1 + k})
        return Message(RecordDict({"arrays": ArrayRecord({"w": Array(w)}), "metrics": metrics}), reply_to=message)

    def start(strategy: Any) -> shoal.Run:
        @app.main()
        def main(grid: Any, context: Any) -> None:
            strategy.start(grid=grid, initial_arrays=ArrayRecord({"w": Array(np.zeros(3))}), num_rounds=2)

        return shoal.flower.run((app, client), nodes=3, workers=0, out=tmp_path, progress="none")

    run = start(shoal.flower.strategy(shoal.FedAvg(), fraction_evaluate=0.0))
    assert read_arrays(run.path)["w"] == pytest.approx(2 * (0 * 1 + 1 * 2 + 2 * 3) / 6)
    with pytest.raises(RunError, match=r"Scaffold has a client half of its own; use shoal.flower.client_app"):
        start(shoal.flower.strategy(shoal.Scaffold(), fraction_evaluate=0.0))


def test_halves_that_do_not_belong_together(tmp_path: Path) -> None:
    e = experiment(3, shoal.Scaffold())
    with pytest.raises(RunError, match="has no update that counts"):
        inside(e, tmp_path, server=shoal.FedAvg())


# --- Flower's strategies inside Shoal ---------------------------------------------------------------------------------

THEIRS = [
    (flower.FedAvg(), shoal.FedAvg()),
    (flower.FedProx(proximal_mu=0.5), shoal.FedProx(mu=0.5)),
    (flower.FedAvgM(server_momentum=0.9), shoal.FedAvgM(momentum=0.9)),
    (legacy.FedAvg(), shoal.FedAvg()),
    (legacy.FedProx(proximal_mu=0.5), shoal.FedProx(mu=0.5)),
]


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theirs", "ours"), THEIRS, ids=lambda s: f"{type(s).__module__.split('.')[0]}-{type(s).__name__}"
)
def test_flowers_strategy_runs_the_experiment(theirs: Any, ours: shoal.Strategy, tmp_path: Path) -> None:
    expected = own(experiment(4, ours, model=plain), tmp_path)
    own_run = shoal.Run(next((tmp_path / "own").iterdir()))
    run = shoal.flower.simulate(experiment(4, model=plain), theirs, workers=0, out=tmp_path / "flower", progress="none")
    found = read_arrays(run.path)

    for position, (name, array) in enumerate(expected.items()):
        one = found[name if isinstance(theirs, flower.Strategy) else str(position)]
        np.testing.assert_allclose(one, array, rtol=1e-10, atol=1e-12, err_msg=name)
    assert list(run.metrics.test_accuracy) == pytest.approx(list(own_run.metrics.test_accuracy))
    assert "clients_loss" in run.metrics


ANY = [
    flower.FedMedian(),
    flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2),
    flower.FedTrimmedAvg(beta=0.25),
    flower.FedYogi(),
    flower.QFedAvg(client_learning_rate=0.1, train_loss_key="loss"),
    flower.DifferentialPrivacyClientSideFixedClipping(flower.FedAvg(), 0.1, 1.0, 4),
    legacy.FedMedian(),
    legacy.FedTrimmedAvg(),
    legacy.DifferentialPrivacyClientSideAdaptiveClipping(legacy.FedAvg(), 0.1, 4),
]


@pytest.mark.slow
@pytest.mark.parametrize("theirs", ANY, ids=lambda s: f"{type(s).__module__.split('.')[1]}-{type(s).__name__}")
def test_any_of_flowers_strategies_runs(theirs: Any, tmp_path: Path) -> None:
    run = shoal.flower.simulate(experiment(4, model=plain), theirs, workers=0, out=tmp_path, progress="none")

    assert run.status == "finished" and not len(run.failures)
    assert list(run.metrics.counted[1:]) == [4] * ROUNDS


@pytest.mark.parametrize("given", [flower.FedAvg(), legacy.FedAvg()])
def test_an_experiment_says_how_to_run_flowers_strategies(given: Any) -> None:
    with pytest.raises(ExperimentError, match=r"strategy is a FedAvg; .* shoal\.flower\.simulate"):
        shoal.Experiment(model="mlp", strategy=given)


def test_what_is_no_strategy_of_flowers() -> None:
    with pytest.raises(ExperimentError, match="FedAvg is no strategy of Flower's"):
        shoal.flower.simulate(experiment(2), shoal.FedAvg())  # type: ignore[arg-type]
    with pytest.raises(ExperimentError, match="leave the experiment's own at FedAvg"):
        shoal.flower.simulate(experiment(2, shoal.Scaffold()), flower.FedAvg())
    with pytest.raises(ExperimentError, match=r"it is Shoal's; .* experiment\.simulate"):
        shoal.flower.simulate(experiment(2), shoal.FedAdam())  # type: ignore[arg-type]
    with pytest.raises(ExperimentError, match=r"FedAdam is a class; give an object: FedAdam\("):
        shoal.flower.simulate(experiment(2), flower.FedAdam)  # type: ignore[arg-type]
    with pytest.raises(ExperimentError, match=r"'fashion.toml' is no experiment; shoal.Experiment.from_file"):
        shoal.flower.simulate("fashion.toml", flower.FedAdam())  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["scaffold", shoal.Scaffold, flower.FedAvg()])
def test_what_is_no_strategy_of_shoals(given: Any) -> None:
    with pytest.raises(ExperimentError, match="is no strategy of Shoal's; give an object"):
        shoal.flower.strategy(given)


@pytest.mark.slow
def test_workers_give_the_same_bits(tmp_path: Path) -> None:
    found = []
    for workers in (0, 2):
        e = experiment(4, model=plain, dtype="float32")
        done = shoal.flower.simulate(e, flower.FedAdam(), workers=workers, out=tmp_path, progress="none")
        found.append(read_arrays(done.path))

    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])
