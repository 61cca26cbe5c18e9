"""Tables of Hugging Face's ``datasets``, and those that flwr-datasets has split; neither is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from shoal.client.readers import pixels
from shoal.protos.errors import DataError, nearest

__all__ = ["Columns", "columns", "partitions"]


class Columns(NamedTuple):
    """Features, labels and, if asked for, clients of each row; what classes are called, where the table says it."""

    x: np.ndarray
    y: np.ndarray
    clients: np.ndarray | None
    class_names: tuple[str, ...] | None


def columns(dataset: Any, x: str | Sequence[str], y: str, client: str | None = None) -> Columns:
    """Columns of a ``datasets.Dataset``; several for ``x`` are numbers that stand side by side.

    Images of 8 bits become float32 in [0, 1], as :func:`~shoal.client.readers.pixels` does it. DataError for what is no
    such table (a dictionary of splits, a stream), has no such column, or has rows without a label.
    """
    if not all(hasattr(dataset, name) for name in ("column_names", "select_columns", "with_format", "features")):
        raise DataError(f"a {type(dataset).__name__} is no datasets.Dataset; choose a split: load_dataset(…)['train']")
    features = [x] if isinstance(x, str) else list(x)
    for name in [*features, y, *([] if client is None else [client])]:
        if name not in dataset.column_names:
            raise DataError(f"the data set has no column {name!r}{nearest(name, dataset.column_names)}")
    parts = [_column(dataset, name) for name in features]
    labels, names = _column(dataset, y), getattr(dataset.features[y], "names", None)
    if names is not None and (labels < 0).any():  # what stands there for "not known"
        raise DataError(f"row {int((labels < 0).argmax())} has no label in column {y!r}; drop such rows")
    joined = pixels(parts[0]) if isinstance(x, str) else np.stack(parts, axis=1)
    return Columns(joined, labels, None if client is None else _column(dataset, client), names and tuple(names))


def partitions(source: Any, split: str) -> dict[str, Any]:
    """The tables of all partitions of a flwr-datasets ``FederatedDataset``, or of a partitioner that has its data.

    Named by their natural ids, where the partitioner knows these, else numbered. DataError if it is none of the two.
    """
    federated = hasattr(source, "load_split")
    if federated and split not in source.partitioners:
        raise DataError(f"there is no partitioner for split {split!r}{nearest(split, source.partitioners)}")
    partitioner = source.partitioners[split] if federated else source
    if not hasattr(partitioner, "load_partition"):
        raise DataError(f"a {type(source).__name__} is no FederatedDataset and no partitioner of flwr-datasets")
    if federated:
        source.load_partition(0, split)  # gives the partitioner its data
    elif not partitioner.is_dataset_assigned():
        raise DataError(f"the {type(partitioner).__name__} has no data; set its dataset first")
    count = partitioner.num_partitions  # which makes the ids
    ids = getattr(partitioner, "partition_id_to_natural_id", {})
    return {str(ids.get(i, i)): partitioner.load_partition(i) for i in range(count)}


def _column(dataset: Any, name: str) -> np.ndarray:
    return np.asarray(dataset.select_columns([name]).with_format("numpy")[:][name])
