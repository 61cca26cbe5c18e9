"""``shoal data --html``: how data lies among clients as one page that holds all it needs."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from shoal.overview import Overview

__all__ = ["page"]

BLUE = "#0072B2"


def page(overview: Overview) -> str:
    """The whole page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("shoal").joinpath("overview.html.j2").read_text(encoding="utf-8"))
    heading, *sentences = overview.sentences()
    facts = [sentence.strip().split(maxsplit=1) for sentence in sentences]
    script = Markup(get_plotlyjs())
    return template.render(heading=heading, facts=facts, figures=_figures(overview), plotly=script)


def _figures(o: Overview) -> list[dict[str, Any]]:
    s, clients = o.survey, list(o.survey.clients)
    sizes = go.Figure(go.Histogram(x=s.sizes.tolist(), marker_color=BLUE))
    made = [_figure("Examples a client trains on", sizes, "examples", "clients")]
    if s.counts is None or s.divergences is None:
        return made
    shares = (s.counts / s.counts.sum(1, keepdims=True)).T.round(4).tolist()
    hover = "client %{x}<br>label %{y}<br>%{z:.1%} of its examples<extra></extra>"
    drawn = go.Heatmap(z=shares, x=clients, y=list(o.labels), colorscale="Blues", zmin=0, zmax=1, hovertemplate=hover)
    map_ = go.Figure(drawn).update_xaxes(type="category").update_yaxes(type="category", autorange="reversed")
    made.append(_figure("Labels of each client, as shares of its examples", map_, "client", "label"))
    apart = go.Figure(go.Histogram(x=s.divergences.round(5).tolist(), marker_color=BLUE)).update_xaxes(range=[0, 1])
    made.append(_figure("How far clients' mixes are from the whole's", apart, "Jensen-Shannon divergence", "clients"))
    if s.test_counts is not None:
        bars = go.Figure(go.Bar(x=list(o.labels), y=s.test_counts.tolist(), marker_color=BLUE))
        made.append(_figure("The server's test set", bars.update_xaxes(type="category"), "label", "examples"))
    return made


def _figure(title: str, plot: go.Figure, x: str, y: str) -> dict[str, Any]:
    plot.update_layout(template="simple_white", xaxis_title=x, yaxis_title=y, height=380, bargap=0.05)
    plot.update_layout(margin={"l": 60, "r": 20, "t": 20, "b": 50})
    config = {"displaylogo": False, "responsive": True}
    return {"title": title, "plot": Markup(plot.to_html(full_html=False, include_plotlyjs=False, config=config))}
