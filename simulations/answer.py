"""A comparison in words: its short table, and an answer that says no more than the statistics do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from shoal.protos.experiment import lower_is_better
from shoal.simulations.comparison import Row
from shoal.simulations.statistics import ALPHA, smallest_p

__all__ = ["answer", "in_words", "latex", "on_significance", "short_table", "with_interval"]


def in_words(metric: str) -> str:
    return metric.removeprefix("test_").removeprefix("train_").removeprefix("clients_").replace("_", " ")


def with_interval(mean: float | None, low: float | None, high: float | None, form: str = ".4f") -> str:
    """``0.7500 [0.7312, 0.7688]``; without an interval for a single value, a dash for none."""
    if mean is None:
        return "–"
    return f"{mean:{form}}" if low is None else f"{mean:{form}} [{low:{form}}, {high:{form}}]"


# --- the short table -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    heading: str
    text: Callable[[Row], str]


def short_table(table: Sequence[Row]) -> list[list[str]]:
    """Headings, then a line a row; columns that would be empty are left out, what is missing in a line is said."""
    columns = _columns(table)
    return [[c.heading for c in columns], *([c.text(row) for c in columns] for row in table)]


def _columns(table: Sequence[Row]) -> list[_Column]:
    first = table[0]
    columns = [
        _Column("strategy", lambda row: row.strategy),
        _Column(in_words(first.metric), _value),
        _Column(f"minus {first.strategy}", _difference),
    ]
    if any(row.scenario for row in table):
        columns.insert(0, _Column("scenario", lambda row: row.scenario))
    if any(row.p is not None for row in table):
        columns.append(_Column("p (Holm)", lambda row: _p(row.p_holm)))
    if first.target is not None:
        columns += [_Column(f"rounds to {first.target:g}", _rounds), _Column(f"MB to {first.target:g}", _megabytes)]
    if any(row.clients_worst_10 is not None for row in table):
        columns.append(_Column("worst 10 % of clients", lambda row: with_interval(row.clients_worst_10, None, None)))
    return columns


def _value(row: Row) -> str:
    missing = "" if row.finished == row.seeds else f" ({row.finished}/{row.seeds} seeds)"
    return with_interval(row.mean, row.low, row.high) + missing


def _difference(row: Row) -> str:
    return with_interval(row.difference, row.difference_low, row.difference_high, "+.4f")


def _p(p: float | None) -> str:
    return "–" if p is None else f"{p:.2g}"


def _rounds(row: Row) -> str:
    reached = f"({row.reached}/{row.finished})"
    if not row.reached:
        return f"not reached {reached}"
    least = "" if row.reached == row.finished else "≥ "
    return f"{least}{row.rounds_to_target:.1f} {reached}"


def _megabytes(row: Row) -> str:
    if not row.reached:
        return "not reached"
    least = "" if row.reached == row.finished else "≥ "
    return f"{least}{row.megabytes_to_target:.1f}"


def latex(table: Sequence[Row]) -> str:
    """The short table for a paper (booktabs); an asterisk marks what is significant after Holm's correction."""
    head, *lines = ([_tex(cell) for cell in line] for line in short_table(table))
    for row, line in zip(table, lines, strict=True):
        if _significant(row):
            place = next(i for i, name in enumerate(head) if name.startswith("minus"))
            line[place] += "$^{*}$"
    body = "\n".join(" & ".join(line) + r" \\" for line in [head, *lines])
    heading, _, rest = body.partition("\n")
    sides = "".join("l" if name in ("scenario", "strategy") else "r" for name in head)
    return (
        f"% {on_significance(table)}\n% Brackets: 95 % confidence intervals over seeds.\n"
        f"\\begin{{tabular}}{{{sides}}}\n"
        f"\\toprule\n{heading}\n\\midrule\n{rest}\n\\bottomrule\n\\end{{tabular}}\n"
    )


def _tex(text: str) -> str:
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "–": "--",
        "≥": r"$\ge$",
    }
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


# --- the answer ------------------------------------------------------------------------------------------------------


def on_significance(table: Sequence[Row]) -> str:
    """Which test was made, or why none was and how many seeds would do."""
    m, n, needed = table[0].comparisons, table[0].seeds, table[0].seeds_needed
    if not m:
        return "One strategy alone: nothing is tested."
    over = f"Holm's correction over {_count(m, 'comparison')}"
    if n < needed:
        return (
            f"No p-values: with {_count(n, 'seed')} a two-sided paired sign-flip test cannot give less than 2/2^{n} = "
            f"{smallest_p(n):.2g}, with {over} {min(1.0, m * smallest_p(n)):.2g}; {needed} seeds would do."
        )
    least = f"the smallest there can be with {n} seeds is {m * smallest_p(n):.2g}"
    return f"p: two-sided paired sign-flip test of the last evaluation, {over}; {least}."


def answer(table: Sequence[Row]) -> str:
    """What may be said of the main metric: a sentence a scenario, and one on what is not known."""
    scenarios = [list(group) for _, group in groupby(table, key=lambda row: row.scenario)]
    found = [f"{_where(rows[0])}{_finding(rows)}." for rows in scenarios]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in [*found, _caveat(table)])


def _where(row: Row) -> str:
    return f"with {row.scenario}, " if row.scenario else ""


def _finding(table: Sequence[Row]) -> str:
    """The strongest thing that the scenario's rows support."""
    first, name = table[0], in_words(table[0].metric)
    having = [row for row in table if row.mean is not None]
    if not having:
        return "no run finished"
    better = sorted((row for row in table if _significant(row) and _advantage(row) > 0), key=_advantage, reverse=True)
    worse = sorted((row for row in table if _significant(row) and _advantage(row) < 0), key=_advantage)
    if better or worse:
        clauses = [_clause(rows, word, first) for rows, word in ((better, "better"), (worse, "worse")) if rows]
        return f"{name} is {'; it is '.join(clauses)}"
    if len({row.finished for row in having}) > 1:
        return f"means of {name} are over different seeds, because not all runs finished: none is called the best"
    leader, over = _best(having), f"over {_count(having[0].finished, 'seed')}"
    if len(table) == 1:
        return f"the mean {name} of {leader.strategy} {over} is {leader.mean:.4f}"
    mean = f"the best mean {name} {over} is that of {leader.strategy}, {leader.mean:.4f}"
    if leader.difference is None:
        return mean
    return f"{mean}, but its difference from {first.strategy} is not shown to be more than chance{_shown(leader)}"


def _clause(found: Sequence[Row], word: str, first: Row) -> str:
    """The first row with its numbers, the others by name."""
    also = f", as it is with {_list([row.strategy for row in found[1:]])}" if found[1:] else ""
    return f"{word} with {found[0].strategy} than with {first.strategy}{_shown(found[0])}{also}"


def _shown(row: Row) -> str:
    """The difference with its interval and its p, as far as there are any."""
    interval = (
        "" if row.difference_low is None else f", 95 % CI {row.difference_low:+.4f} to {row.difference_high:+.4f}"
    )
    p = "" if row.p_holm is None else f", p = {row.p_holm:.2g}"
    return f" ({row.difference:+.4f}{interval}{p})"


def _caveat(table: Sequence[Row]) -> str:
    if not table[0].comparisons:
        return "nothing is compared: name a second strategy."
    tested = [row for row in table if row.p is not None]
    if not tested:
        return on_significance(table)
    open_ones = [row for row in tested if not _significant(row)]
    untested = table[0].comparisons - len(tested)
    said = []
    if open_ones:
        named = _list([row.strategy + (f" with {row.scenario}" if row.scenario else "") for row in open_ones])
        said.append(
            f"for {named} no difference from {table[0].strategy} is shown, which does not mean that there is none"
        )
    if untested:
        said.append(f"{_count(untested, 'comparison')} could not be tested, for want of runs that finished")
    if not said:
        said = ["this holds for this experiment and its seeds, at a family-wise error rate of 5 %"]
    return "; ".join(said) + "."


def _significant(row: Row) -> bool:
    return row.p_holm is not None and row.p_holm <= ALPHA


def _advantage(row: Row) -> float:
    """The difference, positive where it is for the better."""
    return (row.difference or 0.0) * (-1 if lower_is_better(row.metric) else 1)


def _best(table: Sequence[Row]) -> Row:
    return (min if lower_is_better(table[0].metric) else max)(table, key=lambda row: row.mean or 0.0)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
