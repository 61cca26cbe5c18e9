"""Worker processes that are lost, and those that take their place."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch
from torch import nn

from shoal import FedAvg, LocalTraining
from shoal.client.data import Shard
from shoal.simulations.crew import Crew, Died
from shoal.simulations.engine import Assignment, Job
from shoal.simulations.federated import LazyData
from shoal.simulations.packing import pack
from shoal.simulations.pool import Order
from shoal.simulations.shared import SharedBlock
from shoal.strategies.base import Context


def no_data(client: str) -> Shard:
    raise AssertionError(client)


@pytest.mark.slow
def test_an_order_dropped_while_its_worker_gets_ready_costs_that_order_alone() -> None:
    assignment = Assignment(lambda: nn.Linear(4, 3), LazyData(["a"], no_data, shape=(4,)), FedAvg(), LocalTraining())
    nothing = {"/buffers": torch.zeros(0), "/counters": torch.zeros(0, dtype=torch.int64)}
    packed, data = pack(assignment)
    with closing(data), closing(SharedBlock.of({"parameters": torch.zeros(15), **nothing})) as block:
        order: Any = Order(Job(0, [], Context(1, 1, 1)), block, {})
        with closing(Crew("shoal.simulations.worker", packed, 1)) as crew:
            crew.ready()
            crew._workers[0].process.kill()
            assert crew.submit(order).result() == Died("killed by signal 9")
            dropped = crew.submit(order)
            while (
                crew._workers[0]._does != "prepare"
            ):  # until the one that takes its place has the order, while it is starting
                pass
            crew.kill([dropped])

            assert isinstance(dropped.result(), Died)
            assert not isinstance(crew.submit(order).result(), Died)
