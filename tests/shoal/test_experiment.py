"""Experiments in Python, and runs read back."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import shoal
from shoal import Experiment, LocalTraining, Run
from shoal.protos.errors import ExperimentError, RunError
from shoal.run import summarise
from shoal.server.runs import RunFolder

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def data(**changes: Any) -> Any:
    clients = [str(i % 6) for i in range(60)]
    return shoal.datasets.from_arrays(X, Y, clients=clients, test=(X[:20], Y[:20]), **changes)


def experiment(**changes: Any) -> Experiment:
    fields: dict[str, Any] = {
        "model": "linear",
        "data": data(),
        "rounds": 3,
        "cohort": 4,
        "local": LocalTraining(lr=0.5, batch_size=5),
    }
    return Experiment(**(fields | changes))


def simulate(made: Experiment, out: Path) -> Run:
    return made.simulate(workers=0, out=out, progress="none")


def test_a_run_as_tables(tmp_path: Path) -> None:
    made = experiment(data=data(client_test=0.2), evaluation=shoal.Evaluation(clients_every=3))
    run = simulate(made, tmp_path)

    assert run.status == "finished" and "finished" in repr(run)
    assert run.metrics.index.tolist() == [0, 1, 2, 3]
    assert run.metrics["test_accuracy"].iloc[-1] > 0.7
    trained = run.clients[run.clients["kind"] == "train"]
    assert len(trained) == 12 and set(trained["examples"]) == {8}
    assert len(run.clients[run.clients["kind"] == "evaluate"]) == 6
    assert isinstance(run.failures, pd.DataFrame) and run.failures.empty
    assert [trace.name for trace in run.plot().data] == ["test_loss", "test_accuracy"]


def test_the_model_comes_back(tmp_path: Path) -> None:
    run = simulate(experiment(), tmp_path)
    model = run.load_into(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))

    accuracy = float((model(X[:20]).argmax(1) == Y[:20]).float().mean())
    assert accuracy == pytest.approx(run.metrics["test_accuracy"].iloc[-1])
    with pytest.raises(RunError, match=r"does not fit the module: tensor '1.weight' is"):
        run.load_into(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))


@pytest.mark.parametrize(
    "model",
    [
        "mlp",
        {"name": "mlp", "hidden": (3,)},
        lambda shape, classes: nn.Linear(shape[0], classes),
        lambda: nn.Linear(4, 2),
        nn.Linear(4, 2),
    ],
)
def test_ways_to_name_a_model(tmp_path: Path, model: Any) -> None:
    assert simulate(experiment(model=model), tmp_path).status == "finished"


def test_a_module_is_taken_as_it_is_and_left_as_it_was(tmp_path: Path) -> None:
    module = nn.Linear(4, 2)
    before = module.weight.detach().clone()
    run = simulate(experiment(model=module, rounds=1, local=LocalTraining(lr=1e-30)), tmp_path)

    torch.testing.assert_close(run.parameters.named()["weight"], before)
    assert torch.equal(module.weight, before)


def test_regression_needs_the_number_of_outputs(tmp_path: Path) -> None:
    targets = X[:, :1] * 2
    clients = [str(i % 6) for i in range(60)]
    made = experiment(
        data=shoal.datasets.from_arrays(X, targets, clients=clients, test=(X, targets)),
        local=LocalTraining(lr=0.1, loss="mse", metrics=("mae",)),
        target={"mae": 1e-9, "loss": 100.0},
    )
    with pytest.raises(ExperimentError, match=r"set 'model\.classes'"):
        simulate(made, tmp_path)
    run = simulate(replace(made, model={"name": "linear", "classes": 1}), tmp_path)

    assert run.metrics["test_mae"].iloc[-1] < run.metrics["test_mae"].iloc[0]
    assert run.summary["target"]["mae"]["round"] is None
    assert run.summary["target"]["loss"]["round"] == 1
    assert run.summary["best"]["test_mae"]["value"] == run.metrics["test_mae"].min()


def test_frozen_tensors_stay_and_are_kept(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        model[0].requires_grad_(False)
        return model

    run = simulate(experiment(model=make), tmp_path)
    first = simulate(experiment(model=make, rounds=1), tmp_path)

    assert torch.equal(run.parameters.named()["0.weight"], first.parameters.named()["0.weight"])
    assert run.metrics.loc[1, "bytes_up"] == 4 * (8 * 2 + 2) * 4


def test_the_summary_totals_and_targets(tmp_path: Path) -> None:
    run = simulate(experiment(rounds=12, target={"accuracy": 0.6}), tmp_path)
    reached = run.summary["target"]["accuracy"]
    rows = run.metrics.loc[1:]

    assert run.metrics.loc[reached["round"], "test_accuracy"] >= 0.6
    assert reached["bytes_up"] == rows.loc[: reached["round"], "bytes_up"].sum()
    assert run.summary["bytes_up"] == rows["bytes_up"].sum()
    assert "test_loss" not in simulate(experiment(rounds=9), tmp_path).summary["mean_of_last_10"]
    assert run.summary["mean_of_last_10"]["test_loss"] == pytest.approx(run.metrics["test_loss"].iloc[-10:].mean())


def test_a_number_of_a_clients_beyond_all_bounds_leaves_the_run_a_summary(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "x")
    folder.write("metrics.jsonl", "".join(f'{{"round": {n}, "clients_loss": 1.5e308}}\n' for n in range(1, 11)))

    assert summarise(folder, {})["mean_of_last_10"] == {"clients_loss": math.inf}


def test_the_learning_rate_decays(tmp_path: Path) -> None:
    run = simulate(experiment(local=LocalTraining(lr=0.5, lr_decay=0.1, batch_size=5)), tmp_path)

    assert run.clients.groupby("round")["lr_sum"].first().tolist() == pytest.approx([1.0, 0.1, 0.01])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "key 'rounds' is 0"),
        ({"strategy": "fedavg"}, r"strategy is a str; give an object, for example shoal\.FedAvg\(\)"),
        ({"cohort": 7}, "only 6 clients"),
        ({"strategy": shoal.FedProx(mu=-1.0)}, "'strategy.mu' is -1.0"),
        ({"local": LocalTraining(loss="croos-entropy")}, "did you mean 'cross-entropy'"),
        ({"local": LocalTraining(clip=1.0), "strategy": shoal.Scaffold()}, "plain SGD"),
        ({"dtype": "float16"}, "key 'dtype' is 'float16'"),
        ({"model": "mpl"}, "did you mean 'mlp'"),
    ],
)
def test_bad_experiments(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        simulate(experiment(**changes), tmp_path)


def test_a_clients_gradient_clipping_and_adam(tmp_path: Path) -> None:
    for local in (LocalTraining("adam", lr=0.2, clip=1.0), LocalTraining("adamw", lr=0.2, weight_decay=0.1)):
        assert simulate(experiment(local=local, rounds=5), tmp_path).metrics["test_accuracy"].iloc[-1] > 0.7


def test_a_resume_after_the_last_checkpoint_was_lost(tmp_path: Path) -> None:
    """A run that was killed (no checkpoint yet) starts over in its folder; its lines are not doubled."""
    import shutil

    run = simulate(experiment(rounds=2), tmp_path)
    shutil.rmtree(run.path / "checkpoints")
    again = shoal.resume(run.path, experiment=experiment(rounds=2), progress="none")

    assert again.metrics.index.tolist() == [0, 1, 2]
    assert torch.equal(again.parameters.trainable, simulate(experiment(rounds=2), tmp_path).parameters.trainable)


def test_a_resume_with_another_model_is_refused(tmp_path: Path) -> None:
    run = simulate(experiment(rounds=1), tmp_path)
    with pytest.raises(RunError, match=r"'model' differs from the run's own"):
        shoal.resume(run.path, rounds=2, experiment=experiment(model="mlp"))
    with pytest.raises(RunError, match=r"'seed' differs"):
        shoal.resume(run.path, rounds=2, experiment=experiment(seed=1))
    with pytest.raises(RunError, match=r"'strategy' differs"):
        shoal.resume(run.path, rounds=2, experiment=experiment(strategy=shoal.Scaffold()))


def test_a_resume_with_another_model_without_a_name_is_refused(tmp_path: Path) -> None:
    def make(width: int, frozen: float = 1.0) -> Any:
        def model() -> nn.Module:
            module = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))
            nn.init.constant_(module[0].requires_grad_(False).weight, frozen)  # type: ignore[arg-type]
            return module

        return model

    run = simulate(experiment(model=make(3), rounds=1), tmp_path)
    with pytest.raises(RunError, match=r"another model \(tensor '0\.weight' is"):
        shoal.resume(run.path, rounds=2, experiment=experiment(model=make(5)))
    with pytest.raises(RunError, match=r"frozen tensor '0\.weight' has other values"):
        shoal.resume(run.path, rounds=2, experiment=experiment(model=make(3, frozen=2.0)))


def test_data_shows_itself_in_a_line() -> None:
    assert repr(data()) == (
        "<Dataset <Table 60 rows, x float32[4], y int64, 6 clients> + 20 to test on, split by its own clients>"
    )
