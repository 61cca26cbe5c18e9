"""Where the papers' scripts write what they found: the tables between markers in docs/results.md."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev

__all__ = ["publish", "spread", "standing", "table"]

PAGE = Path(__file__).parents[2] / "docs" / "results.md"


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """Mean ± standard deviation."""
    return f"{fmean(values):{form}} ± {stdev(values):{form}}" if len(values) > 1 else f"{values[0]:{form}}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown, the first column to the left."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---", *["--:"] * (len(head) - 1)], *rows])


def publish(name: str, text: str) -> None:
    """Print the text, and put it between the markers of that name."""
    stamp = (
        f"`python examples/papers/{name}.py`, torch {version('torch')}, {os.cpu_count()} cores, {platform.machine()}."
    )
    print(f"{text}\n\n{stamp}")
    begin, end = f"<!-- {name}: written by examples/papers/{name}.py -->\n", f"<!-- end of {name} -->"
    before, _, rest = PAGE.read_text("utf-8").partition(begin)
    PAGE.write_text(f"{before}{begin}\n{text}\n\n{stamp}\n\n{end}{rest.partition(end)[2]}", "utf-8")


def standing(name: str) -> dict[str, list[str]]:
    """The rows of a table that was published before, by their first cell."""
    begin, end = f"<!-- {name}: written", f"<!-- end of {name} -->"
    lines = PAGE.read_text("utf-8").partition(begin)[2].partition(end)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row for row in rows[2:]}  # below the head and its rule
