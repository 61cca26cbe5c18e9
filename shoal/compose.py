"""Composition: an experiment becomes data, model, fleet and coordinator, checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from shoal.client.data import Shard
from shoal.client.losses import cross_entropy, loss_named, metric_named
from shoal.client.net import Net, build_module, parameters_of
from shoal.client.participant import evaluate
from shoal.experiment import Experiment
from shoal.protos.errors import DataError, ExperimentError, RunError
from shoal.protos.parameters import Parameters
from shoal.server.callbacks import Callback
from shoal.server.checkpoints import Checkpoint
from shoal.server.coordinator import Coordinator, Plan, start
from shoal.server.fleet import Ask, Fleet
from shoal.simulations.blocks import EngineName, Method
from shoal.simulations.cluster import Cluster
from shoal.simulations.dataset import Dataset
from shoal.simulations.engine import Assignment
from shoal.simulations.federated import ArrayData, FederatedData
from shoal.simulations.fleet import SimulatedFleet
from shoal.simulations.planner import refusal
from shoal.simulations.survey import survey
from shoal.strategies.base import Context

__all__ = ["Composition", "Place"]


@dataclass(frozen=True)
class Place:
    """Where simulated clients live: in ``workers`` processes here (0: in this one), or in so many actors on Ray.

    On Ray None means: one for each CPU. ``address`` is that of the cluster; None starts one here.
    """

    workers: int | None
    on_ray: bool = False
    address: str | None = None

    def __str__(self) -> str:
        if self.on_ray:
            return f"on Ray at {self.address}" if self.address else "on a Ray of its own"
        return f"× {self.workers} workers" if self.workers else "in this process"


class Composition:
    """The parts of one run. Making it writes nothing: what is wrong is said before there is a run folder."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.data = experiment.data.split(experiment.seed) if isinstance(experiment.data, Dataset) else experiment.data
        self._client = experiment.make_client()
        self._make_model = experiment.make_model(self.data)
        _check_device(experiment.device)
        module = build_module(self._make_model, experiment.seed, experiment.dtype)
        self._net = Net(module, experiment.device)
        self.initial: Parameters[Tensor] = parameters_of(module).map(Tensor.cpu)
        if self.data is not None:
            output = self._outputs(self.data)
            self._check_labels(self.data, output)
            self._check_loss(self.data, output)

    @cached_property
    def shards(self) -> dict[str, float]:
        """How the data lies: sizes of shards and, for class labels, how far their mixes are from the whole's."""
        if not isinstance(self.data, ArrayData):
            return {}  # looking would cost more than the run may
        return survey(self.data).summary()

    def start(self) -> Checkpoint:
        """The value before the first round."""
        return start(self.experiment.strategy, self.experiment.selector, self.initial)

    def check(self, point: Checkpoint) -> None:
        """RunError unless a checkpoint is of this experiment's model and strategy."""
        difference = self.initial.layout.difference(point.layout)
        for name, value in self.initial.frozen.items():
            if difference is None and not torch.equal(value, point.frozen[name]):
                difference = f"frozen tensor {name!r} has other values"
        if difference is not None:
            raise RunError(f"the checkpoint is of another model ({difference}); use the model of that run")
        expected = self.start().state.keys()
        if point.state.keys() != expected:
            raise RunError(
                f"the checkpoint's state has {sorted(point.state)}, the strategy's {sorted(expected)}; "
                f"use the strategy of that run"
            )

    @property
    def assignment(self) -> Assignment:
        """What plays the data's clients."""
        e = self.experiment
        assert self.data is not None, "checked by check_simulation"
        return Assignment(self._make_model, self.data, e.strategy, e.local, e.seed, e.dtype, e.device, self._client)

    def simulated(self, place: Place, method: Method) -> Fleet:
        """The data's clients, played in that place."""
        if not place.on_ray:
            return SimulatedFleet(self.assignment, place.workers or 0, method)
        cluster = partial(Cluster, workers=place.workers, address=place.address)
        return SimulatedFleet(self.assignment, 0, method, engines=cluster)

    def check_engine(self, engine: EngineName) -> None:
        """ExperimentError if this engine cannot play the clients."""
        if engine == "lean" or self.data is None:
            return
        point, some = self.start(), list(self.data.clients[:2])
        context = Context(1, len(self.data.clients), len(some))
        ask = Ask(some, len(some), point.state, point.carried, context, self.experiment.deadline)
        reason = refusal(self.assignment, ask, engine)
        if reason is not None:
            raise ExperimentError(
                f"engine {engine!r} cannot run this experiment: {reason}; use engine 'auto' or 'lean'"
            )

    def coordinator(
        self, fleet: Fleet, point: Checkpoint, callbacks: Sequence[Callback], path: Path | None = None
    ) -> Coordinator:
        """The loop of rounds from ``point`` on."""
        e = self.experiment
        plan = Plan(
            rounds=e.rounds,
            cohort=e.cohort,
            seed=e.seed,
            quorum=e.quorum,
            over_select=e.over_select,
            deadline=e.deadline,
            evaluate_every=e.evaluation.every,
            evaluate_clients_every=e.evaluation.clients_every,
            checkpoint_every=e.checkpoint_every,
        )
        return Coordinator(plan, e.strategy, e.selector, fleet, point, self.evaluation, callbacks, path)

    @property
    def evaluation(self) -> Callable[[Parameters[Tensor]], Mapping[str, float]] | None:
        """The loss and metrics of a model on the data's own test set; None where there is none."""
        if self.data is None or self.data.test is None:
            return None
        shard = Shard(self._as_input(self.data.test.x), self.data.test.y.to(self._net.flat.device))

        def on_test_set(parameters: Parameters[Tensor]) -> Mapping[str, float]:
            self._net.flat.copy_(parameters.trainable)
            self._net.restore(parameters.buffers, parameters.counters)
            return evaluate(self._net, self.experiment.local, shard)

        return on_test_set

    def _as_input(self, x: Tensor) -> Tensor:
        return x.to(self._net.flat.device, self._net.dtype if x.is_floating_point() else x.dtype)

    def check_simulation(self) -> None:
        """ExperimentError unless the data has clients enough to be simulated."""
        experiment = self.experiment
        if self.data is None:
            raise ExperimentError("key 'data' is missing; a simulation needs it, only 'shoal server' can do without")
        clients = self.data.clients
        if experiment.cohort > len(clients):
            raise ExperimentError(
                f"cohort is {experiment.cohort}, but there are only {len(clients)} clients; "
                f"lower cohort or split the data among more clients"
            )
        # A sample is enough: with client_test set, only clients of a single example hold nothing out.
        sample = (self.data.shard(clients[i]) for i in range(min(100, len(clients))))
        if experiment.evaluation.clients_every and all(shard.held_out is None for shard in sample):
            raise ExperimentError(
                "evaluation.clients_every is set, but clients hold no test examples; set data.client_test = 0.2"
            )

    def _outputs(self, data: FederatedData) -> Tensor:
        """One forward pass: a model that does not fit the data is better found here than by every client."""
        x = data.shard(data.clients[0]).x[:2]
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                output = self._net.module.eval()(self._as_input(x))
        except Exception as error:
            embeds = any(isinstance(part, nn.Embedding | nn.EmbeddingBag) for part in self._net.module.modules())
            remedy = "; token ids must stay whole: read the data with dtype = 'int64'" if embeds else ""
            raise ExperimentError(
                f"the model does not accept examples of shape {list(x.shape[1:])}: {error}"
                f"{remedy if x.is_floating_point() else ''}"
            ) from error
        if not isinstance(output, Tensor):
            raise ExperimentError(f"the model returns a {type(output).__name__}; it must return one tensor")
        return output

    def _check_loss(self, data: FederatedData, output: Tensor) -> None:
        """The loss and the metrics of two examples: shapes that do not fit are found here."""
        local = self.experiment.local
        y = data.shard(data.clients[0]).y[:2].to(output.device)
        computed = [("loss", loss_named(local.loss)), *map(metric_named, local.metrics or ())]
        for place, (what, function) in enumerate(computed):
            try:
                shape = list(torch.as_tensor(function(output, y)).shape)
            except Exception as error:
                shapes = f"an output of shape {list(output.shape)} and labels of shape {list(y.shape)}"
                raise ExperimentError(
                    f"{what} cannot be computed from {shapes}: {error}; set local.loss, local.metrics or model.classes"
                ) from error
            if place == 0 and shape not in ([], [1]):
                raise ExperimentError(f"loss gives {shape} for {len(y)} examples; it must give one number, their mean")
            if place and shape != [len(y)]:
                raise ExperimentError(
                    f"metric {what!r} gives {shape} for {len(y)} examples; it must give one number for each"
                )

    def _check_labels(self, data: FederatedData, output: Tensor) -> None:
        if loss_named(self.experiment.local.loss) is not cross_entropy:
            return
        if output.ndim < 2:
            raise ExperimentError(
                f"the model's output has shape {list(output.shape)}, cross-entropy needs [examples, classes]"
            )
        if isinstance(data, ArrayData):
            _check_range(data.y, output.shape[1], "the training data")
        if data.test is not None:
            _check_range(data.test.y, output.shape[1], "the test data")


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise ExperimentError(f"device {device!r} cannot be used ({first}); set device = 'cpu'") from error


def _check_range(y: Tensor, outputs: int, where: str) -> None:
    if y.dtype.is_floating_point:
        raise DataError(f"{where} has labels of {y.dtype}, cross-entropy needs class numbers; set local.loss = 'mse'")
    wrong = ((y < 0) | (y >= outputs)).nonzero()
    if len(wrong):
        row = tuple(wrong[0].tolist())
        raise DataError(
            f"label {int(y[row])} in row {row[0]} of {where} is out of range for a model with {outputs} outputs; "
            f"labels must be 0 to {outputs - 1}: set model.classes or correct the labels"
        )
