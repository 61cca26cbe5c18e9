"""What a worker must know as bytes: functions of a notebook or a script by value, large tensors in shared memory."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import cloudpickle

from shoal.simulations.shared import SharedBlock

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["by_value", "pack", "unpack"]

SHARE_FROM = 65536  # bytes: below, a copy is cheaper than a mapping


class _ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """By value, functions of a notebook included; large tensors are set aside to be shared, not copied."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, protocol=5)
        self.shared: dict[str, Tensor] = {}
        # Where nobody has imported PyTorch, or another thread is at it, there are no tensors.
        self._tensor = getattr(sys.modules.get("torch"), "Tensor", None)

    def persistent_id(self, thing: Any) -> str | None:
        if type(thing) is not self._tensor or thing.nbytes < SHARE_FROM or thing.device.type != "cpu":
            return None
        self.shared[f"{id(thing)}"] = thing
        return f"{id(thing)}"


class _SharingUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], block: SharedBlock) -> None:
        super().__init__(file)
        self._block = block

    def persistent_load(self, name: str) -> Tensor:
        return self._block.tensors[name]


def pack(assignment: object) -> tuple[bytes, SharedBlock]:
    """The assignment as bytes, and the block that holds its large tensors and must outlive all workers."""
    buffer = io.BytesIO()
    pickler = _ByValuePickler(buffer)
    with by_value():
        pickler.dump(assignment)
    block = SharedBlock.of(pickler.shared)
    return pickle.dumps(block) + buffer.getvalue(), block


def unpack(file: IO[bytes]) -> Any:
    """The inverse of :func:`pack`, in a worker."""
    block = pickle.load(file)
    return _SharingUnpickler(file, block).load()


@contextmanager
def by_value() -> Iterator[None]:
    """Modules that another process could not import (a file given as ``my.py:Name``) travel with what they define."""
    tops = {name.partition(".")[0] for name in sys.modules}
    alone = [sys.modules[top] for top in tops if top in sys.modules and not _importable(top)]
    for module in alone:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in alone:
            cloudpickle.unregister_pickle_by_value(module)


def _importable(top: str) -> bool:
    if top in sys.builtin_module_names or top in sys.stdlib_module_names:
        return True
    finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
    return top == "__main__" or any(find is not None and find(top, None) is not None for find in finders)
