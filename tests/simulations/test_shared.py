"""Shared memory."""

from __future__ import annotations

import gc
import io
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

from shoal.simulations import shared
from shoal.simulations.shared import SharedBlock

TENSORS = {
    "x": torch.arange(10, dtype=torch.float32).reshape(2, 5),
    "n": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "b": torch.tensor([True, False]),
}


def test_values_shapes_and_alignment() -> None:
    block = SharedBlock.of(TENSORS)

    assert block.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(block.tensors[name], tensor)
        assert block.tensors[name].data_ptr() % shared.ALIGN == 0 or not tensor.numel()


def test_another_process_sees_what_is_filled_in_later() -> None:
    block = SharedBlock.of(TENSORS)
    code = """
        import pickle, sys
        block = pickle.load(sys.stdin.buffer)
        print("ready", flush=True)
        sys.stdin.buffer.readline()
        print(block.tensors["x"].sum().item())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(pickle.dumps(block))
    process.stdin.flush()
    assert process.stdout.readline() == b"ready\n"
    block.fill(TENSORS | {"x": torch.full((2, 5), 3.0)})
    out, _ = process.communicate(b"\n")

    assert float(out) == 30.0


def test_fits() -> None:
    block = SharedBlock.of(TENSORS)

    assert block.fits(TENSORS)
    assert not block.fits(TENSORS | {"x": torch.zeros(5, 2)})
    assert not block.fits(TENSORS | {"x": TENSORS["x"].double()})
    assert not block.fits({"x": TENSORS["x"]})


def test_the_file_goes_with_the_block() -> None:
    block = SharedBlock.of(TENSORS)
    attached = pickle.load(io.BytesIO(pickle.dumps(block)))
    path = block.path
    assert path.exists()
    del attached
    gc.collect()
    assert path.exists()
    del block
    gc.collect()

    assert not path.exists()


def test_what_a_killed_process_left_is_swept_away() -> None:
    folder = SharedBlock.of(TENSORS).path.parent
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = folder / f"{shared.PREFIX}{process.pid}-left"
    mine = folder / f"{shared.PREFIX}{os.getpid()}-mine"
    left.touch()
    mine.touch()
    shared._sweep.cache_clear()  # as in a new process
    SharedBlock.of(TENSORS)

    assert (left.exists(), mine.exists()) == (False, True)
    mine.unlink()


def test_memory_that_is_gone_is_an_error_and_not_zeros() -> None:
    block = SharedBlock.of(TENSORS)
    pickled = pickle.dumps(block)
    block.close()
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickled)
    assert not block.path.exists()
