"""The weighted mean of flwr's strategies, faster: on each number the same operations in the same order.

flwr goes through whole arrays, so that each product is written to memory and read again. Here all replies are added up
piece by piece, in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import fedavg, multikrum

from shoal.flower.arrays import view

__all__ = ["quick_sums"]

PIECE = 2**15  # numbers
NAME, WHERE = "aggregate_arrayrecords", (fedavg, multikrum)


@contextmanager
def quick_sums() -> Iterator[None]:
    """Let flwr's strategies add up in this way."""
    before = [(module, getattr(module, NAME)) for module in WHERE if hasattr(module, NAME)]
    for module, _ in before:
        setattr(module, NAME, _aggregated)
    try:
        yield
    finally:
        for module, function in before:
            setattr(module, NAME, function)


def _aggregated(records: list[RecordDict], weighting_metric_name: str) -> ArrayRecord:
    weights: list[Any] = [_first_metrics(record)[weighting_metric_name] for record in records]
    whole, named = sum(weights), dict[str, list[tuple[Array, float]]]()
    for content, weight in zip(records, weights, strict=True):
        for record in content.values():
            for name, array in record.items() if isinstance(record, ArrayRecord) else ():
                named.setdefault(name, []).append((array, weight / whole))
    return ArrayRecord({name: Array(_sum(*zip(*parts, strict=True))) for name, parts in named.items()})


def _first_metrics(content: RecordDict) -> MetricRecord:
    return next(record for record in content.values() if isinstance(record, MetricRecord))


def _sum(arrays: Sequence[Array], factors: Sequence[float]) -> np.ndarray:
    views = [found for array in arrays if (found := view(array)) is not None]
    if len(views) < len(arrays) or len({(found.dtype, found.shape) for found in views}) > 1:
        whole: Any = arrays[0].numpy() * factors[0]
        for array, factor in zip(arrays[1:], factors[1:], strict=True):
            whole += array.numpy() * factor
        return np.asarray(whole)
    first, *others = (found.reshape(-1) for found in views)
    total = np.empty(first.shape, (first[:0] * factors[0]).dtype)
    for start in range(0, len(total), PIECE):
        piece = slice(start, start + PIECE)
        np.multiply(first[piece], factors[0], out=total[piece])
        for other, factor in zip(others, factors[1:], strict=True):
            total[piece] += other[piece] * factor
    return total.reshape(views[0].shape)
