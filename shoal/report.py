"""The report of a comparison: one HTML file that holds all it needs, to open from disk, print or send."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from shoal.figures import differences, distribution, figure, style
from shoal.simulations.answer import in_words, on_significance, short_table, with_interval
from shoal.simulations.comparison import Row

if TYPE_CHECKING:
    from shoal.comparison import Comparison

__all__ = ["figure", "html"]

NOT_REACHED = "not reached"
TITLES = {"round": "rounds", "megabytes": "what was sent"}


def html(comparison: Comparison) -> str:
    """The whole page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("shoal").joinpath("report.html.j2").read_text(encoding="utf-8"))
    s, rows = comparison.summary, comparison.rows
    arms = list(dict.fromkeys(row.strategy for row in rows))
    described = {"command": None} | comparison.description
    return template.render(
        **described,
        summary=s,
        problem=comparison.problem,
        metric=s["metric"],
        words=in_words(s["metric"]),
        first=rows[0],
        answer=comparison.answer,
        tables=_tables(rows),
        colours=[style(arms.index(row.strategy))[0] for row in rows],
        goals=[f"{name} {value:g}" for name, value in s["target"].items()],
        significance=on_significance(rows),
        has_clients=any(row.clients_mean is not None for row in rows),
        figures=list(_figures(comparison)),
        experiment=(comparison.path / "experiment.toml").read_text(encoding="utf-8"),
        environment=comparison.environment(),
        plotly=Markup(get_plotlyjs()),
    )


# --- tables ----------------------------------------------------------------------------------------------------------


def _tables(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The short table and those with what is left: title, headings, lines."""
    short, name = short_table(rows), in_words(rows[0].metric)
    wanted: list[tuple[str, list[str], Callable[[Row], list[str]]]] = [
        (
            "The same by other measures",
            [f"{name}, mean of last 10", f"minus {rows[0].strategy}", f"{name}, best", "MB in all", "client failures"],
            _other_measures,
        )
    ]
    if rows[0].target is not None:
        columns = ["reached", "rounds", "median rounds", "MB", "median MB", "seconds", "median seconds"]
        wanted.append((f"What it took to {name} {rows[0].target:g}", columns, _until_target))
    if any(row.clients_mean is not None for row in rows):
        columns = ["mean over clients", "weighted by examples", "variance", "worst 10 %", "best 10 %"]
        wanted.append((f"{name.capitalize()} of clients, each on its own held-out examples", columns, _over_clients))
    named = 1 + any(row.scenario for row in rows)
    more = [
        {"title": title, "head": [*short[0][:named], *head], "lines": [[*_names(row, named), *of(row)] for row in rows]}
        for title, head, of in wanted
    ]
    return [{"title": "", "head": short[0], "lines": short[1:]}, *more]


def _names(row: Row, named: int) -> list[str]:
    return [row.scenario, row.strategy][-named:]


def _other_measures(row: Row) -> list[str]:
    ten = with_interval(row.mean_of_last_10, row.low_of_last_10, row.high_of_last_10)
    low, high = row.difference_of_last_10_low, row.difference_of_last_10_high
    difference = with_interval(row.difference_of_last_10, low, high, "+.4f")
    return [ten, difference, _plain(row.best), _amount(row.megabytes), str(row.client_failures)]


def _until_target(row: Row) -> list[str]:
    least = "" if row.reached == row.finished else "≥ "
    rounds = with_interval(row.rounds_to_target, row.rounds_to_target_low, row.rounds_to_target_high, ".1f")
    cells = [f"{row.reached}/{row.finished}", f"{least}{rounds}", _amount(row.rounds_to_target_median, NOT_REACHED)]
    cells += [f"{least}{_amount(row.megabytes_to_target)}", _amount(row.megabytes_to_target_median, NOT_REACHED)]
    return [*cells, f"{least}{_amount(row.seconds_to_target)}", _amount(row.seconds_to_target_median, NOT_REACHED)]


def _over_clients(row: Row) -> list[str]:
    worst = with_interval(row.clients_worst_10, row.clients_worst_10_low, row.clients_worst_10_high)
    means = [_plain(row.clients_mean), _plain(row.clients_weighted), _plain(row.clients_variance, ".5f")]
    return [*means, worst, _plain(row.clients_best_10)]


def _plain(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else f"{value:{form}}"


def _amount(value: float | None, none: str = "–") -> str:
    """With one decimal, small ones with three digits that count."""
    return none if value is None else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


# --- figures ---------------------------------------------------------------------------------------------------------


def _figures(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """The plots that have a line, each with its title."""
    s, rows = comparison.summary, comparison.rows
    if any(row.difference is not None for row in rows):
        yield _shown(f"Differences from {rows[0].strategy}", differences(rows))
    wanted = [(s["metric"], "round"), (s["metric"], "megabytes"), ("test_loss", "round"), ("train_loss", "round")]
    for metric, against in dict.fromkeys(wanted):
        where = "of the clients in training" if metric.startswith("train_") else "on the test set"
        goal = s["target"].get(in_words(metric)) if metric == s["metric"] else None
        for scenario in comparison.scenarios:
            title = f"{in_words(metric).capitalize()} {where} over {TITLES[against]}"
            if curves := comparison.curves(metric, scenario):
                yield _shown(_in(scenario, title), figure(curves, metric, against, goal))
    yield from _spreads(comparison)


def _spreads(comparison: Comparison) -> Iterator[dict[str, Any]]:
    metric, frame = in_words(comparison.summary["metric"]).replace(" ", "_"), comparison.clients
    frame = frame[frame["metric"] == metric]
    for scenario in comparison.scenarios:
        here = frame[frame["scenario"] == scenario]
        last = here[here["round"] == here.groupby(["arm", "seed"])["round"].transform("max")]
        arms = dict.fromkeys(cell["arm"] for cell in comparison.summary["cells"])
        values = {arm: last.loc[last["arm"] == arm, "value"].dropna().tolist() for arm in arms}
        if any(values.values()):
            title = f"{in_words(metric).capitalize()} of clients at the end: how it is spread"
            yield _shown(_in(scenario, title), distribution(values, metric))


def _in(scenario: str, title: str) -> str:
    return f"{title}, {scenario}" if scenario else title


def _shown(title: str, plot: go.Figure) -> dict[str, Any]:
    config = {"displaylogo": False, "responsive": True}
    return {"title": title, "plot": Markup(plot.to_html(full_html=False, include_plotlyjs=False, config=config))}
