"""The report of a comparison: one HTML file that holds all it needs, to open from disk, print or send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from shoal.simulations.comparison import Point, Row, headings, on_significance, plus_minus, texts

if TYPE_CHECKING:
    from shoal.comparison import Comparison

__all__ = ["figure", "html"]

# Okabe and Ito (2008): told apart by colour-blind readers. Dashes go on where colours end, and survive grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("solid", "dash", "dot", "dashdot")
AXES = {"round": "round", "megabytes": "megabytes sent in all, to clients and back (mean over seeds)"}
TITLES = {"round": "rounds", "megabytes": "what was sent"}


def html(comparison: Comparison) -> str:
    """The whole page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("shoal").joinpath("report.html.j2").read_text(encoding="utf-8"))
    s, rows = comparison.summary, comparison.rows
    described = {"command": None} | comparison.description
    return template.render(
        **described,
        summary=s,
        problem=comparison.problem,
        metric=s["metric"],
        words=_words(s["metric"]),
        first=rows[0],
        tables=_tables(rows, s["metric"], s["target"]),
        colours=[_style(number)[0] for number in range(len(rows))],
        goals=[f"{name} {value:g}" for name, value in s["target"].items()],
        significance=on_significance(rows[0].seeds),
        figures=_figures(comparison),
        experiment=(comparison.path / "experiment.toml").read_text(encoding="utf-8"),
        environment=comparison.environment(),
        plotly=Markup(get_plotlyjs()),
    )


def _tables(rows: Sequence[Row], metric: str, target: Mapping[str, float]) -> list[list[list[str]]]:
    """The short table, and one with what is left: each is its heading and its lines."""
    name = _words(metric)
    more = ["strategy", f"{name}, mean of last 10", "difference", f"{name}, best", "MB in all", "client failures"]
    return [[headings(metric, target), *map(texts, rows)], [more, *map(_more, rows)]]


def _more(row: Row) -> list[str]:
    ten = plus_minus(row.mean_of_last_10, row.sd_of_last_10)
    of_ten = plus_minus(row.difference_of_last_10, row.difference_of_last_10_sd, "+.4f")
    megabytes = "–" if row.megabytes is None else f"{row.megabytes:.1f}"
    return [row.strategy, ten, of_ten, plus_minus(row.best, None), megabytes, str(row.client_failures)]


def _words(metric: str) -> str:
    return metric.removeprefix("test_").removeprefix("train_").replace("_", " ")


def _figures(comparison: Comparison) -> list[dict[str, Any]]:
    """The plots that have a line, each with its title."""
    s = comparison.summary
    wanted = [(s["metric"], "round"), (s["metric"], "megabytes"), ("test_loss", "round"), ("train_loss", "round")]
    made = []
    for metric, against in dict.fromkeys(wanted):
        where = "of the clients in training" if metric.startswith("train_") else "on the test set"
        title = f"{_words(metric).capitalize()} {where} over {TITLES[against]}"
        goal = s["target"].get(_words(metric)) if metric == s["metric"] else None
        if curves := comparison.curves(metric):
            made.append({"title": title, "plot": _embedded(figure(curves, metric, against, goal))})
    return made


def figure(curves: Mapping[str, Sequence[Point]], metric: str, against: str, target: float | None = None) -> go.Figure:
    """For each arm the mean over seeds, in a band from the lowest to the highest."""
    plot = go.Figure()
    for number, (arm, points) in enumerate(curves.items()):
        (colour, dash), x = _style(number), [getattr(point, against) for point in points]
        shared: dict[str, Any] = {"x": x, "legendgroup": str(number), "name": escape(arm), "mode": "lines"}
        edge: dict[str, Any] = {"line_width": 0, "showlegend": False, "hoverinfo": "skip"}
        plot.add_scatter(y=[point.high for point in points], **edge, **shared)
        plot.add_scatter(y=[point.low for point in points], fill="tonexty", fillcolor=_faint(colour), **edge, **shared)
        plot.add_scatter(y=[point.mean for point in points], line={"color": colour, "dash": dash}, **shared)
    if target is not None:
        grey = {"color": "#767676", "dash": "dot", "width": 1}
        plot.add_hline(y=target, line=grey, annotation_text=f"target {target:g}", annotation_position="top left")
    plot.update_layout(template="simple_white", xaxis_title=AXES[against], yaxis_title=escape(_words(metric)))
    plot.update_yaxes(range=_frame(curves))
    plot.update_layout(margin={"l": 60, "r": 20, "t": 20, "b": 50}, height=380, hovermode="x unified")
    return plot.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})


def _frame(curves: Mapping[str, Sequence[Point]]) -> list[float] | None:
    """The range of values after the first tenth of the rounds, which would press all others together."""
    begins = max((points[-1].round for points in curves.values()), default=0) / 10
    later = [point for points in curves.values() for point in points if point.round >= begins]
    if not later:
        return None
    low, high = min(point.low for point in later), max(point.high for point in later)
    return [low - 0.05 * (high - low), high + 0.05 * (high - low)] if high > low else None


def _style(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"


def _embedded(plot: go.Figure) -> Markup:
    config = {"displaylogo": False, "responsive": True}
    return Markup(plot.to_html(full_html=False, include_plotlyjs=False, config=config))
