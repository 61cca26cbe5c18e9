"""The program that trains: a process of its own, because it loads torch and an idle client must stay small.

It is told in JSON lines where a task lies and where its answer goes; tensors it reads from and writes to files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from shoal.client.client import Client
from shoal.client.data import Shard
from shoal.client.local import LocalTraining
from shoal.client.net import Net, build_module, parameters_of, to_numpy
from shoal.client.participant import Participant, failure
from shoal.client.process import answer_jobs
from shoal.client.sources import shard_of
from shoal.client.store import Outbox, keep_state, kept_state
from shoal.protos import registry
from shoal.protos.assignment import Assignment
from shoal.protos.codec import decode_task, encode
from shoal.protos.errors import DataError, ExperimentError, InvalidUpdate, ShoalError
from shoal.protos.files import mapped
from shoal.protos.messages import Kind, Measurement, Task, Update
from shoal.protos.parameters import Layout, frozen_hash
from shoal.strategies.base import Mine, Strategy
from shoal.strategies.sums import Carried

__all__ = ["main"]

SHARDS = 64  # kept in memory where one process plays many clients


def main() -> None:
    """Answer jobs until the other side is gone."""
    torch.set_num_threads(1)
    answer_jobs(lambda job: _look(job) if job["kind"] == "look" else _play(job))


def _look(job: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to say of a client's data; the reason if they, its device or the code it allows are not there."""
    try:
        for name in job["allow"]:
            registry.load("what --allow names", name)
        _check_device(job["device"])
        if job["client"] is None:
            return {}
        shard = shard_of(job["client"], job["data"])
    except ShoalError as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": f"the data of client {job['client']!r} cannot be read: {type(error).__name__}: {error}"}
    return {"about": f"{len(shard)} examples to train on, {len(shard.held_out or ())} held out"}


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except Exception as error:  # torch has many kinds
        reason = str(error).partition("\n")[0]
        raise ExperimentError(
            f"--device {device!r} is not to be had here ({reason}); leave it out to use the CPU"
        ) from error


def _play(job: Mapping[str, Any]) -> dict[str, Any]:
    """One task from its files to its answer's; whatever goes wrong in it is the answer."""
    client, round = job["client"], int(job["round"])
    try:
        header, payload = encode(_answer(job))
    except (Exception, SystemExit) as error:
        header, payload = encode(failure(error, client, round).sendable())
    Outbox(Path(job["outbox"])).put(job["nonce"], header, payload)
    return {}


def _answer(job: Mapping[str, Any]) -> Update[np.ndarray] | Measurement:
    client, states = job["client"], Path(job["states"])
    task, frozen = decode_task(Path(job["task"]).read_bytes(), mapped(Path(job["payload"])), verify=False)
    assigned = Path(job["assignment"]).read_bytes()
    participant, strategy, model = _participant(assigned, tuple(job["allow"]), job["device"])
    _check_model(participant.net, task.model.layout, frozen)
    sent = Task(task.kind, task.round, task.version, task.model.map(_to_tensor), _all(task.tensors), task.settings).sent
    carried = Carried(_to_tensor(task.model.buffers), _to_tensor(task.model.counters))
    shard = _shard(client, json.dumps(job["data"], sort_keys=True))
    _check_shard(shard, client, model)
    mine = _mine(states, int(job["counted"]), bool(strategy.init_client(sent.parameters)) or strategy.own_buffers)
    if task.kind is Kind.EVALUATE:
        return Measurement(participant.evaluate(client, task.round, shard, sent, carried, mine))
    if task.kind is not Kind.TRAIN:
        raise InvalidUpdate(f"the server asks for a task of kind {task.kind!r}; upgrade this client")
    update, after = participant.train(client, task.round, shard, sent, carried, mine)
    if after:  # before the answer: a counted update always finds its state
        keep_state(states, task.round, save({name: tensor.contiguous() for name, tensor in after.items()}))
    return update.map(to_numpy)


@lru_cache(maxsize=2)
def _participant(
    assigned: bytes, allow: tuple[str, ...], device: str
) -> tuple[Participant, Strategy, Mapping[str, Any]]:
    """Strategy and model from this installation, and the model's arguments.

    NotAllowed for code that the installation's owner did not allow.
    """
    assignment = Assignment.decode(assigned).permitted(allow)
    named = assignment.strategy
    strategy = registry.build("shoal.strategies", named.name, named.arguments, "strategy", Strategy)
    local = registry.build("shoal.local", "shoal.client.local:LocalTraining", assignment.local, "local", LocalTraining)
    own = None
    if assignment.client is not None:
        own = registry.build("shoal.clients", assignment.client.name, assignment.client.arguments, "client", Client)

    def make_model() -> nn.Module:
        model = assignment.model
        made: nn.Module = registry.build("shoal.models", model.name, model.arguments, "model", nn.Module)
        return made

    net = Net(build_module(make_model, assignment.seed, assignment.dtype), device)
    return Participant(net, strategy, local, assignment.seed, own), strategy, assignment.model.arguments


def _check_shard(shard: Shard, client: str, model: Mapping[str, Any]) -> None:
    """DataError for examples or labels that the model was not made for, where it says what it was made for."""
    shape, classes, found = model.get("shape"), model.get("classes"), list(shard.x.shape[1:])
    if shape is not None and list(shape) != found:
        raise DataError(
            f"the examples of client {client!r} have shape {found}, but the model takes {list(shape)}; prepare them "
            f"as the experiment's are"
        )
    if isinstance(classes, int) and classes > 1 and not shard.y.is_floating_point():
        low, high = int(shard.y.min()), int(shard.y.max())
        if low < 0 or high >= classes:
            raise DataError(
                f"the labels of client {client!r} go from {low} to {high}, but the model has {classes} classes; number "
                f"them from 0, with the same class_names on every client"
            )


def _check_model(net: Net, layout: Layout, frozen: str) -> None:
    difference = layout.difference(net.layout)
    if difference is not None:
        raise InvalidUpdate(
            f"the model that this client builds is not the server's ({difference}); install the same version of the "
            f"model's code on both sides"
        )
    if frozen and frozen != frozen_hash(parameters_of(net.module).map(to_numpy).frozen):
        raise InvalidUpdate("the model's frozen tensors differ from the server's; install the same weights on both")


def _mine(states: Path, counted: int, keeps: bool) -> Mine | None:
    """The client's true state; an error if it had one and it is gone."""
    kept = kept_state(states, counted)
    if kept is not None:
        return load(kept)
    if counted and keeps:
        raise DataError(
            f"this client's state of round {counted} is not in {states}; start the client with the --state folder it "
            f"had, or under another name"
        )
    return None


@lru_cache(maxsize=SHARDS)
def _shard(client: str, spec: str) -> Shard:
    return shard_of(client, json.loads(spec))


def _to_tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy())  # torch wants memory that may be written


def _all(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: _to_tensor(array) for name, array in arrays.items()}
