"""Clients of a block one after the other: each draws from its own stream, on its own device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.simulations.singly import _drawing_from
from tests.client.test_participant import Generator


def test_a_client_of_a_block_draws_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices, own = (Generator(0), Generator(1)), Generator(1)
    monkeypatch.setattr(torch.cuda, "default_generators", devices)
    own.state = 5
    stream: Any = own
    with _drawing_from(stream):
        assert [one.state for one in devices] == [0, 5]
        devices[1].state += 1

    assert (own.state, [one.state for one in devices]) == (6, [0, 0])
