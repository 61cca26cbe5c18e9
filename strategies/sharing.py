"""Which tensors of a model clients share: the one mechanism of FedPer, FedRep, LG-FedAvg, FedBABU and FedBN.

Tensors are named by patterns as a shell has them (``"head.*"``), matched against the names of the model's state. A mask
``[P]`` is True at the elements of the named tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import lru_cache

import torch
from torch import Tensor

from shoal.protos.errors import ExperimentError
from shoal.protos.parameters import Layout, Segment
from shoal.strategies.base import Update

__all__ = ["head", "kept_to", "last_layer", "mask", "norms"]


def mask(layout: Layout, patterns: Sequence[str], like: Tensor) -> Tensor:
    """The elements of the tensors that one of the patterns names, on the device of ``like``.

    ExperimentError for a pattern that names nothing.
    """
    return _mask(layout, tuple(patterns)).to(like.device)


@lru_cache(maxsize=64)
def _mask(layout: Layout, patterns: tuple[str, ...]) -> Tensor:
    entries = layout.of(Segment.TRAINABLE)
    for pattern in patterns:
        if not any(fnmatchcase(entry.name, pattern) for entry in entries):
            names = ", ".join(entry.name for entry in entries)
            raise ExperimentError(f"no tensor that is trained is called {pattern!r}; the model has {names}")
    parts = [torch.full((e.size,), any(fnmatchcase(e.name, p) for p in patterns)) for e in entries]
    return torch.cat(parts)


def head(layout: Layout, patterns: Sequence[str], like: Tensor) -> Tensor:
    """The mask of the tensors that are named, or of the last layer where none are."""
    return mask(layout, patterns or last_layer(layout), like)


def last_layer(layout: Layout) -> list[str]:
    """The tensors of the module that stands last. ExperimentError where there is no other."""
    names = [entry.name for entry in layout.of(Segment.TRAINABLE)]
    owner = names[-1].rpartition(".")[0]
    last = [name for name in names if name.rpartition(".")[0] == owner]
    if len(last) == len(names):
        raise ExperimentError(
            f"the model is one layer ({', '.join(names)}), of which no part is a head; name it in 'head'"
        )
    return last


def norms(layout: Layout) -> list[str]:
    """The weights and biases of batch normalisation: those beside a running mean. ExperimentError if there are none."""
    owners = {e.name.rpartition(".")[0] for e in layout.of(Segment.BUFFERS) if e.name.endswith("running_mean")}
    names = [e.name for e in layout.of(Segment.TRAINABLE) if e.name.rpartition(".")[0] in owners]
    if not owners:
        raise ExperimentError("the model has no batch normalisation, of which FedBN keeps the statistics with clients")
    return names


def kept_to(shared: Tensor, update: Update) -> Update:
    """The update without what is not shared."""
    return replace(update, delta=torch.where(shared, update.delta, 0.0))
