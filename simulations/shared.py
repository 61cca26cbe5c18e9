"""Memory that worker processes share: a file, so that it works the same under every start method.

The file lies in memory where there is room (``/dev/shm``), else in the temporary folder; it is removed with the
block, and what a killed run left behind is swept away by the next one.
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.protos.errors import RunError

if TYPE_CHECKING:  # whoever has no tensors shall not wait for PyTorch
    import torch
    from torch import Tensor

    Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]

__all__ = ["SharedBlock", "SharedBytes", "SharedMemory", "alive"]

ALIGN = 64  # bytes: a cache line, so that no vector load of a tensor straddles another one
PREFIX = "shoal-"
# Who attaches to memory maps all of it at once, where the system can: page by page costs more than writing to it.
AT_ONCE = {"flags": mmap.MAP_SHARED | mmap.MAP_POPULATE} if hasattr(mmap, "MAP_POPULATE") else {}


class SharedBlock:
    """Named tensors over one mapping. Unpickling it in another process attaches to the same memory."""

    def __init__(self, specs: Specs, path: Path | None = None) -> None:
        sizes = [-(-_bytes(dtype, shape) // ALIGN) * ALIGN for dtype, shape in specs.values()]
        # Mapping a file that is gone would make a new one, full of zeros.
        if path is not None and path.stat().st_size < sum(sizes):
            raise RunError(f"the shared memory {path} is damaged; start the run again")
        self.specs, self.path = specs, path or _new_file(max(1, sum(sizes)))
        self.tensors: dict[str, Tensor] = {}
        if specs:
            self._map(sizes)
        if path is None:
            self._remove = weakref.finalize(self, _unlink, self.path)

    def _map(self, sizes: Sequence[int]) -> None:
        import torch

        memory = torch.from_file(str(self.path), shared=True, size=max(1, sum(sizes)), dtype=torch.uint8)
        for (name, (dtype, shape)), part in zip(
            self.specs.items(), torch.split(memory[: sum(sizes)], list(sizes)), strict=True
        ):
            self.tensors[name] = part[: _bytes(dtype, shape)].view(dtype).view(shape)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> SharedBlock:
        """A block that holds copies of these tensors."""
        block = cls({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})
        block.fill(tensors)
        return block

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these tensors have the block's names, dtypes and shapes."""
        return self.specs == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy new values in; the tensors must fit."""
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    def close(self) -> None:
        """Remove the file now; mappings stay valid until their processes drop them."""
        self._remove()

    def __reduce__(self) -> tuple[type[SharedBlock], tuple[Specs, Path]]:
        return SharedBlock, (self.specs, self.path)


class SharedMemory:
    """Bytes over one mapping, for whoever can do without PyTorch. Unpickling it elsewhere attaches to the same memory.

    A process attaches to it once. OSError if there is not so much memory: who writes to a file without room is killed.
    """

    def __init__(self, size: int, path: Path | None = None) -> None:
        self.size, self.path = size, path or _new_file(size)
        if path is None:
            self._remove = weakref.finalize(self, _unlink, self.path)
        with self.path.open("r+b") as file:
            if path is None and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            self._map = mmap.mmap(file.fileno(), size, **(AT_ONCE if path else {}))

    def array(self) -> np.ndarray:
        """``[size]`` bytes; each time another array, which lives as long as any view of it."""
        return np.frombuffer(self._map, np.uint8)

    def close(self) -> None:
        """Remove the file now; mappings stay valid until their processes drop them."""
        self._remove()

    def __reduce__(self) -> tuple[Any, tuple[int, Path]]:
        return _attached, (self.size, self.path)


_attachments: dict[Path, SharedMemory] = {}


def _attached(size: int, path: Path) -> SharedMemory:
    if path not in _attachments:
        for gone in [known for known in _attachments if not known.exists()]:
            del _attachments[gone]
        _attachments[path] = SharedMemory(size, path)
    return _attachments[path]


class SharedBytes:
    """Bytes, read and not mapped, because whoever opens them wants ``bytes`` of its own."""

    def __init__(self, parts: Sequence[bytes]) -> None:
        self._sizes = [len(part) for part in parts]
        self.path = _new_file(sum(self._sizes))
        self._remove = weakref.finalize(self, _unlink, self.path)
        with self.path.open("r+b") as file:
            file.writelines(parts)

    def read(self) -> list[bytes]:
        """Also in another process, as long as it is there in this one."""
        with self.path.open("rb") as file:  # buffered: a raw read gives 2 GiB at most
            return [file.read(size) for size in self._sizes]

    def __getstate__(self) -> dict[str, Any]:
        return {"_sizes": self._sizes, "path": self.path}


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def _new_file(size: int) -> Path:
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 * size
    folder = memory if roomy else Path(tempfile.gettempdir())
    _sweep(folder)
    handle, name = tempfile.mkstemp(prefix=f"{PREFIX}{os.getpid()}-", dir=folder)
    os.truncate(handle, size)
    os.close(handle)
    return Path(name)


@cache  # once a process: rounds make many files
def _sweep(folder: Path) -> None:
    """Remove files of processes that are gone."""
    for path in folder.glob(f"{PREFIX}*"):
        owner = path.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not alive(int(owner)):
            _unlink(path)


def alive(process: int) -> bool:
    """Whether there may be a process of this number."""
    if os.name != "posix":
        return True  # cannot be asked without a further library: leave the file to the system
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # another user's, or still mapped where the system forbids removal
