"""A model's arrays by name, as Flower sends them, and its vectors, as Shoal's strategies see them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor, nn

from shoal.client.net import layout_of
from shoal.protos.errors import ExperimentError
from shoal.protos.parameters import Entry, Layout, Parameters, Segment

__all__ = ["guessed_layout", "joined", "layout_for", "record", "tensors"]

BUFFERS = ("running_mean", "running_var")  # as PyTorch calls the statistics of its norms


def record(named: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as a record."""
    return ArrayRecord({name: Array(tensor.detach().cpu().numpy()) for name, tensor in named.items()})


def tensors(arrays: ArrayRecord) -> dict[str, Tensor]:
    """The inverse of :func:`record`."""
    return {name: torch.from_numpy(np.asarray(array.numpy(), order="C")) for name, array in arrays.items()}


def guessed_layout(arrays: ArrayRecord) -> Layout:
    """What each array of a model is, by its name and type: integers are counters, PyTorch's statistics buffers."""
    entries = []
    for name, array in arrays.items():
        if array.dtype.startswith("float"):
            segment = Segment.BUFFERS if name.rpartition(".")[2] in BUFFERS else Segment.TRAINABLE
        else:
            segment = Segment.COUNTERS
        entries.append(Entry(name, segment, array.dtype, tuple(array.shape)))
    return Layout(tuple(entries))


def layout_for(arrays: ArrayRecord, model: nn.Module | None) -> Layout:
    """The model's layout, or where there is none the guessed one; ExperimentError unless the arrays fit it."""
    guess = guessed_layout(arrays)
    if model is None:
        return guess
    layout = layout_of(model)
    shapes, wanted = ({e.name: (e.dtype, e.shape) for e in found.entries} for found in (guess, layout))
    if shapes != wanted:
        name = next(name for name in {**shapes, **wanted} if shapes.get(name) != wanted.get(name))
        raise ExperimentError(
            f"the initial arrays do not fit the model: {name!r} is {shapes.get(name, 'missing')}, expected "
            f"{wanted.get(name, 'none')}; give ArrayRecord(model.state_dict())"
        )
    return layout


def joined(layout: Layout, named: Mapping[str, Tensor]) -> Parameters[Tensor]:
    """Arrays by name as vectors; ExperimentError for one that is missing or has another shape."""
    for entry in layout.entries:
        if entry.name not in named or tuple(named[entry.name].shape) != entry.shape:
            given = tuple(named[entry.name].shape) if entry.name in named else "missing"
            raise ExperimentError(f"array {entry.name!r} is {given}, expected {entry.shape}; use the same model")
    return Parameters(
        layout,
        _vector(layout, Segment.TRAINABLE, named),
        _vector(layout, Segment.BUFFERS, named),
        _vector(layout, Segment.COUNTERS, named),
        frozen={entry.name: named[entry.name] for entry in layout.of(Segment.FROZEN)},
    )


def _vector(layout: Layout, segment: Segment, named: Mapping[str, Tensor]) -> Tensor:
    dtype = torch.int64 if segment is Segment.COUNTERS else getattr(torch, layout.dtype)
    parts = [named[entry.name].reshape(-1).to(dtype) for entry in layout.of(segment)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)
