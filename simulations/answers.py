"""Answers of a worker whose large tensors lie in shared memory: a pipe would copy each of them four times.

The memory is the asking process's. It is lent with an order, and comes back when nothing there looks at the answer
any more; so it is written to again and again, because fresh memory costs more than a copy.
"""

from __future__ import annotations

import io
import pickle
import weakref
from typing import Any

import torch
from torch import Tensor

from shoal.simulations.crew import PicklerOfTensors
from shoal.simulations.shared import ALIGN, SharedBlock

__all__ = ["Answers", "pack"]

SHARE_FROM = 2**14  # bytes: a smaller tensor goes with the message
Answer = tuple[bytes, int]  # the message, and how much memory its tensors would have liked


class Answers:
    """The memory that the asking process lends."""

    def __init__(self) -> None:
        self._free: list[SharedBlock] = []
        self._all: list[SharedBlock] = []
        self._size = 0

    def lend(self) -> SharedBlock | None:
        """Memory for one answer; None before it is known how large answers are."""
        if not self._free and self._size:
            self._all.append(block := SharedBlock({"memory": (torch.uint8, (self._size,))}))
            return block
        return self._free.pop() if self._free else None

    def open(self, answer: Answer, block: SharedBlock | None) -> Any:
        """What a worker answered. Its tensors are views: their memory is lent again when they are gone."""
        message, wanted = answer
        self._size = max(self._size, wanted)
        if block is None:
            return pickle.loads(message)
        array = block.tensors["memory"].numpy()[:]
        weakref.finalize(array, self._back, block)
        return _Unpickler(message, torch.from_numpy(array)).load()

    def back(self, block: SharedBlock | None) -> None:
        """Take memory back in which there is no answer."""
        if block is not None:
            self._back(block)

    def _back(self, block: SharedBlock) -> None:
        if block.tensors["memory"].numel() >= self._size:
            self._free.append(block)

    def close(self) -> None:
        for block in self._all:
            block.close()
        self._all, self._free = [], []


def pack(answer: object, block: SharedBlock | None) -> Answer:
    """In a worker: the answer as a message, its large tensors in the memory that was lent, as far as they fit."""
    file = io.BytesIO()
    pickler = _Pickler(file, None if block is None else block.tensors["memory"])
    pickler.dump(answer)
    return file.getvalue(), pickler.wanted


class _Pickler(PicklerOfTensors):
    def __init__(self, file: io.BytesIO, memory: Tensor | None) -> None:
        super().__init__(file, protocol=5)
        self._memory, self.wanted = memory, 0

    def persistent_id(self, thing: object) -> Any:
        if type(thing) is not Tensor or thing.nbytes < SHARE_FROM:
            return None
        at, self.wanted = self.wanted, self.wanted + -(-thing.nbytes // ALIGN) * ALIGN
        if self._memory is None or at + thing.nbytes > self._memory.numel():
            return None
        _part(self._memory, at, thing.dtype, thing.shape).copy_(thing)
        return at, thing.dtype, thing.shape


class _Unpickler(pickle.Unpickler):
    def __init__(self, message: bytes, memory: Tensor) -> None:
        super().__init__(io.BytesIO(message))
        self._memory = memory

    def persistent_load(self, found: Any) -> Tensor:
        return _part(self._memory, *found)


def _part(memory: Tensor, at: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return memory[at : at + dtype.itemsize * shape.numel()].view(dtype).view(shape)
