"""BlazeFL's own FedAvg: in series, in a pool of threads, or in a pool of processes (a new pool each round, its way).

BlazeFL takes a DataLoader from its user. This one fetches a batch with one indexing operation, in the task's order,
which is the least that a DataLoader can cost; the shards lie in memory that forked processes share.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # PyTorch's optimizers load it, in two seconds: here once, not in each new process
from blazefl.contrib import (
    FedAvgBaseClientTrainer,
    FedAvgBaseServerHandler,
    FedAvgProcessPoolClientTrainer,
    FedAvgThreadPoolClientTrainer,
)
from blazefl.core import IPCMode
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.nets import loaded, weights_of
from benchmarks.tasks import Task


@lru_cache(maxsize=1)
def resident(folder: str) -> tuple[Task, Tensor, Tensor, nn.Module]:
    """Read once; forked processes find it here."""
    task = Task(Path(folder))
    return task, torch.from_numpy(task.x), torch.from_numpy(task.y), loaded(task.net, task.initial)


@lru_cache(maxsize=1)
def orders(folder: str, round: int) -> dict[int, list[int]]:
    return {client: order.tolist() for client, order in resident(folder)[0].asked(round)}


class Shard(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.x[rows], self.y[rows]


class Shards:
    """BlazeFL's PartitionedDataset; ``round`` says whose orders are in force."""

    def __init__(self, folder: str) -> None:
        self.folder, self.round = folder, 0

    def get_dataloader(self, type_: Any, cid: int | None, batch_size: int | None, generator: Any = None) -> Any:
        task, x, y, _ = resident(self.folder)
        assert cid is not None
        rows, order = task.rows(cid), orders(self.folder, self.round)[cid]
        return DataLoader(Shard(x[rows], y[rows]), batch_size, sampler=order, collate_fn=lambda batch: batch)

    def get_dataset(self, type_: Any, cid: int | None) -> Any:
        raise NotImplementedError("nothing here asks for it")

    def set_dataset(self, type_: Any, cid: int | None, dataset: Any) -> None:
        return  # a client's examples do not change


class Selector:
    """BlazeFL's ModelSelector."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def select_model(self, model_name: str) -> nn.Module:
        return copy.deepcopy(resident(self.folder)[3])


class Handler(FedAvgBaseServerHandler):
    """Asks whom the task asks."""

    task: Task

    def sample_clients(self) -> list[int]:
        self.task.lap()
        self.dataset.round = self.round + 1
        return [int(client) for client in self.task.cohorts[self.round]]


def trainer(mode: str, workers: int, given: dict[str, Any], folder: Path) -> Any:
    if mode == "serial":
        return FedAvgBaseClientTrainer(**given)
    if mode == "threads":
        return FedAvgThreadPoolClientTrainer(**given, num_parallels=workers)
    folders = {"share_dir": folder / "share", "state_dir": folder / "state"}
    return FedAvgProcessPoolClientTrainer(**given, **folders, num_parallels=workers, ipc_mode=IPCMode.SHARED_MEMORY)


def main(task: Task, out: Path, mode: str, workers: int) -> None:
    torch.set_num_threads(1)
    folder = str(task.folder)
    common: Any = {"model_selector": Selector(folder), "model_name": task.net, "dataset": Shards(folder)}
    common |= {"num_clients": task.registered, "device": "cpu", "batch_size": task.batch, "seed": 0}
    share = (task.cohort + 0.5) / task.registered  # BlazeFL rounds down
    handler = Handler(**common, global_round=task.rounds, sample_ratio=share)
    handler.task = task
    with tempfile.TemporaryDirectory() as scratch:
        clients = trainer(mode, workers, {**common, "epochs": 1, "lr": task.lr}, Path(scratch))
        while not handler.if_stop():
            asked = handler.sample_clients()
            clients.local_process(handler.downlink_package(), asked)
            for package in clients.uplink_package():
                handler.load(package)
        task.lap()
    task.finish(out, weights_of(handler.model))


if __name__ == "__main__":
    main(Task(Path(sys.argv[3])), Path(sys.argv[4]), sys.argv[1], int(sys.argv[2]))
