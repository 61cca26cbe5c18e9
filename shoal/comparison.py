"""A comparison that was made: its folder, read as tables and curves.

================  =====================================================================================
experiment.toml   what all cells have in common, every default written out; ``shoal compare`` takes it again
comparison.toml   arms, seeds, target, engine; the command that repeats the comparison
cells/            a run folder for each arm and seed, which ``shoal.Run`` reads
table.csv         a row an arm (:class:`shoal.simulations.comparison.Row`)
summary.json      status, table, cells
report.html       all of it for a reader, in one file
================  =====================================================================================
"""

from __future__ import annotations

import csv
import io
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.protos.errors import ExperimentError, RunError, nearest
from shoal.server.runs import RunFolder
from shoal.simulations.comparison import Point, Row, curve

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["Comparison", "as_csv"]


class Comparison:
    """Reads a comparison's folder. Nothing is loaded before it is asked for."""

    def __init__(self, path: str | Path) -> None:
        self._folder = RunFolder.open(Path(path))
        self.path = self._folder.path
        if not (self.path / "comparison.toml").is_file():
            raise RunError(f"{self.path} is no comparison; read it with shoal.Run")

    def __repr__(self) -> str:
        seeds = len({cell["seed"] for cell in self.summary["cells"]})
        return f"<Comparison {self.path} {self.status}: {', '.join(row.strategy for row in self.rows)} × {seeds} seeds>"

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Status, table and cells as they are kept."""
        return self._folder.read("summary.json")

    @cached_property
    def description(self) -> dict[str, Any]:
        """What is compared: arms, seeds, target, the setup in words."""
        text = (self.path / "comparison.toml").read_text(encoding="utf-8")
        return dict(tomllib.loads(text)["comparison"])

    @property
    def status(self) -> str:
        """``"finished"``, ``"failed"`` if a cell has, ``"interrupted"``, or ``"running"``."""
        return str(self.summary["status"])

    @property
    def problem(self) -> str:
        """What failed, in one sentence; empty if nothing did."""
        failed = [cell for cell in self.summary["cells"] if cell["status"] == "failed"]
        if not failed:
            return ""
        of = f"{len(failed)} of {len(self.summary['cells'])} cells failed"
        return f"{of}, first {failed[0]['arm']!r} with seed {failed[0]['seed']}: {failed[0]['reason']}"

    @cached_property
    def rows(self) -> list[Row]:
        """The table's rows, an arm each."""
        return [Row(**row) for row in self.summary["table"]]

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row an arm, by ``strategy``; the columns are those of :class:`~shoal.simulations.comparison.Row`."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows]).set_index("strategy")

    @cached_property
    def cells(self) -> pd.DataFrame:
        """A row a cell: ``arm``, ``seed``, ``path``, ``status``, ``seconds``, ``reason``, and its last metrics."""
        import pandas as pd

        kept = ("arm", "seed", "path", "status", "seconds", "reason")
        lines = [
            {name: cell.get(name) for name in kept} | {"path": str(self.path / cell["path"])} | cell.get("last", {})
            for cell in self.summary["cells"]
        ]
        return pd.DataFrame(lines)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """All numbers of all cells that finished, long: ``arm``, ``seed``, ``round``, ``metric``, ``value``."""
        import pandas as pd

        values = [
            (cell["arm"], cell["seed"], line["round"], name, value)
            for cell in self._finished()
            for line in self._lines(cell)
            for name, value in line.items()
            if name != "round"
        ]
        return pd.DataFrame(values, columns=["arm", "seed", "round", "metric", "value"])

    def curves(self, metric: str) -> dict[str, list[Point]]:
        """For each arm, a metric over rounds and megabytes: mean, lowest and highest of the seeds that finished."""
        runs: dict[str, list[list[dict[str, Any]]]] = {row.strategy: [] for row in self.rows}
        for cell in self._finished():
            runs[cell["arm"]].append(self._lines(cell))
        return {arm: points for arm, lines in runs.items() if (points := curve(lines, metric))}

    def plot(self, metric: str | None = None, against: str = "round") -> go.Figure:
        """Curves over ``"round"`` or ``"megabytes"``: the mean over seeds, in a band from the lowest to the highest."""
        from shoal.report import figure

        metric, known = metric or self.summary["metric"], ("round", "megabytes")
        if against not in known:
            raise ExperimentError(f"there is no axis {against!r}{nearest(against, known)}")
        return figure(self.curves(metric), metric, against)

    def write_report(self) -> None:
        """Write ``report.html`` anew."""
        from shoal.report import html

        self._folder.write("report.html", html(self))

    def environment(self) -> dict[str, Any]:
        """Versions and machine, as the first cell that began found them."""
        for cell in self.summary["cells"]:
            if (self.path / cell["path"] / "env.json").is_file():
                return RunFolder(self.path / cell["path"]).read("env.json")
        return {}

    def _finished(self) -> list[Mapping[str, Any]]:
        return [cell for cell in self.summary["cells"] if cell["status"] == "finished"]

    def _lines(self, cell: Mapping[str, Any]) -> list[dict[str, Any]]:
        return list(RunFolder(self.path / cell["path"]).lines("metrics.jsonl"))


def as_csv(table: Sequence[Row]) -> str:
    """The table as text, with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in table)
    return text.getvalue()
