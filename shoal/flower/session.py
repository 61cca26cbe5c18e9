"""What becomes of one app's run: its point, kept from time to time, and what is written when it ends."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result, Strategy

from shoal.flower.grid import Nodes
from shoal.flower.keep import Kept, Unkeepable, attributes, read, restore, write, write_arrays
from shoal.progress import Display
from shoal.protos.errors import RunError
from shoal.server.runs import RunFolder

__all__ = ["EVERY", "POINT", "Session", "random_states", "restore_random"]

POINT = "point.safetensors"  # in the run folder
EVERY = 10  # rounds between two points; the last whole round is kept too, however a run ends
METRICS = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")


class Session:
    """Keeps an app's rounds; see :class:`~shoal.flower.rounds.Keeper`.

    There are ``every`` rounds between two points. ``no_resume`` says why the run cannot be resumed, if so.
    """

    def __init__(
        self, folder: RunFolder, nodes: Nodes, show: Display, point: dict[str, Any] | None, every: int = EVERY
    ) -> None:
        self._every = every
        self._folder, self._nodes, self._show, self._point = folder, nodes, show, point
        self._last: Kept | None = None
        self._results = dict[str, dict[int, MetricRecord]]()  # they grow with the rounds, and do not change
        self._begun = False
        self._model = dict[str, Any]()
        self.round = self._written = 0 if point is None else int(point["round"])  # the last whole round
        self.no_resume = "the app's server has a loop of its own, not Strategy.start of Flower's message API"
        self._of_nodes = dict[int, Kept]()  # as they were at the last point
        self._since = dict[int, tuple[int, RecordDict]]()  # those that have had turns since, after the last whole round
        if point is not None:
            for name, (turns, state) in point["nodes"].items():
                nodes[name].turns, nodes[name].context.state = turns, state
                nodes.changed.add(name)

    def begin(self, strategy: Strategy, arrays: ArrayRecord, rounds: int) -> tuple[int, ArrayRecord, Result]:
        self._show.expecting(rounds)
        self.no_resume = "the app runs one strategy after another" if self._begun else ""
        point, self._point, self._begun = self._point, None, True
        result = Result()
        if point is None:
            return 0, arrays, result
        if point["strategy"] != type(strategy).__name__:
            raise RunError(f"the run's strategy was {point['strategy']}, the app's is now {type(strategy).__name__}")
        restore(strategy, point["attributes"])
        for name in METRICS:
            getattr(result, name).update(point[name])
        result.arrays = point["arrays"]
        restore_random(point["random"])
        self._folder.log("resumed", round=point["round"])
        return int(point["round"]), point["arrays"], result

    def keep(self, round: int, strategy: Strategy, arrays: ArrayRecord, result: Result) -> None:
        self.round, self._model = round, dict(arrays)
        point = {
            "round": round,
            "strategy": type(strategy).__name__,
            "attributes": attributes(strategy),
            "arrays": arrays,
            "random": random_states(),
        }
        try:
            self._last, self._results = Kept.of(point), {name: dict(getattr(result, name)) for name in METRICS}
            self._keep_nodes()
        except Unkeepable as error:
            self._cannot_keep(error)
        if round % self._every == 0:
            self._write()

    def _cannot_keep(self, error: Unkeepable) -> None:
        self.no_resume = f"its strategy keeps what Shoal cannot write down: {error}"

    def _keep_nodes(self) -> None:
        """Those that had a turn in the round: there may be many others. Each turn leaves a state of its own."""
        changed, self._nodes.changed = self._nodes.changed, set()
        for name in changed:
            node = self._nodes[name]
            self._since[name] = node.turns, node.context.state

    def arrays(self, arrays: dict[str, np.ndarray]) -> None:
        self._model = arrays

    def plan(self, rounds: int) -> None:
        self._show.expecting(rounds)

    def refuse(self, why: str) -> None:
        self.no_resume = why

    def end(self) -> None:
        """Write the last whole round, and the model where it is known."""
        self._write()
        if self._model:
            arrays = {name: a if isinstance(a, np.ndarray) else a.numpy() for name, a in self._model.items()}
            write_arrays(self._folder.path / "arrays.safetensors", arrays)

    def _write(self) -> None:
        if self._last is None or self.no_resume or self.round == self._written:
            return
        try:
            results = Kept.of(self._results, "results/")
        except Unkeepable as error:
            self._cannot_keep(error)
            return
        since, self._since = self._since, {}
        self._of_nodes |= {name: Kept.of(list(node), f"{name}/") for name, node in since.items()}
        write(self._folder.path / POINT, self._last, results, self._of_nodes)
        self._written = self.round


def random_states() -> dict[str, Any]:
    """Of the global generators that an app's server may draw from."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    torch = sys.modules.get("torch")
    return {
        "python": [version, np.array(internal, np.uint32), gauss],
        "numpy": [kind, keys, *rest],
        "torch": None if torch is None else torch.get_rng_state().numpy(),
    }


def restore_random(kept: dict[str, Any]) -> None:
    """The inverse of :func:`random_states`."""
    version, internal, gauss = kept["python"]
    random.setstate((version, tuple(np.asarray(internal).tolist()), gauss))
    np.random.set_state(tuple(kept["numpy"]))
    if kept["torch"] is not None:
        import torch  # the app had it at that point

        torch.set_rng_state(torch.from_numpy(kept["torch"]))


def read_point(path: Path) -> dict[str, Any] | None:
    """The point that a run has kept; None if there is none."""
    return read(path / POINT) if (path / POINT).exists() else None
