"""What is served in a trial, drawn from its seed; and the oracle: the same experiment, simulated, with no fault.

A *strict* world needs every client in every round, and nothing may be lost: it ends with the bits of the simulation. A
*lenient* one goes on without a client whose training process dies: there the simulation is made afterwards, with the
same clients failing in the same rounds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import shoal
from shoal.audit import audit
from shoal.server.runs import RunFolder
from shoal.split import split

__all__ = ["World", "differences"]

EXPERIMENT = """
name = "chaos"
rounds = {rounds}
cohort = {cohort}
seed = {seed}
{more}
[data]
name = "csv"
path = "{folder}/all.csv"
label = "y"
client = "site"
test_fraction = 0.2
client_test = 0.2
[model]
{model}
[local]
lr = 0.1
batch_size = 6
drop_last = true
[strategy]
name = "{strategy}"
[evaluation]
clients_every = {clients_every}
"""
# Training that fails where a file says so, which is written after the run: that of a client whose worker was killed.
FAILING = """
import json
from pathlib import Path

import torch
import shoal
from shoal.protos.errors import DataError

LIST = Path(__file__).parent / "failed.json"

class Failing(shoal.Client):
    def fit(self, work):
        if LIST.exists() and [work.round, work.client] in json.loads(LIST.read_text()):
            raise DataError("killed")
        optimizer = torch.optim.SGD(work.model.parameters(), lr=0.1)
        for x, y in work.batches():
            work.step(torch.nn.functional.cross_entropy(work.model(x), y), optimizer)
"""
FEATURES = 6
MLP = 'name = "mlp"\nhidden = [24, 16]'


@dataclass(frozen=True)
class World:
    """``hosted`` of the ``sites`` are played by one process, the others have one each."""

    seed: int
    sites: int
    hosted: int
    strategy: str
    model: str
    rounds: int
    clients_every: int
    tls: bool
    lenient: bool

    @classmethod
    def draw(cls, rng: random.Random, small: bool = False) -> World:
        """``small`` is for a minute: few processes, whose start is what takes time."""
        sites = 3 if small else rng.randint(3, 5)
        lenient = not small and rng.random() < 0.2
        return cls(
            seed=rng.randrange(10_000),
            sites=sites,
            hosted=sites - 1 if small else sites - rng.randint(0, 2),
            strategy=rng.choices(("scaffold", "fedavg", "fedadam"), (6, 2, 2))[0],
            model=rng.choice(('name = "linear"', MLP, f"{MLP}\nnorm = true")),
            rounds=rng.randint(30, 35) if small else rng.randint(25, 40),
            clients_every=0 if lenient else rng.choice((0, 0, 3)),
            tls=not small and rng.random() < 0.5,
            lenient=lenient,
        )

    @property
    def names(self) -> list[str]:
        return [f"site-{letter}" for letter in "abcdef"[: self.sites]]

    def prepare(self, folder: Path) -> Path:
        """The table, the shards and the experiment's file, which is returned."""
        rng = np.random.default_rng(self.seed)
        lines = [",".join([*(f"x{i}" for i in range(FEATURES)), "y", "site"])]
        for name in self.names:
            for row in rng.normal(size=(int(rng.integers(20, 40)), FEATURES)):
                lines.append(",".join([*(f"{value:.4f}" for value in row), str(int(row.sum() > 0)), name]))
        (folder / "all.csv").write_text("\n".join(lines) + "\n")
        (folder / "failing.py").write_text(FAILING)
        path = folder / "experiment.toml"
        more = f'quorum = 0.3\nclient = "{folder}/failing.py:Failing"' if self.lenient else ""
        path.write_text(
            EXPERIMENT.format(
                rounds=self.rounds,
                cohort=self.sites,
                seed=self.seed,
                more=more,
                folder=folder,
                model=self.model,
                strategy=self.strategy,
                clients_every=self.clients_every,
            )
        )
        split(path, [], folder / "shards", False)
        return path

    def simulate(self, folder: Path, served: Path) -> shoal.Run:
        """Undisturbed; in a lenient world with the failures that the served run had."""
        if self.lenient:
            failed = [[line["round"], f["client"]] for line in _trained(served) for f in line.get("failed", [])]
            (folder / "failed.json").write_text(json.dumps(failed))
        experiment = shoal.Experiment.from_file(folder / "experiment.toml")
        return experiment.simulate(engine="lean", workers=0, out=folder / "reference", progress="none")


def differences(world: World, served: Path, reference: Path) -> Iterator[str]:
    """Everything in which a served run is not the undisturbed one, in words."""
    run, expected = shoal.Run(served), shoal.Run(reference)
    if run.status != "finished":
        yield f"the run's status is {run.status!r}"
        return
    if run.parameters.trainable.numpy().tobytes() != expected.parameters.trainable.numpy().tobytes():
        yield "the final parameters differ"
    yield from _compared("metrics", _metrics(served), _metrics(reference))
    yield from _compared("clients' numbers", [_shown(line) for line in _trained(served)], list(_trained(reference)))
    yield from _counted_once(world, served)
    yield from _evaluations(served, reference)
    yield from _audited(served)


def _compared(what: str, found: list[Any], expected: list[Any]) -> Iterator[str]:
    expected = [_shown(line) for line in expected]
    if [line["round"] for line in found] != [line["round"] for line in expected]:
        yield f"{what}: the rounds are {[line['round'] for line in found]}"
        return
    for one, other in zip(found, expected, strict=True):
        if one != other:
            names = [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
            yield f"{what} of round {one['round']} differ in {', '.join(sorted(names))}"


def _shown(line: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same; a killed worker and a raised error fail for different reasons."""
    kept = {name: value for name, value in line.items() if "seconds" not in name and not name.startswith("clients_")}
    return kept | ({"failed": [f["client"] for f in kept["failed"]]} if "failed" in kept and "kind" in kept else {})


def _metrics(path: Path) -> list[dict[str, Any]]:
    return [_shown(line) for line in RunFolder(path).lines("metrics.jsonl")]


def _trained(path: Path) -> Iterator[dict[str, Any]]:
    return (line for line in RunFolder(path).lines("clients.jsonl") if line["kind"] == "train")


def _counted_once(world: World, served: Path) -> Iterator[str]:
    for line in _trained(served):
        told = [*line["client"], *(failed["client"] for failed in line.get("failed", []))]
        if sorted(told) != world.names:
            yield f"round {line['round']} has {told}"


def _audited(served: Path) -> Iterator[str]:
    """The audit log fits, and says of each round what was recorded of it."""
    account = audit(served)
    if account.problem is not None:
        yield f"the audit log: {account.problem}"
        return
    lines = RunFolder(served).lines("audit.jsonl")
    found = [[(c["client"], c["examples"]) for c in line["clients"] if "examples" in c] for line in lines]
    if found != [list(zip(line["client"], line["examples"], strict=True)) for line in _trained(served)]:
        yield "the audit log counts other updates than were recorded"


def _evaluations(served: Path, reference: Path) -> Iterator[str]:
    """Who was away was not evaluated; who was, once and with the same numbers."""
    found, expected = _evaluated(served), _evaluated(reference)
    for key, numbers in found.items():
        if len(numbers) != 1:
            yield f"{key} was evaluated {len(numbers)} times"
        elif numbers != expected.get(key):
            yield f"the evaluation of {key} differs"


def _evaluated(path: Path) -> dict[tuple[int, str], list[dict[str, Any]]]:
    found = dict[tuple[int, str], list[dict[str, Any]]]()
    for line in RunFolder(path).lines("clients.jsonl"):
        if line["kind"] == "evaluate":
            columns = {name: values for name, values in line.items() if isinstance(values, list)}
            for row in zip(*columns.values(), strict=True):
                numbers = dict(zip(columns, row, strict=True))
                found.setdefault((line["round"], numbers["client"]), []).append(numbers)
    return found
