"""The campaign's results: counted by fault, as JSON and as the table of docs/reliability.md."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

from tests.chaos import page
from tests.chaos.deck import DECK
from tests.chaos.outcome import Hit, Outcome

__all__ = ["counted", "publish", "rendered"]

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "reliability.json"


def counted(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A row for each fault, in the deck's order; and the trials that failed."""
    found = dict[str, list[tuple[Hit, bool]]]()
    for outcome in outcomes:
        for hit in outcome.hits:
            found.setdefault(hit.fault, []).append((hit, not outcome.problems))
    rows = [_row(fault.name, fault.group, found[fault.name]) for fault in DECK if fault.name in found]
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "runs": len(outcomes),
        "rounds": sum(outcome.world.rounds for outcome in outcomes),
        "seeds": sorted(outcome.seed for outcome in outcomes),
        "faults": sum(row["trials"] for row in rows),
        "identical_runs": sum(not outcome.problems for outcome in outcomes),
        "rows": rows,
        "failed": [{"seed": o.seed, "problems": o.problems, "again": o.command} for o in outcomes if o.problems],
    }


def _row(name: str, group: str, hits: Sequence[tuple[Hit, bool]]) -> dict[str, Any]:
    seconds = [hit.recovery for hit, _ in hits if hit.recovery is not None]
    return {
        "fault": name,
        "group": group,
        "trials": len(hits),
        "survived": sum(hit.survived for hit, _ in hits),
        "identical": sum(identical for _, identical in hits),
        "recovery_p50": _at(seconds, 50),
        "recovery_p95": _at(seconds, 95),
    }


def _at(values: Sequence[float], percent: int) -> float | None:
    if len(values) < 2:
        return round(values[0], 2) if values else None
    return round(quantiles(values, n=100, method="inclusive")[percent - 1], 2)


def rendered(results: Mapping[str, Any]) -> str:
    """The table, and a sentence on what it was counted in."""
    lines = [
        f"{results['runs']} runs, {results['rounds']} rounds, {results['faults']} faults "
        f"({results['machine']}); {results['identical_runs']} runs ended with the bits of the undisturbed run.",
        "",
        "| fault | times | survived | bit-identical | recovery, median | 95 % |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        shown = [_seconds(row[name]) for name in ("recovery_p50", "recovery_p95")]
        numbers = [str(row[name]) for name in ("trials", "survived", "identical")]
        lines.append(f"| {' | '.join([row['fault'], *numbers, *shown])} |")
    return "\n".join(lines) + "\n"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s"


def publish(outcomes: Iterable[Outcome], *, write: bool) -> str:
    """The table; with ``write`` also the results' file, and the table between the page's markers."""
    results = counted(list(outcomes))
    table = rendered(results)
    if write:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        page.write("make chaos", table)
    return table
