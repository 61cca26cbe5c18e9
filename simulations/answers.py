"""Answers of a worker whose large arrays lie in shared memory: a pipe would copy each of them four times.

The memory is the asking process's. It is lent with an order, and comes back when nothing there looks at the answer
any more; so it is written to again and again, because fresh memory costs more than a copy.
"""

from __future__ import annotations

import io
import pickle
import weakref
from typing import Any, NamedTuple

import numpy as np

from shoal.simulations.crew import PicklerOfTensors
from shoal.simulations.shared import ALIGN, SharedMemory

__all__ = ["Answer", "Answers", "pack"]

SHARE_FROM = 2**14  # bytes: smaller arrays go with the message
MOST = 128  # answers that lie in memory at a time, for each takes an open file


class Answer(NamedTuple):
    """A message, where in the memory that was lent its large arrays lie, and how much they would all have liked."""

    message: bytes
    places: list[tuple[int, int]]
    wanted: int


class Answers:
    """The memory that the asking process lends; one thread at a time may ask for it."""

    def __init__(self) -> None:
        self._free: list[SharedMemory] = []
        self._all: set[SharedMemory] = set()
        self._size = 0

    def lend(self) -> SharedMemory | None:
        """Memory for one answer; None before it is known how large answers are, and where there is no more."""
        if self._free:
            return self._free.pop()
        if not self._size or len(self._all) >= MOST:
            return None
        try:
            memory = SharedMemory(self._size)
        except OSError:  # the answer goes with the message
            return None
        self._all.add(memory)
        return memory

    def open(self, answer: Answer, memory: SharedMemory | None) -> Any:
        """What a worker answered. Its large arrays are views: their memory is lent again when they are gone."""
        message, places, wanted = answer
        self._size = max(self._size, wanted)
        if memory is None:
            return pickle.loads(message)
        array = memory.array()
        weakref.finalize(array, self.back, memory)
        return pickle.loads(message, buffers=[array[at : at + size] for at, size in places])

    def back(self, memory: SharedMemory | None) -> None:
        """Take memory back in which there is no answer."""
        if memory is None:
            return
        if memory.size >= self._size:
            self._free.append(memory)
        else:  # answers have grown
            memory.close()
            self._all.discard(memory)

    def close(self) -> None:
        for memory in self._all:
            memory.close()
        self._all, self._free = set(), []


def pack(answer: object, memory: SharedMemory | None) -> Answer:
    """In a worker: the answer as a message, its large arrays in the memory that was lent, as far as they fit."""
    file, places, wanted = io.BytesIO(), list[tuple[int, int]](), 0

    def stays(buffer: pickle.PickleBuffer) -> bool:
        """Whether it goes with the message."""
        nonlocal wanted
        data = np.frombuffer(buffer.raw(), np.uint8)
        if data.size < SHARE_FROM:
            return True
        at, wanted = wanted, wanted + -(-data.size // ALIGN) * ALIGN
        if memory is None or at + data.size > memory.size:
            return True
        memory.array()[at : at + data.size] = data
        places.append((at, data.size))
        return False

    PicklerOfTensors(file, 5, stays).dump(answer)
    return Answer(file.getvalue(), places, wanted)
