"""The catalogue of strategies and the page that is written from it."""

from __future__ import annotations

import json
from pathlib import Path

from shoal.catalog import Entry, catalogue, page
from shoal.strategies.scaffold import Scaffold

ROOT = Path(__file__).parents[2]


def test_an_entry_is_taken_from_the_docstring() -> None:
    entry = Entry.of("scaffold", Scaffold)

    assert entry.family == "client drift" and entry.citation == "Karimireddy et al. 2020, ICML, Algorithm 1"
    assert entry.defaults == {"server_lr": 1.0, "option": 2}
    assert entry.rule.startswith("w ← w − η (gₖ(w) − cₖ + c)")
    assert entry.use.startswith("Use it on heterogeneous clients")
    assert entry.costs.startswith("Costs twice FedAvg's bytes both ways")
    assert "cₖ⁺ = cₖ − c − Δₖ / Σ η" in entry.body and "Use it" not in entry.body


def test_every_entry_says_all_of_it_family_by_family() -> None:
    entries = catalogue()

    assert len(entries) >= 24 and all(e.rule and e.use and e.costs and e.citation for e in entries)
    assert [e.family for e in entries] == sorted(
        (e.family for e in entries), key=["averaging", "server optimizer", "client drift", "personalisation"].index
    )


def test_the_page_is_current() -> None:
    """``make docs`` writes it."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "strategies.json").read_text())

    assert (ROOT / "docs" / "strategies.md").read_text() == page(measured)
    assert measured.keys() == {entry.name for entry in catalogue()}
    assert max(cost["lines"] for cost in measured.values()) <= 120
