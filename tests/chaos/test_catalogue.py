"""The list of faults has no row that nothing shows, and the page has them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.chaos import page
from tests.chaos.catalogue import NUMBERS, ROWS, Shown, add_trials, rendered, uncovered
from tests.chaos.deck import DECK

TESTS = Path(__file__).parents[1]
MARK = re.compile(r"mark\.fault\(([\d, ]+)\)")
# Those of certificates and tokens have tests of their own (tests/server/test_tls.py, tests/client/test_diagnose.py).
NOT_HERE = {17, 18}


def marked() -> set[int]:
    """The numbers that stand in the tests."""
    found = (MARK.findall(path.read_text()) for path in TESTS.glob("*/test_*.py"))
    return {int(number) for texts in found for text in texts for number in text.split(",")}


def test_the_rows_are_those_of_the_list() -> None:
    assert set(NUMBERS) == set(range(1, 27)) - NOT_HERE
    assert list(NUMBERS) == sorted(NUMBERS)


def test_every_row_is_shown_and_every_mark_is_of_a_row() -> None:
    assert uncovered(marked()) == []
    assert marked() | {number for fault in DECK for number in fault.rows} == set(NUMBERS)


def test_every_fault_of_the_deck_shows_a_row() -> None:
    assert [fault.name for fault in DECK if not fault.rows] == []


def test_a_row_that_nothing_shows_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"nothing shows the faults \[7, 8, .*mark a test with @pytest\.mark\.fault"):
        rendered({number: Shown() for number in NUMBERS}, campaign=False)


def test_trials_and_tests_are_counted_by_row() -> None:
    rows = {number: Shown() for number in NUMBERS}
    for shown in rows.values():
        shown.tests["passed"] += 2
    rows[5].tests["skipped"] += 1
    line = {"fault": "connections torn amid a frame", "trials": 7, "survived": 6, "identical": 5}
    add_trials(rows, {"rows": [line]})
    table = rendered(rows, campaign=True).splitlines()

    assert len(table) == len(ROWS) + 2
    assert table[2].endswith("| 7 trials, 6 survived, 5 bit-identical; 2 passed |")  # of row 1
    assert table[6].endswith("| 7 trials, 6 survived, 5 bit-identical; 2 passed, 1 skipped |")
    assert table[8].endswith("| 2 tests | 2 passed |")  # row 7 has no fault of the campaign


def test_the_page_has_every_row() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert [row.number for row in ROWS if f"| {row.number} | {row.fault} |" not in text] == []


def test_a_table_is_put_between_its_own_markers() -> None:
    text = "a\n<!-- written by one -->\nold\n<!-- end of what is written -->\nb\n"

    assert page.put(text, "one", "new") == ("a\n<!-- written by one -->\n\nnew\n<!-- end of what is written -->\nb\n")
    with pytest.raises(ValueError, match="no lines '<!-- written by two -->'"):
        page.put(text, "two", "new")
