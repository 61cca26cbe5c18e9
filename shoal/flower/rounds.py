"""The rounds of an app's strategy, watched: progress, metrics and, with the message API, checkpoints.

``Strategy.start`` is replaced while an app runs, by the same loop with two more abilities: it tells what it does, and
it can begin after a round. A strategy with a ``start`` of its own, and the legacy server, keep theirs and are only
watched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.common import parameters_to_ndarrays
from flwr.server.server import Server
from flwr.server.workflow import DefaultWorkflow
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from shoal.flower.ledger import Ledger, numbers_of

__all__ = ["Keeper", "watched"]

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]
log = logging.getLogger("flwr").info


class Keeper(Protocol):
    """What a run has kept, and keeps, of its strategy."""

    def begin(self, strategy: Strategy, arrays: ArrayRecord, rounds: int) -> tuple[int, ArrayRecord, Result]:
        """The round to begin after, its arrays and results; 0 where there is nothing to go on with."""
        ...

    def keep(self, round: int, strategy: Strategy, arrays: ArrayRecord, result: Result) -> None:
        """After each round."""
        ...

    def arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """The global model of an app with a loop of its own, as far as it is known."""
        ...

    def plan(self, rounds: int) -> None:
        """How many rounds there will be."""
        ...

    def refuse(self, why: str) -> None:
        """This app cannot be resumed."""
        ...


@contextmanager
def watched(grid: Grid, ledger: Ledger, keeper: Keeper) -> Iterator[None]:
    """Watch the strategies that use this grid."""
    start, fit, workflow = Strategy.start, Server.fit, DefaultWorkflow.__call__

    def starting(self: Strategy, *args: Any, **kwargs: Any) -> Result:
        if grid not in (*args[:1], kwargs.get("grid")):
            return start(self, *args, **kwargs)
        return _start(ledger, keeper, self, *args, **kwargs)

    order = {str(node): position for position, node in enumerate(grid.get_node_ids())}

    def fitting(self: Server, num_rounds: int, timeout: float | None) -> Any:
        _watch_legacy(self.strategy, ledger, keeper, num_rounds, order)
        return fit(self, num_rounds, timeout)

    def working(self: DefaultWorkflow, grid: Grid, context: Any) -> None:
        _watch_legacy(context.strategy, ledger, keeper, context.config.num_rounds, order)
        workflow(self, grid, context)

    Strategy.start, Server.fit, DefaultWorkflow.__call__ = starting, fitting, working  # type: ignore[method-assign]
    try:
        yield
    finally:
        Strategy.start, Server.fit, DefaultWorkflow.__call__ = start, fit, workflow  # type: ignore[method-assign]


def _start(
    ledger: Ledger,
    keeper: Keeper,
    strategy: Strategy,
    grid: Grid,
    initial_arrays: ArrayRecord,
    num_rounds: int = 3,
    timeout: float = 3600,
    train_config: ConfigRecord | None = None,
    evaluate_config: ConfigRecord | None = None,
    evaluate_fn: Evaluate | None = None,
) -> Result:
    """``Strategy.start`` from a round on; what it does and in which order is flwr's."""
    train_config = ConfigRecord() if train_config is None else train_config
    evaluate_config = ConfigRecord() if evaluate_config is None else evaluate_config
    log("Starting %s strategy: %d rounds", type(strategy).__name__, num_rounds)
    strategy.summary()
    done, arrays, result = keeper.begin(strategy, initial_arrays, num_rounds)
    if done == 0:
        _evaluate(ledger, evaluate_fn, 0, arrays, result)
    for number in range(done + 1, num_rounds + 1):
        log("[ROUND %s/%s]", number, num_rounds)
        asked = strategy.configure_train(number, arrays, train_config, grid)
        trained, metrics = strategy.aggregate_train(number, grid.send_and_receive(messages=asked, timeout=timeout))
        if trained is not None:
            result.arrays = arrays = trained
        if metrics is not None:
            result.train_metrics_clientapp[number] = metrics
        asked = strategy.configure_evaluate(number, arrays, evaluate_config, grid)
        measured = strategy.aggregate_evaluate(number, grid.send_and_receive(messages=asked, timeout=timeout))
        if measured is not None:
            result.evaluate_metrics_clientapp[number] = measured
        ledger.note(numbers_of(metrics, "train_") | numbers_of(measured, "clients_"))
        _evaluate(ledger, evaluate_fn, number, arrays, result)
        ledger.close()
        keeper.keep(number, strategy, arrays, result)
    log("Final results:\n%s", result)
    return result


def _evaluate(ledger: Ledger, evaluate: Evaluate | None, number: int, arrays: ArrayRecord, result: Result) -> None:
    """On the server, where the app does that."""
    if evaluate is None:
        return
    found = evaluate(number, arrays)
    log("round %d, evaluated on the server: %s", number, found)
    if found is None:
        return
    result.evaluate_metrics_serverapp[number] = found
    (ledger.note if number else ledger.initial)(numbers_of(found, "test_"))


def _watch_legacy(strategy: Any, ledger: Ledger, keeper: Keeper, rounds: int, order: Mapping[str, int]) -> None:
    """Tell what a strategy of ``flwr.server.strategy`` works out.

    The legacy server gives it results as threads have ended; here they come in the ``order`` of the nodes, so that
    sums are the same each time.
    """
    keeper.plan(rounds)
    keeper.refuse("the app runs Flower's legacy server, whose loop begins with round 1")
    fit, measure, central = strategy.aggregate_fit, strategy.aggregate_evaluate, strategy.evaluate

    def in_order(results: Any) -> Any:
        return sorted(results, key=lambda result: order.get(result[0].cid, -1))

    def aggregate_fit(server_round: int, results: Any, failures: Any) -> Any:
        parameters, metrics = fit(server_round, in_order(results), failures)
        ledger.note(numbers_of(metrics, "train_"))
        if parameters is not None:
            keeper.arrays(_named(parameters))
        return parameters, metrics

    def aggregate_evaluate(server_round: int, results: Any, failures: Any) -> Any:
        loss, metrics = measure(server_round, in_order(results), failures)
        ledger.note(numbers_of({"loss": loss, **metrics}, "clients_"))
        return loss, metrics

    def evaluate(server_round: int, parameters: Any) -> Any:
        found = central(server_round, parameters)
        if found is not None:
            numbers = numbers_of({"loss": found[0], **found[1]}, "test_")
            (ledger.note if server_round else ledger.initial)(numbers)
        return found

    strategy.aggregate_fit, strategy.aggregate_evaluate, strategy.evaluate = aggregate_fit, aggregate_evaluate, evaluate


def _named(parameters: Any) -> dict[str, np.ndarray]:
    """A legacy model's arrays, which have no names; bytes that are no arrays (XGBoost's trees) as bytes."""
    try:
        arrays = parameters_to_ndarrays(parameters)
    except ValueError:
        arrays = [np.frombuffer(data, dtype=np.uint8) for data in parameters.tensors]
    return {str(i): array for i, array in enumerate(arrays)}
