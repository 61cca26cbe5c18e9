"""A strategy that wants more nodes than there are would wait for ever: here that ends the run, and says why."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flwr.server.client_manager import SimpleClientManager
from flwr.serverapp.strategy import strategy_utils

from shoal.protos.errors import RunError

__all__ = ["enough"]

_sampling: Any = strategy_utils
_Manager: Any = SimpleClientManager


@contextmanager
def enough(nodes: int) -> Iterator[None]:
    """While the server of an app with so many nodes runs. All are there from the beginning, and no more will come."""
    sleep, wait = _sampling.sleep, _Manager.wait_for
    there = f"{nodes} node{'s' if nodes != 1 else ''}"

    def waiting(seconds: float) -> None:  # flwr sleeps there between two looks at how many nodes there are
        raise RunError(
            f"the strategy wants more than the {there} of this run; give it more (--nodes), or lower its "
            f"min_available_nodes, min_train_nodes and min_evaluate_nodes"
        )

    def wait_for(self: Any, num_clients: int, timeout: int = 86400) -> bool:
        if num_clients > nodes:
            raise RunError(
                f"the strategy wants {num_clients} clients, and this run has {there}; give it more (--nodes), or lower "
                f"its min_available_clients, min_fit_clients and min_evaluate_clients"
            )
        return bool(wait(self, num_clients, timeout))

    _sampling.sleep, _Manager.wait_for = waiting, wait_for
    try:
        yield
    finally:
        _sampling.sleep, _Manager.wait_for = sleep, wait
