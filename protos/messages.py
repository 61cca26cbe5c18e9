"""The values that cross between server and client: a task out, an update or a failure back.

They are frozen and generic in the array type: numpy on the wire, torch where a strategy computes. In a block of K
clients every vector of an update gains a leading axis and every number becomes a tensor ``[K, 1]``, so the
same arithmetic serves both.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import numpy as np

from shoal.protos.errors import InvalidUpdate
from shoal.protos.parameters import Layout, Parameters, Segment

__all__ = [
    "NOTHING",
    "Envelope",
    "Failure",
    "Kind",
    "Measurement",
    "Sent",
    "Setting",
    "Spec",
    "Task",
    "Update",
    "check_update",
]

A = TypeVar("A")
B = TypeVar("B")
Setting = bool | int | float | str | bytes | list[Any]
MOST = 1e12  # more examples or steps than anyone has: a client that claims them would outweigh all others
DIVERGED = "training diverged; lower local.lr or set local.clip"
LONGEST = 20_000  # characters of a failure's reason, and of its traceback, that cross
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Kind(StrEnum):
    """What a client is asked to do."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    PROBE = "probe"
    PHASE = "phase"


@dataclass(frozen=True)
class Spec:
    """The declared form of one tensor: numpy dtype name and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Sent(Generic[A]):
    """What a strategy says to a client: the trainable vector ``[P]``, its own named tensors, settings."""

    parameters: A
    tensors: Mapping[str, A] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Task(Generic[A]):
    """Server to client. ``version`` is the round whose result the model is.

    ``reply`` declares the tensors the answer must bring; None means: as sent. Clients that are asked the same get the
    same task: what is one client's own (a nonce, a lease) stands in the offer that carries it.
    """

    kind: Kind
    round: int
    version: int
    model: Parameters[A]
    tensors: Mapping[str, A] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    reply: Mapping[str, Spec] | None = None

    @property
    def sent(self) -> Sent[A]:
        """The strategy's part of the task."""
        return Sent(self.model.trainable, self.tensors, self.settings)


@dataclass(frozen=True)
class Update(Generic[A]):
    """Client to server, after training.

    ``delta`` ``[P]`` is the trained minus the sent vector; ``examples`` the number of training examples; ``steps`` the
    optimizer steps taken and ``lr_sum`` the sum of their learning rates; ``tensors`` the strategy's own vectors;
    ``buffers`` ``[B]`` and ``counters`` ``[C]`` the values after training; ``metrics`` plain numbers.
    """

    delta: A
    examples: float | A
    steps: float | A = 0
    lr_sum: float | A = 0.0
    tensors: Mapping[str, A] = field(default_factory=dict)
    buffers: A | None = None
    counters: A | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def map(self, convert: Callable[[A], B]) -> Update[B]:
        """One client's update in another array type; its numbers stay numbers."""
        return Update(
            convert(self.delta),
            self.examples,  # type: ignore[arg-type]  # a number here: blocks never cross
            self.steps,  # type: ignore[arg-type]
            self.lr_sum,  # type: ignore[arg-type]
            {name: convert(value) for name, value in self.tensors.items()},
            None if self.buffers is None else convert(self.buffers),
            None if self.counters is None else convert(self.counters),
            self.metrics,
        )


@dataclass(frozen=True)
class Measurement:
    """Client to server, after an evaluation on its own held-out examples; no metrics if it holds out none."""

    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Envelope:
    """A message between the two sides of an app, or the answer to it.

    ``content`` ``[n]`` of uint8 is in the app's own form; ``settings`` say what is to be known without reading it.
    Messages with the same content have the same payload, whatever their settings.
    """

    round: int
    content: np.ndarray
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A client that did not deliver: why, in one sentence, and its own traceback where its code raised.

    ``kind`` does not cross: ``"failed"`` is what a client tells of itself; a server also knows ``"rejected"`` (what it
    sent must not be counted), ``"lost"`` (its lease ended) and ``"late"`` (the deadline came).
    """

    client: str
    round: int
    reason: str
    traceback: str = ""
    kind: str = "failed"

    def sendable(self) -> Failure:
        """Of a length, and in characters, that fit into a header: names of files may hold others."""
        reason, trace = (text.encode("utf-8", "replace").decode() for text in (self.reason, self.traceback))
        return replace(self, reason=reason[:LONGEST], traceback=trace[-LONGEST:])


def check_update(
    update: Update[np.ndarray],
    layout: Layout,
    tensors: Mapping[str, Spec] = NOTHING,
    client: str = "",
    round: int = 0,
    *,
    values: bool = True,
) -> None:
    """Raise :class:`InvalidUpdate` unless the update may be counted.

    Checks the number of examples and steps, then name, shape, dtype and finiteness of each vector against the layout
    and the declared ``tensors``. Without ``values`` nothing is said of finiteness: for vectors still to come.
    """
    where = f"the update of client {client!r} in round {round}" if client else "the update"
    _check_numbers(update, where)
    vectors = {"delta": (update.delta, Spec(layout.dtype, (layout.size(Segment.TRAINABLE),)))}
    for name, segment, vector in (
        ("buffers", Segment.BUFFERS, update.buffers),
        ("counters", Segment.COUNTERS, update.counters),
    ):
        size = layout.size(segment)
        if (vector is None) != (size == 0):
            raise InvalidUpdate(f"{where} has {'no' if vector is None else 'unexpected'} {name}; the model has {size}")
        if vector is not None:
            dtype = "int64" if segment is Segment.COUNTERS else layout.dtype
            vectors[name] = (vector, Spec(dtype, (size,)))
    if update.tensors.keys() != tensors.keys():
        raise InvalidUpdate(f"{where} brings tensors {sorted(update.tensors)}, but {sorted(tensors)} are declared")
    found = [*vectors.items(), *((name, (update.tensors[name], spec)) for name, spec in tensors.items())]
    for name, (vector, spec) in found:
        _check_form(vector, spec, name, where)
    for name, (vector, _) in found if values else ():
        _check_finite(vector, name, where, layout)


def _check_numbers(update: Update[Any], where: str) -> None:
    for name, number, most in (
        ("examples", update.examples, MOST),
        ("steps", update.steps, MOST),
        ("lr_sum", update.lr_sum, sys.float_info.max),
    ):
        if not isinstance(number, int | float) or isinstance(number, bool) or not 0 <= number <= most:
            raise InvalidUpdate(f"{where} reports {name}={number!r}; it must be a plain number from 0 to {most:.3g}")
    for name, number in update.metrics.items():
        if not math.isfinite(number):
            raise InvalidUpdate(f"{where} reports {name}={number!r}: {DIVERGED}")


def _check_form(vector: np.ndarray, spec: Spec, name: str, where: str) -> None:
    if vector.shape != spec.shape or vector.dtype != np.dtype(spec.dtype):
        raise InvalidUpdate(
            f"{where} has {name} of {vector.dtype}{list(vector.shape)}, expected {spec.dtype}{list(spec.shape)}; "
            f"build the same model on the client"
        )


def _check_finite(vector: np.ndarray, name: str, where: str, layout: Layout) -> None:
    if vector.dtype.kind == "f" and not np.isfinite(vector).all():
        index = int(np.flatnonzero(~np.isfinite(vector.ravel()))[0])
        segment = Segment.BUFFERS if name == "buffers" else Segment.TRAINABLE
        part = f" in tensor {layout.locate(segment, index)!r}" if vector.size == layout.size(segment) else ""
        raise InvalidUpdate(f"{where} holds {vector.ravel()[index]} in its {name}{part}: {DIVERGED}")
