"""The figures of a comparison's report, for readers who are colour-blind or print in grey, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go

from shoal.simulations.answer import in_words
from shoal.simulations.comparison import Point, Row

__all__ = ["differences", "distribution", "figure", "style"]

# Okabe and Ito (2008): told apart by colour-blind readers. Dashes go on where colours end, and survive grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("solid", "dash", "dot", "dashdot")
AXES = {"round": "round", "megabytes": "megabytes sent in all, to clients and back (mean over seeds)"}
GREY = {"color": "#767676", "dash": "dot", "width": 1}


def style(number: int) -> tuple[str, str]:
    """Colour and dash of the nth arm."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]


def figure(curves: Mapping[str, Sequence[Point]], metric: str, against: str, target: float | None = None) -> go.Figure:
    """For each arm the mean over seeds, in a band from the lowest to the highest."""
    plot = go.Figure()
    for number, (arm, points) in enumerate(curves.items()):
        (colour, dash), x = style(number), [getattr(point, against) for point in points]
        shared: dict[str, Any] = {"x": x, "legendgroup": str(number), "name": escape(arm), "mode": "lines"}
        edge: dict[str, Any] = {"line_width": 0, "showlegend": False, "hoverinfo": "skip"}
        plot.add_scatter(y=[point.high for point in points], **edge, **shared)
        plot.add_scatter(y=[point.low for point in points], fill="tonexty", fillcolor=_faint(colour), **edge, **shared)
        plot.add_scatter(y=[point.mean for point in points], line={"color": colour, "dash": dash}, **shared)
    if target is not None:
        plot.add_hline(y=target, line=GREY, annotation_text=f"target {target:g}", annotation_position="top left")
    plot.update_yaxes(range=_frame(curves))
    return _laid_out(plot, AXES[against], escape(in_words(metric))).update_layout(hovermode="x unified")


def differences(table: Sequence[Row]) -> go.Figure:
    """Each arm's mean difference from the scenario's first, with its confidence interval (a forest plot)."""
    plot, first, name = go.Figure(), table[0].strategy, in_words(table[0].metric)
    arms = list(dict.fromkeys(row.strategy for row in table))
    shown = [row for row in table if row.difference is not None]
    for row in shown:
        assert row.difference is not None
        bars = None
        if row.difference_low is not None and row.difference_high is not None:
            above, below = row.difference_high - row.difference, row.difference - row.difference_low
            bars = {"type": "data", "symmetric": False, "array": [above], "arrayminus": [below]}
        label = escape(f"{row.strategy} · {row.scenario}" if row.scenario else row.strategy)
        colour = style(arms.index(row.strategy))[0]
        marker = {"color": colour, "size": 9}
        plot.add_scatter(x=[row.difference], y=[label], error_x=bars, mode="markers", marker=marker, showlegend=False)
    plot.add_vline(x=0, line=GREY)
    plot.update_yaxes(autorange="reversed", automargin=True)
    laid_out = _laid_out(plot, escape(f"difference in {name} from {first}: mean over seeds and 95 % CI"), "")
    return laid_out.update_layout(height=110 + 34 * len(shown))


def distribution(values: Mapping[str, Sequence[float]], metric: str) -> go.Figure:
    """For each arm, which share of the clients (of all seeds) lies at or below a value."""
    plot = go.Figure()
    for number, (arm, found) in enumerate(values.items()):
        colour, dash = style(number)
        ranked = sorted(found)
        share = [(place + 1) / len(ranked) for place in range(len(ranked))]
        line = {"color": colour, "dash": dash, "shape": "hv"}
        plot.add_scatter(x=ranked, y=share, name=escape(arm), mode="lines", line=line)
    return _laid_out(plot, escape(f"{in_words(metric)} of a client on its held-out examples"), "share of clients")


def _laid_out(plot: go.Figure, x: str, y: str) -> go.Figure:
    plot.update_layout(template="simple_white", xaxis_title=x, yaxis_title=y)
    plot.update_layout(margin={"l": 60, "r": 20, "t": 20, "b": 50}, height=380)
    return plot.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})


def _frame(curves: Mapping[str, Sequence[Point]]) -> list[float] | None:
    """The range of values after the first tenth of the rounds, which would press all others together."""
    begins = max((points[-1].round for points in curves.values()), default=0) / 10
    later = [point for points in curves.values() for point in points if point.round >= begins]
    if not later:
        return None
    low, high = min(point.low for point in later), max(point.high for point in later)
    return [low - 0.05 * (high - low), high + 0.05 * (high - low)] if high > low else None


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
