"""Where data sets lie on this machine, and that they are the published ones. Nothing is fetched from a network."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from shoal.protos.errors import DataError

__all__ = ["content", "find", "in_package", "read_idx"]


def find(name: str, files: Iterable[str], path: str | Path | None, others: Sequence[Path | None], remedy: str) -> Path:
    """The first folder that is there and has all ``files``, or has them with ``.gz`` behind their names.

    It is ``path``, or without one ``$SHOAL_DATA/name``, ``~/.cache/shoal/name`` or one of ``others``. DataError with
    the places and the remedy if there is none.
    """
    own = [Path(os.environ["SHOAL_DATA"]) / name] if os.environ.get("SHOAL_DATA") else []
    usual = [*own, Path.home() / ".cache" / "shoal" / name, *filter(None, others)]
    places, wanted = usual if path is None else [Path(path).expanduser()], list(files)
    for place in places:
        if place.is_dir() and all(_packed(place / file) is not None for file in wanted):
            return place
    raise DataError(f"{name!r} is not in {', '.join(map(str, places))}: {remedy}")


def in_package(package: str, folder: str) -> Path | None:
    """A folder of an installed package, which is not imported; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    places = None if spec is None else spec.submodule_search_locations
    return Path(next(iter(places))) / folder if places else None


def content(path: Path, digest: str) -> bytes:
    """What is in a file, or in the one with ``.gz`` behind its name; DataError unless it has this MD5 or SHA-256."""
    place = _packed(path) or path
    try:
        read = place.read_bytes()
        read = gzip.decompress(read) if place != path else read
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{place} is damaged ({error}); fetch it again") from error
    name = "sha256" if len(digest) == 64 else "md5"
    if hashlib.new(name, read, usedforsecurity=name == "sha256").hexdigest() != digest:
        raise DataError(
            f"{place} is not the published file: its content has another {name.upper()} than {digest}; fetch it again"
        )
    return read


def read_idx(path: Path, digest: str) -> np.ndarray:
    """The uint8 array of an IDX file, checked as :func:`content` does."""
    read = content(path, digest)
    dims = read[3]
    shape = [int.from_bytes(read[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    return np.frombuffer(read, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _packed(path: Path) -> Path | None:
    packed = path.with_name(f"{path.name}.gz")
    return path if path.is_file() else packed if packed.is_file() else None
