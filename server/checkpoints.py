"""Checkpoints: the server's value after a round, as safetensors and JSON.

A checkpoint is a folder ``round-00012`` that appears whole or not at all (written aside, synced, renamed). A damaged
one is passed over for the one before it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load, save
from torch import Tensor

from shoal.protos.errors import RunError
from shoal.protos.files import sync_folder, write_synced
from shoal.protos.parameters import Entry, Layout, Parameters, Segment
from shoal.strategies.base import State, vector
from shoal.strategies.sums import Carried

__all__ = ["Checkpoint", "latest", "prune", "write"]

FORMAT = 3


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on after ``round``, bit for bit.

    ``clients`` is the fleet's note of where the clients' own states are, ``remembered`` what each callback must know;
    ``stopped`` says why a callback has ended the run.
    """

    round: int
    state: State
    carried: Carried
    layout: Layout
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    selector: Mapping[str, Any] = field(default_factory=dict)
    clients: Mapping[str, int] = field(default_factory=dict)
    remembered: Sequence[Mapping[str, Any]] = ()
    stopped: str = ""

    @property
    def parameters(self) -> Parameters[Tensor]:
        """The global model."""
        buffers, counters = self.carried.buffers, self.carried.counters
        return Parameters(self.layout, vector(self.state, "parameters"), buffers, counters, frozen=self.frozen)


def write(folder: Path, checkpoint: Checkpoint, keep: int = 2) -> None:
    """Write a checkpoint and drop all but the newest ``keep``."""
    final, aside = folder / f"round-{checkpoint.round:05d}", folder / f".round-{checkpoint.round:05d}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors, numbers = _flatten(checkpoint)
    payload = save({name: tensor.cpu().contiguous().numpy() for name, tensor in tensors.items()})
    numbers["tensors"] = hashlib.sha256(payload).hexdigest()
    numbers["sha256"] = _digest(numbers)  # a bit that flips in a client's name would make another client of it
    write_synced(aside / "tensors.safetensors", [payload])
    write_synced(aside / "state.json", [json.dumps(numbers).encode()])
    for holding in (aside, folder.parent):  # the names of both files, and the first time that of ``folder``
        sync_folder(holding)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    sync_folder(folder)
    prune(folder, keep)


def prune(folder: Path, keep: int) -> None:
    """Drop all checkpoints but the newest ``keep``."""
    for old in _newest_first(folder)[keep:]:
        shutil.rmtree(old)


def latest(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint; None if there is none; RunError if there are only damaged ones."""
    damaged = []
    for path in _newest_first(folder):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(f"{path.name}: {error}")
    if damaged:
        raise RunError(f"no checkpoint in {folder} can be read ({'; '.join(damaged)}); start the run anew")
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("round-*"), key=lambda path: int(path.name.removeprefix("round-")), reverse=True)


def _flatten(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors under JSON-array names (names hold any character), everything else as JSON."""
    tensors = {_key("carried", "buffers"): checkpoint.carried.buffers}
    tensors[_key("carried", "counters")] = checkpoint.carried.counters
    numbers: dict[str, Any] = {"format": FORMAT, "round": checkpoint.round, "state": {}}
    numbers |= {"selector": checkpoint.selector, "clients": checkpoint.clients}
    numbers |= {"remembered": list(checkpoint.remembered), "stopped": checkpoint.stopped}
    numbers["layout"] = [[e.name, e.segment, e.dtype, list(e.shape)] for e in checkpoint.layout.entries]
    for name, value in checkpoint.state.items():
        if isinstance(value, Tensor):
            tensors[_key("state", name)] = value
        else:
            numbers["state"][name] = value
    for name, tensor in checkpoint.frozen.items():
        tensors[_key("frozen", name)] = tensor
    return tensors, numbers


def _read(path: Path) -> Checkpoint:
    numbers = json.loads((path / "state.json").read_bytes())
    if "format" not in numbers or numbers["format"] != FORMAT:
        raise ValueError("it was written by another version of Shoal")
    if numbers.pop("sha256") != _digest(numbers):
        raise ValueError("state.json does not match its checksum")
    payload = (path / "tensors.safetensors").read_bytes()
    if hashlib.sha256(payload).hexdigest() != numbers["tensors"]:
        raise ValueError("tensors.safetensors does not match its checksum")
    found: dict[str, Any] = {"state": dict(numbers["state"]), "frozen": {}, "carried": {}}
    for key, array in load(payload).items():
        *path_to, name = json.loads(key)
        group = found
        for step in path_to:
            group = group.setdefault(step, {})
        group[name] = torch.from_numpy(array)
    layout = Layout(tuple(Entry(n, Segment(s), d, tuple(shape)) for n, s, d, shape in numbers["layout"]))
    carried = Carried(found["carried"]["buffers"], found["carried"]["counters"])
    noted = (numbers[name] for name in ("selector", "clients", "remembered", "stopped"))
    return Checkpoint(numbers["round"], found["state"], carried, layout, found["frozen"], *noted)


def _digest(numbers: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def _key(*path: str) -> str:
    return json.dumps(path)
