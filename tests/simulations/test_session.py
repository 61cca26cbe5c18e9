"""What is said where there is no Ray, no cluster, or one that cannot do what is asked."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from shoal import FedAvg, LocalTraining
from shoal.protos.errors import ExperimentError, RunError
from shoal.simulations.cluster import Cluster
from shoal.simulations.engine import Assignment
from shoal.simulations.federated import ArrayData
from shoal.simulations.parcels import unwrap, wrap
from shoal.simulations.player import EnginePlayer, versions


def model() -> nn.Module:
    return nn.Linear(4, 3)


ASSIGNMENT = Assignment(
    model, ArrayData(torch.zeros(2, 4), torch.zeros(2), {"0": (0, 2, 2)}), FedAvg(), LocalTraining(lr=0.1)
)


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(ExperimentError, match=r"needs Ray, which is not installed; pip install 'shoal\[ray\]'"):
        Cluster(ASSIGNMENT)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "ray://127.0.0.1:10001"])
def test_an_address_without_a_cluster(address: str) -> None:
    with pytest.raises(RunError, match=f"cannot use a Ray cluster at '{address}' .*start one with 'ray start --head'"):
        Cluster(ASSIGNMENT, address=address)


def test_what_a_cluster_cannot_do() -> None:
    with pytest.raises(ExperimentError, match="workers is 0; on a Ray cluster it must be 1 or more"):
        Cluster(ASSIGNMENT, 0)
    with pytest.raises(ExperimentError, match="device is 'cuda', but the engine 'ray' has CPUs only"):
        Cluster(replace(ASSIGNMENT, device="cuda"))


def test_a_node_with_another_torch() -> None:
    answer = EnginePlayer().load(wrap(ASSIGNMENT), versions(EnginePlayer.packages) | {"torch": "1.0"})

    assert isinstance(error := unwrap(answer), RunError)
    assert re.search(r"a node of the Ray cluster has torch 2.*, this process has 1\.0; install the same", str(error))
