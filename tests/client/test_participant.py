"""One participant's work, whatever device it is done on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoal.client.local import LocalTraining
from shoal.client.participant import Participant, failure
from shoal.strategies.fedavg import FedAvg


class Generator:
    """Of a device that is not here."""

    def __init__(self, index: int) -> None:
        self.device, self.state = SimpleNamespace(type="cuda", index=index), 0

    def manual_seed(self, seed: int) -> None:
        self.state = seed

    def get_state(self) -> int:
        return self.state

    def set_state(self, state: int) -> None:
        self.state = state


def test_the_seed_is_that_of_the_nets_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Generator(0), Generator(1)
    monkeypatch.setattr(torch.cuda, "default_generators", devices)
    net: Any = SimpleNamespace(flat=SimpleNamespace(is_cuda=True, device=devices[1].device))
    Participant(net, FedAvg(), LocalTraining(), 0)._seed_torch(7)

    assert [one.state for one in devices] == [0, 7]


def test_a_last_batch_of_one_example_under_batch_norm_is_told_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="more than 1 value") as error:
        torch.nn.BatchNorm1d(3)(torch.zeros(1, 3))

    assert "local.drop_last = true" in failure(error.value, "a", 1).reason
    assert "drop_last" not in failure(ValueError("no data"), "a", 1).reason
