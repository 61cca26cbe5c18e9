"""The campaign's results: counted by fault, as JSON and as the table of docs/reliability.md."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

from tests.chaos import page
from tests.chaos.deck import DECK
from tests.chaos.outcome import Outcome

__all__ = ["counted", "publish", "rendered"]

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "reliability.json"


def counted(outcomes: Sequence[Outcome], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A row for each fault, in the deck's order, and the trials that failed; ``before`` are results to add to."""
    found = {row["fault"]: list(row["hits"]) for row in before["rows"]} if before else {}
    for outcome in outcomes:
        for hit in outcome.hits:
            seconds = None if hit.recovery is None else round(hit.recovery, 2)
            found.setdefault(hit.fault, []).append([hit.survived, not outcome.problems, seconds])
    rows = [_row(fault.name, fault.group, found[fault.name]) for fault in DECK if fault.name in found]
    sums = {
        "runs": len(outcomes),
        "rounds": sum(outcome.world.rounds for outcome in outcomes),
        "seeds": sorted(outcome.seed for outcome in outcomes),
        "identical_runs": sum(not outcome.problems for outcome in outcomes),
        "failed": [{"seed": o.seed, "problems": o.problems, "again": o.command} for o in outcomes if o.problems],
    }
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "faults": sum(row["trials"] for row in rows),
        **{name: before[name] + value if before else value for name, value in sums.items()},
        "rows": rows,
    }


def _row(name: str, group: str, hits: Sequence[tuple[bool, bool, float | None]]) -> dict[str, Any]:
    """``hits`` are, each: survived; in a run that ended with the right bits; seconds until it had recovered."""
    seconds = [recovery for _, _, recovery in hits if recovery is not None]
    return {
        "fault": name,
        "group": group,
        "trials": len(hits),
        "survived": sum(survived for survived, _, _ in hits),
        "identical": sum(identical for _, identical, _ in hits),
        "recovery_p50": _at(seconds, 50),
        "recovery_p95": _at(seconds, 95),
        "hits": hits,
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


def published() -> dict[str, Any] | None:
    """The results that there are."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else None


def publish(results: Mapping[str, Any]) -> None:
    """The results' file, with a line for each row, and the table between the page's markers."""
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    head = json.dumps({name: value for name, value in results.items() if name != "rows"}, indent=1)
    RESULTS.write_text(f'{head.rstrip("}").rstrip()},\n "rows": [\n{rows}\n]}}\n')
    page.write("make chaos", rendered(results))
