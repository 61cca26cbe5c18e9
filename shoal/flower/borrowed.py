"""Flower's strategies inside Shoal: an experiment whose rounds one of them runs, of the message API or an old one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.client import mod as legacy_mods
from flwr.clientapp import ClientApp
from flwr.clientapp import mod as mods
from flwr.common import Context, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import Strategy as LegacyStrategy
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from shoal.client.process import cores
from shoal.compose import Composition
from shoal.experiment import Experiment
from shoal.flower.member import Member, client_app, legacy_client_app
from shoal.flower.running import Play, played
from shoal.flower.vectors import joined, record, tensors
from shoal.protos.errors import ExperimentError
from shoal.protos.parameters import Parameters
from shoal.run import Run
from shoal.strategies.base import Strategy as Own
from shoal.strategies.fedavg import FedAvg

__all__ = ["simulate"]


def simulate(
    experiment: Experiment,
    strategy: Strategy | LegacyStrategy,
    *,
    workers: int | None = None,
    out: str | Path = "runs",
    progress: str = "auto",
) -> Run:
    """Run an experiment with a strategy of Flower's, ``flwr.serverapp.strategy`` or ``flwr.server.strategy``.

    Clients, model, local training, seed and rounds are the experiment's; the strategy chooses cohorts itself
    (``fraction_train``), sends, sums and evaluates in its own way, so ``cohort``, ``selector`` and ``quorum`` do not
    apply. Its FedProx and its client-side clipping ask clients to do something: they do it. The run has a folder as any
    other, with the experiment's evaluation on its test set.
    """
    if not isinstance(experiment, Experiment):
        raise ExperimentError(f"{experiment!r} is no experiment; shoal.Experiment.from_file(PATH) reads one")
    if not isinstance(strategy, Strategy | LegacyStrategy):
        raise ExperimentError(_no_strategy(strategy))
    if not isinstance(experiment.strategy, FedAvg):
        raise ExperimentError("the strategy is Flower's here; leave the experiment's own at FedAvg")
    composition = Composition(experiment)
    composition.check_simulation()
    app = ExperimentApp(experiment.name, experiment, strategy, composition)
    assert composition.data is not None
    play = Play(app, len(composition.data.clients), experiment.seed, cores() if workers is None else workers)
    return played(play, Path(out), progress)


def _no_strategy(given: object) -> str:
    """What is wrong with something that is no strategy of Flower's."""
    if isinstance(given, type):
        return f"{given.__name__} is a class; give an object: {given.__name__}(…)"
    wrong = f"{type(given).__name__} is no strategy of Flower's"
    if isinstance(given, Own):
        return f"{wrong}, it is Shoal's; give it to the experiment, and call experiment.simulate()"
    return wrong


@dataclass(frozen=True)
class ExperimentApp:
    """An experiment and a strategy of Flower's, as an app."""

    name: str
    experiment: Experiment
    strategy: Strategy | LegacyStrategy
    composition: Composition | None
    version: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    hash: str = ""
    no_resume = "it was made from Python objects"

    def __getstate__(self) -> dict[str, Any]:
        """For workers, which need what the clients do and no more."""
        return {**vars(self), "composition": None, "strategy": None, "_client": self.client_app()}

    def describe(self) -> dict[str, Any]:
        return {"strategy": type(self.strategy).__qualname__, "rounds": self.experiment.rounds}

    @contextmanager
    def importable(self) -> Iterator[None]:
        yield

    def client_app(self) -> ClientApp:
        if "_client" in vars(self):
            return vars(self)["_client"]  # type: ignore[no-any-return]
        legacy = isinstance(self.strategy, LegacyStrategy)
        make, known = (legacy_client_app, legacy_mods) if legacy else (client_app, mods)
        return make(self.experiment, mods=[known.__dict__[name] for name in _asked_of_clients(self.strategy)])

    def server_app(self) -> ServerApp:
        self._leave_out_evaluation()
        if isinstance(self.strategy, LegacyStrategy):
            return ServerApp(server_fn=self._legacy)
        app = ServerApp()
        app.main()(self._main)
        return app

    def _main(self, grid: Grid, context: Context) -> None:
        assert isinstance(self.strategy, Strategy) and self.composition is not None
        initial = record(self.composition.initial.named())
        evaluate = None if self._test is None else self._evaluate
        self.strategy.start(grid=grid, initial_arrays=initial, num_rounds=self.experiment.rounds, evaluate_fn=evaluate)

    def _legacy(self, context: Context) -> ServerAppComponents:
        assert self.composition is not None
        strategy: Any = self.strategy
        if getattr(strategy, "initial_parameters", None) is None:
            initial = [tensor.numpy() for tensor in self.composition.initial.named().values()]
            strategy.initialize_parameters = lambda client_manager: ndarrays_to_parameters(initial)
        given = strategy.evaluate

        def evaluate(server_round: int, parameters: Any) -> Any:
            found = given(server_round, parameters)
            if found is not None or self._test is None or server_round % self.experiment.evaluation.every:
                return found
            names = self.composition.initial.named()  # type: ignore[union-attr]
            arrays = ArrayRecord(parameters_to_ndarrays(parameters)).values()
            numbers = dict(self._measured(ArrayRecord(dict(zip(names, arrays, strict=True)))))
            return numbers.pop("loss"), numbers

        strategy.evaluate = evaluate
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=self.experiment.rounds))

    @property
    def _test(self) -> Any:
        assert self.composition is not None
        return self.composition.evaluation if self.experiment.evaluation.every else None

    def _measured(self, arrays: ArrayRecord) -> dict[str, float]:
        assert self.composition is not None
        found: Parameters[Tensor] = joined(self.composition.initial.layout, tensors(arrays))
        return {name: value for name, value in self._test(found).items() if name != "examples"}

    def _evaluate(self, number: int, arrays: ArrayRecord) -> MetricRecord | None:
        due = number % self.experiment.evaluation.every == 0 or number == self.experiment.rounds
        return MetricRecord(dict(self._measured(arrays))) if due else None

    def _leave_out_evaluation(self) -> None:
        """Clients without examples of their own to test on are not asked."""
        data = Member(self.experiment).data if self.composition is None else self.composition.data
        assert data is not None
        if data.shard(data.clients[0]).held_out is None:
            strategy: Any = self.strategy
            strategy.configure_evaluate = lambda *args, **kwargs: []


def _asked_of_clients(strategy: Any) -> list[str]:
    """The mods that a strategy counts on."""
    for kind in type(strategy).__mro__:
        if kind.__name__ == "DifferentialPrivacyClientSideFixedClipping":
            return ["fixedclipping_mod"]
        if kind.__name__ == "DifferentialPrivacyClientSideAdaptiveClipping":
            return ["adaptiveclipping_mod"]
    return []
