"""What crosses a Ray cluster: pickled, with the memory of its tensors beside it.

So the processes of a node read one copy of a large tensor, in the node's object store.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections import ChainMap
from typing import Any, ClassVar

import cloudpickle
import numpy as np
import torch
from torch import Tensor

__all__ = ["Parcel", "unwrap", "wrap"]

Parcel = tuple[bytes, list[pickle.PickleBuffer]]


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that memory of the object store is not to be written to
        return torch.from_numpy(array)


def _reduce(tensor: Tensor) -> Any:
    try:
        return _tensor, (tensor.detach().numpy(),)
    except TypeError:  # of a kind that numpy does not have, or on another device
        return tensor.__reduce_ex__(5)  # type: ignore[no-untyped-call]


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """By value where another process could not import; tensors as arrays, whose memory pickle can leave outside."""

    dispatch_table: ClassVar = ChainMap({Tensor: _reduce}, cloudpickle.Pickler.dispatch_table)


def wrap(thing: object) -> Parcel:
    """``thing`` without the memory of its tensors, and that memory, not copied."""
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(thing)
    return file.getvalue(), buffers


def unwrap(parcel: Parcel, *, copy: bool = False) -> Any:
    """The inverse of :func:`wrap`. Without ``copy`` tensors lie in the parcel's memory, not to be written to."""
    pickled, buffers = parcel
    return pickle.loads(pickled, buffers=[bytearray(buffer) for buffer in buffers] if copy else buffers)
