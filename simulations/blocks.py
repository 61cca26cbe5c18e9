"""Clients played in blocks: the client half of a strategy, once for K clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from shoal.client.data import Shard
from shoal.client.local import LocalTraining
from shoal.client.net import Net, to_numpy
from shoal.client.participant import BUFFERS, kept_back
from shoal.client.trainer import turn_of
from shoal.protos import seeds
from shoal.protos.errors import ExperimentError, InvalidUpdate, nearest
from shoal.protos.messages import check_update
from shoal.simulations.block import BlockTrainer, Programs
from shoal.simulations.step import Unsuitable
from shoal.strategies.base import Mine, Sent, Strategy, Update
from shoal.strategies.sums import Carried

__all__ = ["BlockParticipant", "EngineName", "Method", "blocks", "columns", "row"]


EngineName = Literal["lean", "captured", "fused"]


@dataclass(frozen=True)
class Method:
    """How clients are played: by which ``engine``, in blocks of at most ``block`` of them.

    The bits of a result depend on it, and on nothing else than what an experiment says.
    """

    engine: EngineName = "lean"
    block: int = 1

    def __str__(self) -> str:
        return self.engine if self.engine == "lean" else f"{self.engine}:{self.block}"

    @classmethod
    def read(cls, text: str) -> Method | None:
        """The inverse of ``str``; None for a block engine without its size. ExperimentError for anything else."""
        engine, colon, size = text.partition(":")
        known = get_args(EngineName)
        if engine not in known or (colon and (engine == "lean" or not size.isdecimal() or int(size) < 1)):
            raise ExperimentError(
                f"there is no engine {text!r}{nearest(engine, known)}; a block has a size as in 'fused:64'"
            )
        return cls(cast(EngineName, engine), int(size or 1)) if colon or engine == "lean" else None


def blocks(shards: Mapping[int, Shard], size: int) -> list[list[int]]:
    """Which clients share a block: those of like examples, at most ``size``, evenly, the largest shards first."""

    forms = {k: (shard.x.shape[1:], shard.x.dtype, shard.y.shape[1:], shard.y.dtype) for k, shard in shards.items()}
    groups: dict[Any, list[int]] = {}
    for k in sorted(shards, key=lambda k: -len(shards[k])):
        groups.setdefault(forms[k], []).append(k)
    found = []
    for alike in groups.values():
        count = -(-len(alike) // size)
        ends = [len(alike) * (i + 1) // count for i in range(count)]
        found += [alike[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return found


class BlockParticipant:
    """Runs the task of a round for blocks of clients; see :class:`shoal.client.participant.Participant`."""

    def __init__(self, net: Net, strategy: Strategy, local: LocalTraining, seed: int, fuse: bool) -> None:
        self.net, self._strategy, self._local, self._seed = net, strategy, local, seed
        self._programs = Programs(net, local, fuse=fuse)
        self._streams: list[np.random.Generator] = []

    def train(
        self, clients: Sequence[str], round: int, shards: Sequence[Shard], sent: Sent, carried: Carried, mine: Any
    ) -> tuple[Update, Mapping[str, Tensor]]:
        """The block's update and next states, with a leading axis of clients.

        Whatever is raised comes as :class:`Unsuitable`: whose fault it is shows when each client is played alone.
        """
        try:
            return self._train(clients, round, shards, sent, carried, mine)
        except Unsuitable:
            raise
        except Exception as error:
            raise Unsuitable(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error

    def _train(
        self, clients: Sequence[str], round: int, shards: Sequence[Shard], sent: Sent, carried: Carried, mine: Any
    ) -> tuple[Update, Mapping[str, Tensor]]:
        given = zip(clients, repeat(round), shards, self._streams_of(clients, round), strict=False)
        turns = [turn_of(self._local, self._seed, *one) for one in given]
        before, kept = self._before(sent, carried, mine)
        trainer = BlockTrainer(self._programs, turns, self._seed, kept)
        return kept_back(self._strategy, *self._strategy.local(trainer, sent, before), carried)

    def _streams_of(self, clients: Sequence[str], round: int) -> list[np.random.Generator]:
        while len(self._streams) < len(clients):
            self._streams.append(seeds.stream(0, "batches"))
        for stream, client in zip(self._streams, clients, strict=False):
            seeds.restart(stream, self._seed, "batches", round, client)
        return self._streams

    def _before(self, sent: Sent, carried: Carried, mine: Sequence[Mine | None]) -> tuple[Mine, Carried]:
        """The clients' states, stacked, and the buffers and counters to begin with."""
        fresh = self._strategy.init_client(sent.parameters)
        known = [fresh if one is None else one for one in mine]

        def stacked(name: str, default: Tensor) -> Tensor:
            return torch.stack([one.get(name, default).to(default.device) for one in known])

        own = self._strategy.own_buffers and any(BUFFERS in one for one in known)
        buffers = stacked(BUFFERS, carried.buffers) if own else carried.buffers
        return {name: stacked(name, value) for name, value in fresh.items()}, Carried(buffers, carried.counters)

    def problems(self, update: Update, sent: Sent, clients: Sequence[str], round: int) -> dict[int, InvalidUpdate]:
        """Which clients' updates may not be counted, and why."""
        bad = ~_finite(update.delta)
        for tensor in (*update.tensors.values(), update.buffers):
            if tensor is not None:
                bad |= ~_finite(tensor)
        bad |= ~torch.isfinite(torch.as_tensor(update.metrics["loss"]))
        found, declared = {}, self._strategy.reply(sent)
        suspects = bad.nonzero().flatten().tolist() or [0]  # names and shapes are the same for all
        for k in suspects:
            try:
                check_update(row(update, k).map(to_numpy), self.net.layout, declared, clients[k], round)
            except InvalidUpdate as error:
                found[k] = error
        return found


def row(update: Update, k: int) -> Update:
    """One client's update out of a block's."""

    def number(value: Any) -> float:
        return float(value[k])

    return Update(
        update.delta[k],
        number(update.examples),
        number(update.steps),
        number(update.lr_sum),
        {name: tensor[k] for name, tensor in update.tensors.items()},
        None if update.buffers is None else update.buffers[k],
        None if update.counters is None else update.counters[k],
        {name: number(value) for name, value in update.metrics.items()},
    )


def columns(update: Update) -> list[dict[str, float]]:
    """The numbers of a block's update, client by client."""
    columns: dict[str, Any] = dict(update.metrics)
    columns |= {"examples": update.examples, "steps": update.steps, "lr_sum": update.lr_sum}
    names = list(columns)
    values = zip(*(column.flatten().tolist() for column in columns.values()), strict=True)
    return [dict(zip(names, numbers, strict=True)) for numbers in values]


def _finite(rows: Tensor) -> Tensor:
    """Whether each row is finite, or may not be, since its sum is infinite: one pass, no copy."""
    return torch.isfinite(rows.sum(dim=1))
