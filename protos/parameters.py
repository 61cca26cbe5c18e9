"""The named tensors of a model, as flat vectors.

A model crosses as up to five *segments*. Averaging, clipping, noise and robust rules are single operations on one
vector ``[P]`` (or ``[K, P]`` for K clients), while names and shapes stay visible in the :class:`Layout`:

=========  ================================================================================================
trainable  one float vector; the only segment that drift, server optimizers, clipping and noise act on
buffers    floating statistics (BatchNorm's mean and variance): their example-weighted mean, nothing else,
           because an optimizer step over a variance can make it negative
counters   integers (``num_batches_tracked``): their maximum
local      stays with the client; never crosses
frozen     equal everywhere; only its hash crosses
=========  ================================================================================================

The array type is a parameter (``Parameters[np.ndarray]``, ``Parameters[torch.Tensor]``), so this module needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, Generic, TypeVar

from shoal.protos.errors import InvalidUpdate

__all__ = ["Entry", "Layout", "Parameters", "Segment", "frozen_hash"]

A = TypeVar("A")
B = TypeVar("B")


class Segment(StrEnum):
    """Where a tensor belongs; see the module's table."""

    TRAINABLE = "trainable"
    BUFFERS = "buffers"
    COUNTERS = "counters"
    LOCAL = "local"
    FROZEN = "frozen"


@dataclass(frozen=True)
class Entry:
    """One named tensor: ``dtype`` as numpy spells it (``"float32"``), ``shape`` in elements."""

    name: str
    segment: Segment
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """The ordered entries of a model. Two models fit together exactly if their layouts are equal."""

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        counts = Counter(entry.name for entry in self.entries)
        for twice in (name for name, count in counts.items() if count > 1):
            raise InvalidUpdate(f"the layout names tensor {twice!r} twice; tensor names must be unique")

    @cached_property
    def dtype(self) -> str:
        """The one dtype of the trainable vector and the buffers: ``"float32"`` or ``"float64"``."""
        kinds = {e.dtype for e in self.entries if e.segment in (Segment.TRAINABLE, Segment.BUFFERS)}
        if len(kinds) > 1:
            raise InvalidUpdate(f"trainable tensors and buffers mix {sorted(kinds)}; convert the model to one dtype")
        return kinds.pop() if kinds else "float32"

    @cached_property
    def _of(self) -> dict[Segment, tuple[Entry, ...]]:
        return {s: tuple(e for e in self.entries if e.segment is s) for s in Segment}

    def of(self, segment: Segment) -> tuple[Entry, ...]:
        return self._of[segment]

    @cached_property
    def _sizes(self) -> dict[Segment, int]:
        return {s: sum(e.size for e in self.of(s)) for s in Segment}

    def size(self, segment: Segment) -> int:
        """The number of elements in a segment."""
        return self._sizes[segment]

    @cached_property
    def hash(self) -> str:
        """SHA-256 over names, segments, dtypes and shapes: equal exactly for equal layouts."""
        rows = [[e.name, e.segment, e.dtype, list(e.shape)] for e in self.entries]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    def difference(self, other: Layout) -> str | None:
        """The first thing in which ``other`` differs, in words; None if the layouts are equal."""
        if self == other:
            return None
        mine, theirs = ({e.name: e for e in layout.entries} for layout in (self, other))
        for name, entry in mine.items():
            if name not in theirs:
                return f"tensor {name!r} is missing"
            if theirs[name] != entry:
                there = theirs[name]
                return (
                    f"tensor {name!r} is {there.segment} {there.dtype}{list(there.shape)}, "
                    f"expected {entry.segment} {entry.dtype}{list(entry.shape)}"
                )
        extra = next((name for name in theirs if name not in mine), None)
        return "the tensors stand in another order" if extra is None else f"tensor {extra!r} is not expected"

    def locate(self, segment: Segment, index: int) -> str:
        """The name of the tensor that holds element ``index`` of a segment's vector."""
        for entry in self.of(segment):
            if index < entry.size:
                return entry.name
            index -= entry.size
        raise IndexError(index)


@dataclass(frozen=True)
class Parameters(Generic[A]):
    """A model's values: one flat vector a segment, in the layout's order.

    ``trainable`` ``[P]``, ``buffers`` ``[B]`` and ``counters`` ``[C]`` may be empty, never absent. ``local`` and
    ``frozen`` are kept by name: the first never leaves its client, of the second only :func:`frozen_hash` crosses.
    """

    layout: Layout
    trainable: A
    buffers: A
    counters: A
    local: Mapping[str, A] = field(default_factory=dict)
    frozen: Mapping[str, A] = field(default_factory=dict)

    def map(self, convert: Callable[[A], B]) -> Parameters[B]:
        """The same parameters in another array type, for example ``torch.from_numpy``."""
        return Parameters(
            self.layout,
            convert(self.trainable),
            convert(self.buffers),
            convert(self.counters),
            {name: convert(value) for name, value in self.local.items()},
            {name: convert(value) for name, value in self.frozen.items()},
        )

    def named(self) -> dict[str, A]:
        """Every tensor by name in its own shape, in the layout's order: a PyTorch ``state_dict``."""
        vectors: dict[Segment, Any] = {
            Segment.TRAINABLE: self.trainable,
            Segment.BUFFERS: self.buffers,
            Segment.COUNTERS: self.counters,
        }
        kept: dict[Segment, Mapping[str, Any]] = {Segment.LOCAL: self.local, Segment.FROZEN: self.frozen}
        start = dict.fromkeys(vectors, 0)
        named: dict[str, A] = {}
        for entry in self.layout.entries:
            if entry.segment in kept:
                named[entry.name] = kept[entry.segment][entry.name]
                continue
            begin = start[entry.segment]
            start[entry.segment] = begin + entry.size
            named[entry.name] = vectors[entry.segment][begin : begin + entry.size].reshape(entry.shape)
        return named


def frozen_hash(frozen: Mapping[str, Any]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of numpy arrays; ``""`` for none."""
    if not frozen:
        return ""
    digest = hashlib.sha256()
    for name in sorted(frozen):
        array = frozen[name]
        digest.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
