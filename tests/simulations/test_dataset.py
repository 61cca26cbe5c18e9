"""Shards of a data set: noise that differs by client, and populations that are never held."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shoal.protos.errors import DataError, ExperimentError
from shoal.simulations import dataset
from shoal.simulations.datasets import from_arrays, load
from shoal.simulations.federated import LazyData
from shoal.simulations.label_skew import Distribution
from shoal.simulations.packing import pack
from shoal.simulations.partitioners import Iid, Resampled

X = np.zeros((4_000, 5), np.float32)
Y = np.arange(4_000) % 4


def test_noise_grows_from_client_to_client() -> None:
    """Variance σ·i/N for client i of N, on what it trains and what it tests on; the server's test set is clean."""
    data = from_arrays(X, Y, partition=Iid(4), client_test=0.2, client_noise=0.5, test=(X[:9], Y[:9])).split(3)

    for number, client in enumerate(data.clients, start=1):
        shard = data.shard(client)
        assert shard.x_test is not None
        for part in (shard.x, shard.x_test):
            assert float(part.var()) == pytest.approx(0.5 * number / 4, rel=0.15)
            assert float(part.mean()) == pytest.approx(0, abs=0.06)
    assert data.test is not None and not data.test.x.any()


def test_noise_is_the_seeds_and_leaves_shards_as_they_were() -> None:
    plain, noisy = (from_arrays(X, Y, partition=Iid(4), client_noise=noise) for noise in (0.0, 0.5))

    assert torch.equal(noisy.split(1).shard("2").x, noisy.split(1).shard("2").x)
    assert not torch.equal(noisy.split(1).shard("2").x, noisy.split(2).shard("2").x)
    assert torch.equal(noisy.split(1).shard("2").y, plain.split(1).shard("2").y)
    assert not plain.train.x.any() and not noisy.train.x.any()


def test_noise_must_be_possible() -> None:
    wrongs: list[Any] = [-1, True, "0.1", float("inf")]
    for wrong in wrongs:
        with pytest.raises(ExperimentError, match=r"'data\.client_noise' is .*; it must be a number, from 0 on"):
            from_arrays(X, Y, client_noise=wrong)
    with pytest.raises(DataError, match=r"'data\.client_noise' needs features of float32, not int64; drop it"):
        from_arrays(X, Y, dtype="int64", client_noise=1.0)


def population(**options: Any) -> LazyData:
    x = np.arange(4_000, dtype=np.float32)[:, None]
    data = from_arrays(x, Y, partition=Resampled(1_000_000, 30, alpha=0.5), **options).split(0)
    assert isinstance(data, LazyData)
    return data


def test_a_million_clients_are_made_when_they_are_asked() -> None:
    data = population(client_test=0.2)
    shard = data.shard("999999")

    assert len(data.clients) == 1_000_000 and data.shape == (1,) and data.classes == 4
    assert len(shard) == 24 and shard.held_out is not None and len(shard.held_out) == 6
    rows = torch.cat([shard.x, shard.held_out.x])[:, 0].long()
    assert len(rows.unique()) == 30
    assert torch.equal(rows % 4, torch.cat([shard.y, shard.held_out.y]))
    again = population(client_test=0.2).shard("999999")
    assert torch.equal(again.x, shard.x)


def test_a_population_may_be_noisy_too() -> None:
    shard, clean = population(client_noise=4.0).shard("999999"), population().shard("999999")

    assert torch.equal(shard.y, clean.y)
    assert float((shard.x - clean.x).var()) == pytest.approx(4, rel=0.6)


def test_workers_share_a_populations_rows() -> None:
    data = from_arrays(np.zeros((4_000, 50)), Y, partition=Resampled(1_000_000, 30)).split(0)
    packed, block = pack(data)

    assert any(tensor.shape == (4_000, 50) for tensor in block.tensors.values())
    assert len(packed) < 100_000


def test_a_file_can_say_all_of_it() -> None:
    shares = ([0.5] * 10, [0.5] * 10)
    lines: dict[str, object] = {"kind": "distribution", "shares": [*shares]}
    crowd: dict[str, object] = {"kind": "resampled", "clients": 10**6, "size": 50}
    first, second = (load("fashion-mnist-subset", partition=kind, client_noise=0.1) for kind in (lines, crowd))

    assert first.partitioner == Distribution(shares)
    same = {"name": "fashion-mnist-subset", "client_noise": 0.1}
    assert first.spec == same | {"partition": lines | {"shares": shares}}
    assert second.spec == same | {"partition": crowd}
    with pytest.raises(ExperimentError, match=r"'data.partition.shares' is .*less than or equal to 1"):
        load("fashion-mnist-subset", partition={"kind": "distribution", "shares": [[2.0]]})


def test_public_names_are_sorted() -> None:
    assert dataset.__all__ == sorted(dataset.__all__)
