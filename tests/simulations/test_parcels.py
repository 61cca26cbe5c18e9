"""Parcels: what is pickled, with the memory of its tensors beside it."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from shoal.simulations.parcels import unwrap, wrap

LARGE = torch.arange(1_000_000, dtype=torch.float32)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(
    "tensor",
    [
        LARGE.reshape(1000, 1000),
        LARGE.reshape(1000, 1000).T,
        torch.tensor(7),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.ones(5, dtype=torch.bfloat16),
    ],
    ids=["matrix", "transposed", "scalar", "empty", "bool", "bfloat16"],
)
def test_tensors_come_through(tensor: torch.Tensor, copy: bool) -> None:
    found = unwrap(wrap({"x": tensor, "n": 3.0}), copy=copy)

    assert found["n"] == 3.0
    assert found["x"].dtype == tensor.dtype and found["x"].shape == tensor.shape
    assert torch.equal(found["x"], tensor)


def test_memory_is_neither_pickled_nor_copied() -> None:
    pickled, buffers = wrap([LARGE, LARGE[1000:]])
    whole, part = unwrap((pickled, buffers))

    assert len(pickled) < 1000
    assert [buffer.raw().nbytes for buffer in buffers] == [LARGE.nbytes, LARGE[1000:].nbytes]
    assert whole.data_ptr() == LARGE.data_ptr() and part.data_ptr() == LARGE[1000:].data_ptr()


def test_copies_are_ones_own() -> None:
    held = np.arange(4.0).tobytes()
    pickled, _ = wrap(torch.zeros(4, dtype=torch.float64))
    copied = unwrap((pickled, [pickle.PickleBuffer(held)]), copy=True)
    copied += 1

    assert copied.tolist() == [1, 2, 3, 4] and held == np.arange(4.0).tobytes()


def test_memory_that_is_read_only_is_taken_without_a_warning() -> None:
    pickled, _ = wrap(torch.zeros(4, dtype=torch.float64))

    assert unwrap((pickled, [pickle.PickleBuffer(np.arange(4.0).tobytes())])).tolist() == [0, 1, 2, 3]


def test_functions_that_cannot_be_imported_come_through() -> None:
    three = 3

    assert unwrap(wrap(lambda x: x + three))(4) == 7
