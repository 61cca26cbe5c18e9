"""A comparison that was made: its folder, read as tables and curves.

================  =====================================================================================
experiment.toml   what all cells have in common, every default written out; ``shoal compare`` takes it again
comparison.toml   arms, scenarios, seeds, target, engine; the command that repeats the comparison
table.csv         a row for each scenario and arm (:class:`shoal.simulations.comparison.Row`)
table.tex         the short table for a paper
summary.json      status, answer, table, cells
report.html       all of it for a reader, in one file
================  =====================================================================================

The runs lie beside it in ``cells/``, which all comparisons of a folder share: one for each key of
:mod:`shoal.keys`. ``shoal.Run`` reads them.
"""

from __future__ import annotations

import csv
import io
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.protos.errors import ExperimentError, RunError, nearest
from shoal.server.runs import RunFolder
from shoal.simulations.comparison import Point, Row, curve

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

__all__ = ["Comparison", "as_csv"]

CELL = ("scenario", "arm", "seed")


class Comparison:
    """Reads a comparison's folder. Nothing is loaded before it is asked for."""

    def __init__(self, path: str | Path) -> None:
        self._folder = RunFolder.open(Path(path))
        self.path = self._folder.path
        if not (self.path / "comparison.toml").is_file():
            raise RunError(f"{self.path} is no comparison; read it with shoal.Run")

    def __repr__(self) -> str:
        seeds = len({cell["seed"] for cell in self.summary["cells"]})
        arms = dict.fromkeys(cell["arm"] for cell in self.summary["cells"])
        return f"<Comparison {self.path} {self.status}: {', '.join(arms)} × {seeds} seeds>"

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Status, table and cells as they are kept."""
        return self._folder.read("summary.json")

    @cached_property
    def description(self) -> dict[str, Any]:
        """What is compared: arms, scenarios, seeds, target, the setup in words."""
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
        where = f"{failed[0]['arm']!r} with seed {failed[0]['seed']}"
        where += f" and {failed[0]['scenario']}" if failed[0]["scenario"] else ""
        return f"{of}, first {where}: {failed[0]['reason']}"

    @property
    def answer(self) -> str:
        """The main metric's comparison in words, hedged as its statistics demand."""
        return str(self.summary.get("answer", "The comparison goes on."))

    @cached_property
    def rows(self) -> list[Row]:
        """The table's rows, one for each scenario and arm; none while the comparison goes on."""
        return [Row(**row) for row in self.summary.get("table", [])]

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row an arm, by ``strategy`` (by ``scenario`` and ``strategy`` where something is varied).

        The columns are those of :class:`~shoal.simulations.comparison.Row`.
        """
        import pandas as pd

        index = ["scenario", "strategy"] if any(row.scenario for row in self.rows) else "strategy"
        return pd.DataFrame([asdict(row) for row in self.rows]).set_index(index)

    @cached_property
    def cells(self) -> pd.DataFrame:
        """A row a cell: ``scenario, arm, seed, path, status, seconds, reason``, and its last metrics."""
        import pandas as pd

        kept = (*CELL, "path", "status", "seconds", "reason")
        lines = [
            {name: cell.get(name) for name in kept} | {"path": str(self._path(cell))} | cell.get("last", {})
            for cell in self.summary["cells"]
        ]
        return pd.DataFrame(lines)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """All numbers of all cells that finished, tidy: ``scenario, arm, seed, round, metric, value``."""
        import pandas as pd

        values = [
            (*(cell[name] for name in CELL), line["round"], name, value)
            for cell in self._finished()
            for line in self._lines(cell)
            for name, value in line.items()
            if name != "round"
        ]
        return pd.DataFrame(values, columns=[*CELL, "round", "metric", "value"])

    @cached_property
    def clients(self) -> pd.DataFrame:
        """What clients measured, tidy: ``scenario, arm, seed, round, client, examples, metric, value``.

        Empty unless clients were evaluated (``evaluation.clients_every``).
        """
        import pandas as pd

        values = [
            (*(cell[name] for name in CELL), line["round"], client, examples, name, value)
            for cell in self._finished()
            for line in RunFolder(self._path(cell)).lines("clients.jsonl")
            if line["kind"] == "evaluate"
            for name in line.keys() - {"round", "kind", "client", "examples"}
            for client, examples, value in zip(line["client"], line["examples"], line[name], strict=True)
        ]
        return pd.DataFrame(values, columns=[*CELL, "round", "client", "examples", "metric", "value"])

    def export(self, folder: str | Path, form: str = "csv") -> list[Path]:
        """Write table, cells, metrics and clients as ``"csv"`` or ``"parquet"`` (needs pyarrow); the files."""
        known = ("csv", "parquet")
        if form not in known:
            raise ExperimentError(f"there is no form {form!r}{nearest(form, known)}")
        if form == "parquet" and find_spec("pyarrow") is None:
            raise ExperimentError("writing Parquet needs pyarrow: pip install 'shoal[parquet]'")
        frames = {"table": self.table.reset_index(), "cells": self.cells, "metrics": self.metrics}
        frames |= {"clients": self.clients} if len(self.clients) else {}
        paths = {Path(folder) / f"{name}.{form}": frame for name, frame in frames.items()}
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            for path, frame in paths.items():
                frame.to_csv(path, index=False) if form == "csv" else frame.to_parquet(path, index=False)
        except OSError as error:
            raise RunError(f"{str(folder)!r} cannot hold tables ({error.strerror}); give another folder") from error
        return list(paths)

    def curves(self, metric: str, scenario: str = "") -> dict[str, list[Point]]:
        """For each arm, a metric over rounds and megabytes: mean, lowest and highest of the seeds that finished."""
        runs: dict[str, list[list[dict[str, Any]]]] = {cell["arm"]: [] for cell in self.summary["cells"]}
        for cell in self._finished():
            if cell["scenario"] == scenario:
                runs[cell["arm"]].append(self._lines(cell))
        return {arm: points for arm, lines in runs.items() if (points := curve(lines, metric))}

    @property
    def scenarios(self) -> list[str]:
        """What was varied, in order; one without a name if nothing was."""
        return list(dict.fromkeys(cell["scenario"] for cell in self.summary["cells"]))

    def plot(self, metric: str | None = None, against: str = "round", scenario: str | None = None) -> go.Figure:
        """Curves over ``"round"`` or ``"megabytes"``: the mean over seeds, in a band from the lowest to the highest.

        ``scenario`` is needed only where something was varied; without it the first is shown.
        """
        from shoal.report import figure

        metric, known = metric or self.summary["metric"], ("round", "megabytes")
        scenario = self.scenarios[0] if scenario is None else scenario
        if against not in known:
            raise ExperimentError(f"there is no axis {against!r}{nearest(against, known)}")
        if scenario not in self.scenarios:
            raise ExperimentError(f"there is no scenario {scenario!r}{nearest(scenario, self.scenarios)}")
        return figure(self.curves(metric, scenario), metric, against)

    def write_report(self) -> None:
        """Write ``report.html`` anew."""
        from shoal.report import html

        self._folder.write("report.html", html(self))

    def environment(self) -> dict[str, Any]:
        """Versions and machine, as the first cell that began found them."""
        for cell in self.summary["cells"]:
            if (self._path(cell) / "env.json").is_file():
                return RunFolder(self._path(cell)).read("env.json")
        return {}

    def _finished(self) -> list[Mapping[str, Any]]:
        return [cell for cell in self.summary["cells"] if cell["status"] == "finished"]

    def _lines(self, cell: Mapping[str, Any]) -> list[dict[str, Any]]:
        return list(RunFolder(self._path(cell)).lines("metrics.jsonl"))

    def _path(self, cell: Mapping[str, Any]) -> Path:
        """Where its run is."""
        return Path(os.path.normpath(self.path / cell["path"]))


def as_csv(table: Sequence[Row]) -> str:
    """The table as text, with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in table)
    return text.getvalue()
