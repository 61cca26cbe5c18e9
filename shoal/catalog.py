"""The catalogue of strategies, read from their docstrings: ``shoal strategies`` lists it, docs/strategies.md is it.

``python -m shoal.catalog < benchmarks/results/strategies.json`` prints that page. A docstring begins with the rule; one
paragraph begins with "Use it", one with "Costs".
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from shoal.protos import registry
from shoal.strategies.base import Family, Strategy

__all__ = ["Entry", "catalogue", "page"]


@dataclass(frozen=True)
class Entry:
    """One strategy; ``body`` is what its docstring says beside its first line, its use and its costs."""

    name: str
    title: str
    family: str
    citation: str
    defaults: Mapping[str, Any]
    rule: str
    use: str
    costs: str
    body: str

    @classmethod
    def of(cls, name: str, strategy: type[Strategy]) -> Entry:
        paragraphs = re.split(r"\n\n(?! )", inspect.cleandoc(strategy.__doc__ or ""))
        first, *others = paragraphs
        told = {word: next((p for p in others if p.startswith(word)), "") for word in ("Use it", "Costs")}
        body = "\n\n".join(p for p in others if p not in told.values())
        defaults = {field.name: field.default for field in dataclasses.fields(strategy)}  # type: ignore[arg-type]
        use, costs = (" ".join(text.split()) for text in told.values())
        citation, title = strategy.citation, strategy.__name__
        return cls(name, title, strategy.family, citation, defaults, " ".join(first.split()), use, costs, body)


def catalogue() -> list[Entry]:
    """All registered strategies, family by family."""
    families: Sequence[str] = get_args(Family)
    found = [Entry.of(name, registry.load("shoal.strategies", name)) for name in registry.names("shoal.strategies")]
    return sorted(found, key=lambda entry: families.index(entry.family))


HEAD = """\
# Strategies

Written by `make docs` from the docstrings of [strategies/](../strategies): one file each, both halves. In an
experiment file: `[strategy]` with `name = "fedprox"` and its parameters; on the command line `--strategies
fedavg,fedprox:mu=0.1`; in Python `shoal.FedProx(mu=0.1)`. One of your own is [thirty lines](own-strategy.md).

Where not said otherwise a strategy sends the model down and its change up once a round, keeps nothing on clients and
takes any local optimizer; one that a combination would make wrong refuses it. *Personalisation* gives each client a
model of its own: `evaluation.clients_every` measures these on what clients hold out (`clients_accuracy`), beside the
global model (`clients_global_accuracy`).
"""


MEASURED = """\
*Lines* are those of the class without its docstring. *Down*, *up* and *time* are those of a round over FedAvg's,
*client* and *server state* count models; measured by `python -m benchmarks.strategies` on the lean engine, with a
small network whose steps are short: the larger the network, the more a strategy's gradients cost and the less its
vectors do.
"""


OTHERS = """\
## Where others differ

Each line has a test that runs the other library
([tests/strategies/test_server_optimizers.py](../tests/strategies/test_server_optimizers.py)):

- flwr 1.41 starts FedAdagrad's, FedAdam's and FedYogi's v at zero; the paper's Algorithm 2 wants at least τ².
- flwr 1.41 corrects FedAdam's bias, by a factor that is neither the paper's (there is none) nor Adam's: its first
  step is 0.74 of the paper's.
- flwr 1.41 applies server optimizers to the whole state, and can make BatchNorm's variances negative; here buffers
  are only ever averaged.
- flwr 1.41 divides by zero where no client reports an example; here that is an error that says so.
"""


def page(measured: Mapping[str, Mapping[str, float]]) -> str:
    """docs/strategies.md; ``measured`` is what benchmarks/strategies.py found."""
    entries = catalogue()
    rows = [
        "| | family | lines | down | up | client state | server state | time |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    rows += [f"| [`{e.name}`](#{e.title.lower()}) | {e.family} | {_measured(measured.get(e.name))} |" for e in entries]
    parts = [HEAD, "\n".join(rows), MEASURED, *map(_section, entries), OTHERS]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _measured(found: Mapping[str, float] | None) -> str:
    if found is None:
        return " | " * 5
    times = [f"{found[name]:.2g}×" for name in ("down", "up")]
    states = [f"{found[name]:.2g}" for name in ("client_state", "server_state")]
    return " | ".join([f"{found['lines']:.0f}", *times, *states, f"{found['time']:.2f}×"])


def _section(entry: Entry) -> str:
    defaults = ", ".join(f"`{name} = {value!r}`" for name, value in entry.defaults.items())
    body = [_fenced(entry.body)] if entry.body else []
    source = f"{entry.citation}. [strategies/{entry.name}.py](../strategies/{entry.name}.py): {defaults}."
    return "\n\n".join([f"## {entry.title}", _marked(entry.rule), *body, _marked(f"{entry.use} {entry.costs}"), source])


def _marked(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def _fenced(text: str) -> str:
    """Blocks behind ``::`` as Markdown has them."""
    blocks = re.sub(r"::\n\n((?: +.*\n?|\n)+)", lambda found: f"```text\n{inspect.cleandoc(found[1])}\n```\n", text)
    return blocks.replace("``", "`") if "```" not in blocks else blocks


if __name__ == "__main__":
    import json
    import sys

    print(page(json.load(sys.stdin)), end="")
