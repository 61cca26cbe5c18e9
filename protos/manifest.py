"""The payload's table of contents: tensors to bytes and back, with every claim of a peer checked first.

Sizes and names are checked against the payload and :class:`Limits` before a view is made; no memory is allocated on
a peer's word, and whatever is wrong is a :class:`CodecError`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from shoal.protos import fleet_pb2 as wire
from shoal.protos.errors import CodecError

__all__ = [
    "DTYPES",
    "LIMITS",
    "ON_WIRE",
    "TENSOR",
    "Arrays",
    "Limits",
    "at_most",
    "check_manifest",
    "check_names",
    "hollow",
    "known_dtype",
    "quote",
    "shape_of",
    "views",
    "wire_dtype",
    "write_manifest",
]

WIDTHS = {"float64": "<f8", "int64": "<i8", "float32": "<f4", "int32": "<i4", "float16": "<f2", "bfloat16": "<u2"}
DTYPES = {name: np.dtype(code) for name, code in (WIDTHS | {"int8": "i1", "uint8": "u1", "bool": "?"}).items()}
ON_WIRE = {dtype.name: name for name, dtype in DTYPES.items()}
AXES = 32  # numpy 1's own limit
ELEMENTS = 2**56  # even in bytes far below 2⁶³, where numpy's own arithmetic ends
TENSOR = "tensor"  # the role of a strategy's own tensors; any other role is that of one vector

Arrays = dict[tuple[str, str], np.ndarray]  # by role and name


@dataclass(frozen=True)
class Limits:
    """What is accepted: bytes of header and payload, tensors in a table, characters in a name."""

    header: int = 2**20  # parsed, a hostile header takes up to 30 times its size
    payload: int = 2**32
    tensors: int = 2**14
    name: int = 512


LIMITS = Limits()


def write_manifest(manifest: wire.Manifest, arrays: Arrays) -> list[memoryview]:
    """Fill the manifest; the payload is the returned buffers one behind the other."""
    digest, buffers, offset = hashlib.sha256(), [], 0
    # Larger items first: then every tensor is aligned without padding.
    for (role, name), array in sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize):
        dtype = wire_dtype(array.dtype.name, f"tensor {quote(name)}")
        flat = np.ascontiguousarray(array, DTYPES[dtype]).reshape(-1).view(np.uint8)
        buffers.append(flat.data.toreadonly())
        digest.update(flat.data)
        manifest.tensors.add(name=name, role=role, dtype=dtype, shape=array.shape, offset=offset, nbytes=flat.nbytes)
        offset += flat.nbytes
    manifest.byte_order, manifest.total_bytes, manifest.sha256 = "little", offset, digest.digest()
    return buffers


def check_manifest(manifest: wire.Manifest, size: int, limits: Limits) -> None:
    """CodecError unless the manifest describes exactly a payload of ``size`` bytes."""
    if manifest.byte_order != "little":
        raise CodecError(f"the byte order is {quote(manifest.byte_order)}; send 'little'")
    at_most(limits.payload, size, "bytes in the payload")
    at_most(limits.tensors, len(manifest.tensors), "tensors in the payload")
    check_names((t.name for t in manifest.tensors if t.role == TENSOR), "tensor", limits)
    check_names((t.role for t in manifest.tensors if t.role != TENSOR), "vector", limits)
    end = 0
    for tensor in manifest.tensors:
        end = _check_tensor(tensor, end)
    if not end == manifest.total_bytes == size:
        raise CodecError(
            f"the payload has {size} bytes, its manifest says {manifest.total_bytes} and its tensors need {end}; "
            f"send it again"
        )


def _check_tensor(tensor: wire.Tensor, offset: int) -> int:
    what = f"tensor {quote(tensor.name)}"
    if tensor.role != TENSOR and tensor.name != tensor.role:
        raise CodecError(f"{what} has the role {quote(tensor.role)}; a vector is named as its role")
    itemsize = DTYPES[known_dtype(tensor.dtype, what)].itemsize
    nbytes = math.prod(shape_of(tensor.shape, what)) * itemsize
    if tensor.nbytes != nbytes:
        raise CodecError(f"{what} claims {tensor.nbytes} bytes, but its shape needs {nbytes}; send it again")
    if tensor.offset != offset:
        raise CodecError(f"{what} begins at byte {tensor.offset}, expected {offset}; put one tensor behind the other")
    if offset % itemsize:
        raise CodecError(f"{what} is not aligned at byte {offset}; put tensors of larger items first")
    return offset + nbytes


def views(manifest: wire.Manifest, payload: memoryview) -> Arrays:
    """Read-only views on a payload that fits its checked manifest."""
    data = np.frombuffer(payload, np.uint8) if payload.nbytes else np.empty(0, np.uint8)
    data.flags.writeable = False
    arrays: Arrays = {}
    for tensor in manifest.tensors:
        part = data[tensor.offset : tensor.offset + tensor.nbytes]
        if tensor.dtype == "bool" and part.max(initial=0) > 1:
            raise CodecError(f"tensor {quote(tensor.name)} of bool has a byte {part.max()}; send 0 or 1")
        arrays[tensor.role, tensor.name] = part.view(DTYPES[tensor.dtype]).reshape(tuple(tensor.shape))
    return arrays


def hollow(manifest: wire.Manifest) -> Arrays:
    """Zeros of the dtypes and shapes in a checked manifest, as views of one element each: no memory is taken."""
    return {
        (tensor.role, tensor.name): np.broadcast_to(np.zeros((), DTYPES[tensor.dtype]), tuple(tensor.shape))
        for tensor in manifest.tensors
    }


def at_most(limit: int, size: int, what: str) -> None:
    """CodecError if there is more than is accepted."""
    if size > limit:
        raise CodecError(f"{size} {what}, at most {limit} are accepted; send less or raise the limit on both sides")


def check_names(names: Iterable[str], what: str, limits: Limits) -> None:
    """CodecError for a name that is empty, too long or given twice."""
    seen: set[str] = set()
    for name in names:
        if not name:
            raise CodecError(f"a {what} has no name; name it")
        at_most(limits.name, len(name), f"characters in the name of {what} {quote(name)}")
        if name in seen:
            raise CodecError(f"{what} {quote(name)} stands there twice; names must be unique")
        seen.add(name)


def shape_of(shape: Sequence[int], what: str) -> tuple[int, ...]:
    """The shape as a tuple; CodecError if no tensor could have it."""
    if len(shape) > AXES or math.prod(max(n, 1) for n in shape) > ELEMENTS:
        raise CodecError(f"{what} has the impossible shape {list(shape[:AXES])}; at most {AXES} axes, 2**56 elements")
    return tuple(shape)


def known_dtype(dtype: str, what: str) -> str:
    """The wire's dtype name itself; CodecError if it is none of the allowed."""
    if dtype not in DTYPES:
        raise CodecError(f"{what} is of dtype {quote(dtype)}; convert it to one of {', '.join(DTYPES)}")
    return dtype


def wire_dtype(dtype: str, what: str) -> str:
    """How the wire names a numpy dtype; CodecError if it cannot."""
    if dtype not in ON_WIRE:
        raise CodecError(f"{what} is of numpy dtype {quote(dtype)}; convert it to one of {', '.join(ON_WIRE)}")
    return ON_WIRE[dtype]


def quote(text: str) -> str:
    """A peer's text in an error: bounded, or one message could fill the log."""
    return repr(text if len(text) <= 80 else text[:79] + "…")
