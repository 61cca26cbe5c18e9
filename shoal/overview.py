"""How an experiment's data lies among its clients, for a terminal, a file or a program: ``shoal data``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.text import Text

from shoal.progress import Output
from shoal.protos.errors import ExperimentError
from shoal.simulations.dataset import Dataset
from shoal.simulations.federated import ArrayData
from shoal.simulations.survey import Survey, survey
from shoal.split import shards_of

__all__ = ["Overview", "write"]

MOST = 1000  # clients to look at: of populations that are made on demand more would take long
BINS, BAR, LABELS = 8, 40, 20  # lines of the histogram, characters of its longest bar, lines of the map
SHADES = " ·░▒▓█"


@dataclass(frozen=True, eq=False)
class Overview:
    """A survey of an experiment's data, and what its labels are called."""

    name: str
    source: str
    seed: int
    survey: Survey
    labels: Sequence[str]

    @classmethod
    def of(cls, path: Path, overrides: Sequence[str]) -> Overview:
        """Split the data as ``shoal simulate`` would and look at it."""
        experiment, data = shards_of(path, overrides)
        most, recipe = None if isinstance(data, ArrayData) else MOST, experiment.data
        found = survey(data, most)
        names = recipe.train.class_names if isinstance(recipe, Dataset) else None
        width = 0 if found.counts is None else found.counts.shape[1]
        return cls(experiment.name, _source(recipe), experiment.seed, found, names or list(map(str, range(width))))

    def print_json(self) -> None:
        """One object: the numbers, and for each client its rows and labels."""
        s = self.survey
        lines = s.counts.tolist() if s.counts is not None else [None] * len(s.sizes)
        columns = zip(s.clients, s.sizes.tolist(), s.held_out.tolist(), lines, strict=True)
        keys = ("client", "examples", "held_out", "labels")
        told = {
            **{"name": self.name, "seed": self.seed, "population": s.population, "surveyed": len(s.sizes)},
            **{key: value for key, value in s.summary().items() if key != "clients"},
            **{"held_out": int(s.held_out.sum()), "test": s.test, "labels": list(self.labels)},
            "test_labels": None if s.test_counts is None else s.test_counts.tolist(),
            "clients": [dict(zip(keys, column, strict=True)) for column in columns],
        }
        print(json.dumps(told))

    def print(self, console: Console | None = None) -> None:
        """Sentences, a histogram and a map; colours on a terminal, else plain text."""
        console = console or Output(highlight=False, soft_wrap=True)
        for line in self.sentences():
            console.print(line, markup=False)
        console.print("\n  examples a client", markup=False)
        for text in histogram(self.survey.sizes):
            console.print(f"  {text}", markup=False)
        if self.survey.counts is not None:
            for row in heat_map(self.survey, self.labels, console):
                console.print(row)

    def sentences(self) -> Iterator[str]:
        """What there is to say in words, a line each."""
        s, numbers = self.survey, self.survey.summary()
        yield f"{self.name} · {self.source} · seed {self.seed}"
        some = f", of which {len(s.sizes):,} are looked at" if len(s.sizes) < s.population else ""
        yield f"  clients   {s.population:,}{some}"
        server = f"; the server tests on {s.test:,}" if s.test else "; the server has no test set"
        yield f"  examples  {s.sizes.sum():,} to train on, {s.held_out.sum():,} that clients hold out{server}"
        spread = ", ".join(f"{word} {numbers[f'size_{word}']:,.0f}" for word in ("min", "median", "max"))
        yield f"  sizes     {spread}; in effect {numbers['effective_clients']:,.1f} clients of one size"
        if s.counts is not None:
            few, many = numbers["classes_min"], numbers["classes_max"]
            known = f"{few:.0f} to {many:.0f}" if few < many else f"{many:.0f}"
            yield f"  labels    {known} of {len(self.labels)} a client"
            low, high = numbers["divergence_p5"], numbers["divergence_p95"]
            yield (
                f"  mixes     {numbers['divergence']:.3f} bits from the whole's (mean Jensen-Shannon divergence; "
                f"5th to 95th percentile {low:.3f} to {high:.3f}; 0 is IID, 1 the most)"
            )


def _source(recipe: object) -> str:
    if not isinstance(recipe, Dataset):
        return type(recipe).__name__
    named = recipe.spec["name"] if recipe.spec else "data"
    return f"{named}, split by {recipe.partitioner or 'its own clients'}"


def histogram(sizes: np.ndarray) -> Iterator[str]:
    """A line for each range of sizes; ranges grow where the largest client has over thirty times the least."""
    low, high = int(sizes.min()), int(sizes.max())
    wide = high > 30 * low
    edges = np.geomspace(low, high + 1, BINS + 1) if wide else np.linspace(low, high + 1, BINS + 1)
    edges = np.unique(np.ceil(edges - 1e-9).astype(int))
    counts, _ = np.histogram(sizes, edges)
    width = len(f"{high:,}")
    for start, stop, count in zip(edges[:-1], edges[1:] - 1, counts, strict=True):
        bar = "█" * int(np.ceil(BAR * count / counts.max()))
        yield f"{start:{width},} to {stop:{width},}  {bar} {count:,}".rstrip()


def heat_map(s: Survey, labels: Sequence[str], console: Console) -> Iterator[Text]:
    """A line a label, a column a client: the darker, the larger the label's share of the client's examples."""
    assert s.counts is not None
    order = np.argsort(-s.counts.sum(0), kind="stable")[:LABELS] if len(labels) > LABELS else np.arange(len(labels))
    left = max(len(_short(labels[label])) for label in order)
    room = max(10, min(console.width, 120) - left - 5)
    every = -(-len(s.sizes) // room)
    shares = (s.counts / s.counts.sum(1, keepdims=True))[::every]
    columns = "clients" if every == 1 else f"every {every}th client"
    coloured = console.color_system in ("256", "truecolor") and not console.no_color
    scale = "from white to blue" if coloured else f"from {SHADES[1]} a little to {SHADES[-1]} all"
    yield Text(f"\n  labels × {columns}: the label's share of the client's examples, {scale}")
    for label in order:
        yield Text(f"  {_short(labels[label]):>{left}}  ").append(_line(shares[:, label], coloured))
    if len(order) < len(labels):
        yield Text(f"  and {len(labels) - len(order)} labels that are rarer")


def _line(shares: np.ndarray, coloured: bool) -> Text:
    if not coloured:
        return Text("".join(SHADES[int(np.ceil(share * (len(SHADES) - 1)))] for share in shares))
    line = Text()
    for share in shares:
        level = round(255 * (1 - share**0.5))  # the root, so that small shares can be told from none
        line.append(" ", Style(bgcolor=f"rgb({level},{level},255)" if share else "default"))
    return line


def _short(label: str) -> str:
    shown = label if label.isprintable() and label.strip() else repr(label)
    return shown if len(shown) <= 14 else f"{shown[:13]}…"


def write(path: Path, page: str) -> None:
    """ExperimentError if there can be no such file."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ExperimentError(f"{str(path)!r} cannot be written ({error.strerror}); give another file") from error
