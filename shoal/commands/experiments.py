"""Experiments with simulated clients, comparisons of them, and the runs they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shoal.commands.options import AsJson, ExperimentFile, Out, Overrides, RayAddress, Workers
from shoal.simulations.nursery import begin, do

MOST = 5  # settings that a line of 'shoal runs' shows


def simulate(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    engine: Annotated[str, typer.Option(help="auto, lean, captured, fused (or fused:64), ray.")] = "auto",
    workers: Workers = None,
    ray_address: RayAddress = None,
    out: Out = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Run an experiment with simulated clients."""
    if workers != 0 and engine != "ray" and ray_address is None:
        do("shoal.simulations.worker", "shoal.experiment")  # imports PyTorch while this process does
    from shoal.experiment import Experiment

    loaded = Experiment.from_file(experiment, overrides or [])
    shown = "json" if as_json else "auto"
    run = loaded.simulate(engine=engine, workers=workers, ray_address=ray_address, out=out, progress=shown)
    raise typer.Exit(0 if run.status == "finished" else 130)


def compare(
    experiment: ExperimentFile,
    strategies: Annotated[
        str, typer.Option(help="Such as 'fedavg,fedprox:mu=0.01|0.1'; differences are to the first; a bar makes two.")
    ],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="How many, from the experiment's own on.")] = 3,
    vary: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A|B", help="Repeat it all: 'data.partition.alpha=0.1|1.0'.")
    ] = None,
    tune: Annotated[int | None, typer.Option(help="Trials for each arm; bars then mean a search.")] = None,
    search: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A|B", help="What to tune for every arm: 'local.lr=0.03|0.1'.")
    ] = None,
    sampler: Annotated[str, typer.Option(help="What chooses the trials: random or optuna.")] = "random",
    target: Annotated[str | None, typer.Option(metavar="METRIC=VALUE", help="When is it reached? accuracy=0.8")] = None,
    engine: Annotated[str, typer.Option(help="One for all runs: lean, captured:16, fused:16.")] = "lean",
    workers: Annotated[int | None, typer.Option(help="Worker processes.", show_default="one a core")] = None,
    out: Out = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Run an experiment with several strategies under the same seeds, and write a report.

    Runs that are there are not made again: the same command goes on after an interrupt.
    """
    begin("shoal.cell")  # imports PyTorch while this process does
    from shoal.arms import split
    from shoal.comparing import compare as run
    from shoal.grid import read, varied
    from shoal.protos.errors import RunError

    done = run(
        read(experiment, overrides or [], target),
        split(strategies),
        seeds=seeds,
        vary=varied(vary or []),
        tune=tune,
        search=varied(search or [], "--search"),
        sampler=sampler,
        engine=engine,
        out=out,
        workers=workers,
        progress="json" if as_json else "auto",
    )
    if done.status == "failed":
        raise RunError(done.problem)
    raise typer.Exit(0 if done.status == "finished" else 130)


def export(
    comparison: Annotated[Path, typer.Argument(help="A comparison's folder, or runs/7 for runs/0007-name.")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="Where the tables go.")],
    form: Annotated[str, typer.Option("--format", help="csv or parquet.")] = "csv",
) -> None:
    """Write a comparison's tables: arms, cells, every metric of every round, every client's."""
    from shoal.comparison import Comparison

    for path in Comparison(comparison).export(to, form):
        print(path)


def resume(
    run: Annotated[Path, typer.Argument(help="A run folder, or runs/7 for runs/0007-name.")],
    rounds: Annotated[int | None, typer.Option(help="Make the run longer.")] = None,
    as_json: AsJson = False,
) -> None:
    """Go on with an interrupted run, to the same bits."""
    from shoal.simulate import resume as go_on

    done = go_on(run, rounds=rounds, progress="json" if as_json else "auto")
    raise typer.Exit(0 if done.status == "finished" else 130)


def runs(out: Out = Path("runs"), as_json: AsJson = False) -> None:
    """List the runs there are, with what tells those of one name apart."""
    from shoal.listing import listed

    rows = listed(out)
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    if not rows:
        print(f"there are no runs in {out}; make one with 'shoal simulate'")
    width = max((len(row["run"]) for row in rows), default=0)
    for row in rows:
        last = [f"{k.removeprefix('test_')} {v:.4f}" for k, v in row.get("last", {}).items() if "test_" in k]
        differs = [f"{key}={value}" for key, value in row["differs"].items()]
        if len(differs) > MOST:
            differs[MOST:] = ["…"]
        shown = "  ".join([*last, *differs])
        print(f"{row['run']:{width}}  {row['status']:11}  {row.get('rounds', '?'):>4} rounds  {shown}".rstrip())


def strategies(as_json: AsJson = False) -> None:
    """List the strategies: family, hyper-parameters with their defaults, rule, costs, source."""
    import dataclasses
    from itertools import groupby

    from rich.console import Console
    from rich.markup import escape

    from shoal.catalog import catalogue

    if as_json:
        for entry in catalogue():
            print(json.dumps(dataclasses.asdict(entry)))
        return
    console = Console(soft_wrap=True, highlight=False)
    for family, entries in groupby(catalogue(), key=lambda entry: entry.family):
        console.print(f"\n[bold underline]{family}[/]")
        for entry in entries:
            arguments = ", ".join(f"{key}={value}" for key, value in entry.defaults.items())
            console.print(f"[bold]{entry.name}[/bold]  {escape(arguments)}")
            lines = (entry.rule, entry.costs, entry.citation)
            console.print("\n".join(f"    {escape(line.replace('``', ''))}" for line in lines))
