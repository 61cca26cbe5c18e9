"""The page of the docs that the harness writes into: each table between markers of its own."""

from __future__ import annotations

from pathlib import Path

__all__ = ["PAGE", "put", "write"]

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
END = "<!-- end of what is written -->\n"


def put(text: str, by: str, table: str) -> str:
    """The page's text with the table that ``by`` writes; ValueError if it has no place for it."""
    begin = f"<!-- written by {by} -->\n"
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"the page has no lines {begin.strip()!r} and {END.strip()!r}; put them where the table goes")
    return f"{before}{begin}\n{table}\n{END}{after}"


def write(by: str, table: str) -> None:
    PAGE.write_text(put(PAGE.read_text(encoding="utf-8"), by, table), encoding="utf-8")
