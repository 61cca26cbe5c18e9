"""A run that was made: its folder, read as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from shoal.protos.errors import RunError
from shoal.protos.experiment import lower_is_better
from shoal.server.runs import RunFolder
from shoal.simulations.statistics import Fairness

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from torch import Tensor, nn

    from shoal.protos.parameters import Parameters

__all__ = ["Run", "fairness", "summarise"]


class Run:
    """Reads a run folder. Nothing is loaded before it is asked for."""

    def __init__(self, path: str | Path) -> None:
        self._folder = RunFolder.open(Path(path))
        self.path = self._folder.path

    def __repr__(self) -> str:
        numbers = {key: value for key, value in self.summary.get("last", {}).items() if key.startswith("test_")}
        shown = ", ".join(f"{key}={value:.4g}" for key, value in numbers.items())
        return f"<Run {self.path} {self.summary.get('status')}{': ' if shown else ''}{shown}>"

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Status, last and best numbers, targets reached; ``memory_mb`` is the most that the processes held."""
        return self._folder.read("summary.json")

    @property
    def status(self) -> str:
        """``"finished"``, ``"interrupted"``, ``"failed"``, or ``"running"`` (also after a power cut)."""
        return str(self.summary["status"])

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """A row a round, by ``round``; round 0 is the initial model."""
        import pandas as pd

        frame = pd.DataFrame(list(self._folder.lines("metrics.jsonl")))
        return frame.set_index("round") if len(frame) else frame

    @cached_property
    def clients(self) -> pd.DataFrame:
        """A row for each client and round it took part in; ``kind`` is ``"train"`` or ``"evaluate"``."""
        import pandas as pd

        frames = []
        for line in self._folder.lines("clients.jsonl"):
            line.pop("failed", None)
            if line["client"]:
                frames.append(pd.DataFrame(line))
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    @cached_property
    def failures(self) -> pd.DataFrame:
        """A row for each client that failed: ``round``, ``client``, ``reason``."""
        import pandas as pd

        lines = self._folder.lines("clients.jsonl")
        rows = [{"round": line["round"], **failed} for line in lines for failed in line.get("failed", [])]
        return pd.DataFrame(rows, columns=["round", "client", "reason"])

    @cached_property
    def fairness(self) -> pd.DataFrame:
        """How each metric of the last evaluation of clients is spread over them, a row a metric.

        Columns: those of :class:`~shoal.simulations.statistics.Fairness`.
        """
        import pandas as pd

        return pd.DataFrame({name: asdict(found) for name, found in fairness(self._folder).items()}).T

    @cached_property
    def parameters(self) -> Parameters[Tensor]:
        """The global model after the last round kept; ``.named()`` gives the tensors by name."""
        point = self._folder.latest()
        if point is None:
            raise RunError(f"{self.path} holds no checkpoint; the run ended before its first round")
        return point.parameters

    @cached_property
    def best(self) -> Parameters[Tensor]:
        """The global model that :class:`shoal.BestModel` kept."""
        from shoal.server import checkpoints  # PyTorch

        point = checkpoints.latest(self.path / "best")
        if point is None:
            raise RunError(f"{self.path} keeps no best model; run it with callbacks=[shoal.BestModel('test_accuracy')]")
        return point.parameters

    def load_into(self, module: nn.Module) -> nn.Module:
        """Copy the global model into a module of the same architecture, and return it."""
        from shoal.client.net import layout_of, load_parameters

        difference = layout_of(module).difference(self.parameters.layout)
        if difference is not None:
            raise RunError(f"the model of {self.path} does not fit the module: {difference}")
        load_parameters(module, self.parameters)
        return module

    def plot(self, *names: str) -> go.Figure:
        """Metrics over rounds; all test metrics if none is named."""
        import plotly.graph_objects as go

        columns = list(names) or [name for name in self.metrics.columns if name.startswith("test_")]
        figure = go.Figure()
        for name in columns:
            series = self.metrics[name].dropna()
            figure.add_scatter(x=series.index, y=series, name=name, mode="lines+markers")
        figure.update_layout(title=self.path.name, xaxis_title="round", template="simple_white")
        return figure


def summarise(folder: RunFolder, target: Mapping[str, float]) -> dict[str, Any]:
    """Totals, the last and the best round, the mean of the last ten evaluations, and when targets were met."""
    lines = list(folder.lines("metrics.jsonl"))
    rounds = [line for line in lines if line["round"] > 0]
    added = ("seconds", "bytes_up", "bytes_down", "failed")
    totals = {name: sum(line.get(name, 0) for line in rounds) for name in added}
    metrics = dict.fromkeys(name for line in lines for name in line if name.startswith(("test_", "clients_")))
    evaluated = {name: [line for line in lines if line.get(name) is not None] for name in metrics}
    kept = {name: having for name, having in evaluated.items() if having}
    return {
        "rounds": lines[-1]["round"] if lines else 0,
        **totals,
        "last": {name: having[-1][name] for name, having in kept.items()},
        "best": {name: _best(name, having) for name, having in kept.items()},
        "mean_of_last_10": {
            name: _mean(last) for name, having in kept.items() if len(last := _last_ten(name, having)) == 10
        },
        "target": {name: _reached(name, value, rounds) for name, value in target.items()},
    }


def _last_ten(name: str, having: list[dict[str, Any]]) -> list[float]:
    """The last ten evaluations of trained models; fewer if there are no ten."""
    return [line[name] for line in having if line["round"] > 0][-10:]


def _mean(numbers: list[float]) -> float:
    try:
        return fmean(numbers)
    except OverflowError:  # a client may report what it likes
        return math.inf


def _best(name: str, having: list[dict[str, Any]]) -> dict[str, Any]:
    choose = min if lower_is_better(name) else max
    line = choose(having, key=lambda line: line[name])
    return {"value": line[name], "round": line["round"]}


def _reached(name: str, value: float, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The first round at the target, with what was spent by then; ``round`` is None if it was never met."""
    spent = dict.fromkeys(("bytes_up", "bytes_down", "seconds"), 0.0)
    for line in rounds:
        spent = {key: total + line[key] for key, total in spent.items()}
        now = line.get(f"test_{name}")
        if now is not None and (now <= value if lower_is_better(name) else now >= value):
            return {"value": value, "round": line["round"], **spent}
    return {"value": value, "round": None}


def fairness(folder: RunFolder) -> dict[str, Fairness]:
    """How the last evaluation of clients is spread over them, by metric; empty if clients were not evaluated."""
    last, told = -1, dict[str, list[tuple[float, float]]]()
    for line in folder.lines("clients.jsonl"):
        if line["kind"] != "evaluate":
            continue
        if line["round"] != last:
            last, told = line["round"], {}
        examples = [n or 0 for n in line.get("examples", [0] * len(line["client"]))]
        for name in line.keys() - {"round", "kind", "client", "examples"}:
            pairs = zip(line[name], examples, strict=True)
            told.setdefault(name, []).extend((value, n) for value, n in pairs if value is not None)
    return {name: _fairness(name, pairs) for name, pairs in sorted(told.items()) if pairs}


def _fairness(name: str, told: list[tuple[float, float]]) -> Fairness:
    return Fairness.of([value for value, _ in told], [n for _, n in told], lower_is_better(name))
