"""Where a client's examples come from: a shard file, or a table of its own."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from shoal.client.data import Shard, Table
from shoal.client.readers import read_function, read_npz
from shoal.protos.errors import DataError
from shoal.protos.seeds import stream

__all__ = ["read_shard", "shard_of", "write_shard"]


def write_shard(folder: Path, client: str, shard: Shard) -> Path:
    """``FOLDER/<client>.npz`` with ``x`` and ``y`` and, where there are some, ``x_test`` and ``y_test``."""
    parts = {"x": shard.x, "y": shard.y, "x_test": shard.x_test, "y_test": shard.y_test}
    arrays: dict[str, Any] = {name: part.numpy() for name, part in parts.items() if part is not None}
    path = folder / f"{quote(client, safe=' ')}.npz"
    aside = folder / f".{path.name}.new"
    with aside.open("wb") as file:  # who trains on the shard meanwhile sees the old one or the new one
        np.savez(file, **arrays)
    aside.replace(path)
    return path


def read_shard(path: Path) -> Shard:
    """A file of :func:`write_shard`, or any ``.npz`` with ``x`` and ``y``; DataError if it is none."""
    train = read_npz(path, dtype=_kind(path))
    with np.load(path, allow_pickle=False) as archive:
        tested = {"x_test", "y_test"} <= set(archive.files)
    test = read_npz(path, "x_test", "y_test", dtype=_kind(path), class_names=train.class_names) if tested else None
    return _shard(train, test)


def _kind(path: Path) -> Any:
    """Whole numbers of more than a byte are token ids and stay whole."""
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
            x = archive["x"] if "x" in archive.files else np.zeros(0)
            return "int64" if x.dtype.kind in "iu" and x.dtype.itemsize > 1 else "float32"
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"{str(path)!r} cannot be read as a shard ({reason}); make one with 'shoal data split'"
        ) from error


def shard_of(client: str, spec: Mapping[str, Any]) -> Shard:
    """The examples that ``spec`` (``{"name": …}`` with a reader's arguments, or ``{"path": …}``) gives a client.

    Of a table that names its clients only this client's rows are taken; ``client_test`` holds out a share of them.
    DataError if nothing is left.
    """
    arguments = dict(spec)
    if "name" not in arguments:
        return read_shard(Path(arguments["path"]))
    held = arguments.pop("client_test", 0.0)
    if isinstance(held, bool) or not isinstance(held, int | float) or not 0 <= held < 1:
        raise DataError(f"client_test is {held!r}; it must be a fraction, from 0 to below 1")
    table = read_function(arguments.pop("name"), **arguments)
    if table.clients is not None:
        rows = np.flatnonzero(table.clients == client)
        if not len(rows):
            known = ", ".join(map(repr, np.unique(table.clients)[:10].tolist()))
            raise DataError(f"no row belongs to client {client!r} (the data names {known}); set --id")
        table = table.take(rows)
    if not held:
        return _shard(table, None)
    order = stream(0, "client-test", 0, client).permutation(len(table))
    count = min(max(1, round(held * len(table))), len(table) - 1)
    return _shard(table.take(np.sort(order[count:])), table.take(np.sort(order[:count])) if count else None)


def _shard(train: Table, test: Table | None) -> Shard:
    x_test, y_test = (None, None) if test is None else (_tensor(test.x), _tensor(test.y))
    return Shard(_tensor(train.x), _tensor(train.y), x_test, y_test)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
