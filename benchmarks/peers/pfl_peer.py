"""pfl-research: resident tensors, one model a process, evaluation off; two processes with torchrun.

pfl does not shuffle: a user's dataset yields the same slices again and again. Here each user's dataset is made with
its examples in the task's order, as pfl lets one, so that it does the same steps as everyone; that costs one gather a
user. In the first round pfl evaluates whatever one asks for; there is nothing to evaluate, so it only walks the data.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.nets import loaded, weights_of
from benchmarks.tasks import Task


class Trained(nn.Module):
    """The net as pfl asks for it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(self.net(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {}


class Laps(TrainingProcessCallback):
    def __init__(self, task: Task) -> None:
        self._task = task

    def on_train_begin(self, *, model: Any) -> Any:
        self._task.lap()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        self._task.lap()
        return False, Metrics()


def users(task: Task) -> Any:
    """Asked in the task's order; a user is a round and a position in its cohort."""
    x, y = torch.from_numpy(task.x), torch.from_numpy(task.y)
    asked = iter([(round, position) for round in range(task.rounds) for position in range(task.cohort)])

    def dataset(user: tuple[int, int]) -> Any:
        round, position = user
        first = task.rows(task.cohorts[round][position]).start
        rows = torch.from_numpy(task.orders[round][position]) + first
        return PyTorchTensorDataset((x[rows], y[rows]), user_id=str(user))

    return FederatedDataset(dataset, lambda: next(asked))


def main(task: Task, out: Path) -> None:
    torch.set_num_threads(1)
    module = Trained(loaded(task.net, task.initial))
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    model = PyTorchModel(module, local_optimizer_create=torch.optim.SGD, central_optimizer=optimizer)
    rounds: Any = {"central_num_iterations": task.rounds, "evaluation_frequency": task.rounds + 1}
    local: Any = {"local_num_epochs": 1, "local_learning_rate": task.lr, "local_batch_size": task.batch}
    data = users(task)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(train_cohort_size=task.cohort, val_cohort_size=0, **rounds),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(**local),
        callbacks=[Laps(task)],
        send_metrics_to_platform=False,
    )
    if os.environ.get("RANK", "0") == "0":
        task.finish(out, weights_of(module))


if __name__ == "__main__":
    main(Task(Path(sys.argv[1])), Path(sys.argv[2]))
