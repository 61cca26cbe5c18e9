"""What apps draw from the global generators of Python, NumPy and PyTorch: streams of their own, by seeds.

PyTorch is not imported for an app that does without it. When an app imports it, then, its generator is seeded as if it
had been there from the beginning.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["drawing_from", "generators_kept", "seed_all"]


class _Later(MetaPathFinder):
    """Seeds PyTorch's generator as soon as it is imported; with None it is left alone."""

    def __init__(self) -> None:
        self._seed: int | None = None

    @property
    def seed(self) -> int | None:
        return self._seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self._seed = seed
        if seed is not None and self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        elif seed is None and self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def seeded(module: Any) -> None:
                execute(module)
                if self._seed is not None:
                    module.default_generator.manual_seed(self._seed)

            loader.exec_module = seeded
        return spec


_later = _Later()


def seed_all(seed: int) -> None:
    """Seed all three; PyTorch's when it is there."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch = sys.modules.get("torch")
    if torch is None:
        _later.seed = seed
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Generators seeded for a while, and back as they were afterwards."""
    with generators_kept():
        seed_all(seed)
        yield


@contextmanager
def generators_kept() -> Iterator[None]:
    """Generators may be seeded and drawn from for a while; they are back as they were afterwards."""
    torch = sys.modules.get("torch")
    before = random.getstate(), np.random.get_state(), _later.seed if torch is None else torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        if torch is not None:
            torch.set_rng_state(before[2])
        else:
            _later.seed = before[2]
            if before[2] is not None and "torch" in sys.modules:  # it came in between
                sys.modules["torch"].default_generator.manual_seed(before[2])
