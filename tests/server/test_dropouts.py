"""A round in which a third of the clients is of no use, again and again: the others make it, and no one waits."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from shoal.protos.messages import Failure
from shoal.server.coordinator import Coordinator, Plan, start
from shoal.strategies.base import vector
from shoal.strategies.selectors import Uniform
from tests.server.test_remote import INITIAL, SIZE, STRATEGY, House, an_update

if TYPE_CHECKING:
    from tests.server.conftest import Join, Peer, Serve

WAIT = 30.0
ROUNDS, CLIENTS, USELESS = 10, 10, 3


@pytest.fixture
def house(serve: Serve) -> Iterator[House]:
    with ThreadPoolExecutor(1) as pool:
        yield House(serve(), pool)


def an_answer(number: int, client: int) -> np.ndarray:
    """The delta of a client in a round; one that the sum's order cannot change."""
    return np.full(SIZE, 2.0 ** -(client % 3) * number, "float32")


def mean(number: int, clients: Sequence[int]) -> np.ndarray:
    return np.asarray(np.mean([an_answer(number, client).astype(np.float64) for client in clients], axis=0))


@pytest.mark.slow
@pytest.mark.fault(24)
def test_a_third_that_fails_or_never_answers_costs_no_round(house: House, join: Join) -> None:
    """Seven of ten are needed, ten are asked; who fails and who is silent is drawn anew in each round."""
    peers = [join(house.serving, f"{client:02}") for client in range(CLIENTS)]
    plan = Plan(rounds=ROUNDS, cohort=CLIENTS - USELESS, over_select=CLIENTS / (CLIENTS - USELESS))
    coordinator = Coordinator(plan, STRATEGY, Uniform(), house.fleet, start(STRATEGY, Uniform(), INITIAL))
    draw, expected = random.Random(0), np.zeros(SIZE)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(coordinator.run)
        for number in range(1, ROUNDS + 1):
            useless = draw.sample(range(CLIENTS), USELESS)
            _play(peers, number, failing=useless[:1], silent=useless[1:])
            expected += mean(number, [client for client in range(CLIENTS) if client not in useless])
        point = running.result(WAIT)

    assert point.round == ROUNDS
    torch.testing.assert_close(vector(point.state, "parameters").double().numpy(), expected, rtol=1e-6, atol=0)


def _play(peers: Sequence[Peer], number: int, failing: Sequence[int], silent: Sequence[int]) -> None:
    offers = [peer.hear("offer").nonce for peer in peers]
    for client in failing:  # first: the last good answer ends the round
        peers[client].answer(offers[client], Failure(peers[client].client, number, "no"))
    for client, peer in enumerate(peers):
        if client not in failing and client not in silent:
            peer.answer(offers[client], an_update(delta=an_answer(number, client), examples=1))
    for client in silent:
        assert peers[client].hear("withdrawal").nonce == offers[client]
