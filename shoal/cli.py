"""The command line. Heavy imports stand in the commands that use them: ``shoal --help`` must answer at once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer
import typer.core

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, dotted as in the file: strategy.mu=0.1")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON lines for programs.")]
Out = Annotated[Path, typer.Option("--out", help="Where run folders are made.")]
RayAddress = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="A Ray cluster: auto or HOST:PORT.", show_default="none")
]


@app.command()
def simulate(
    experiment: Annotated[Path, typer.Argument(help="An experiment file (TOML).")],
    overrides: Overrides = None,
    engine: Annotated[str, typer.Option(help="auto, lean, captured, fused (or fused:64), ray.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Worker processes; 0: in this one.", show_default="one a core")
    ] = None,
    ray_address: RayAddress = None,
    out: Out = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Run an experiment with simulated clients."""
    from shoal.experiment import Experiment

    loaded = Experiment.from_file(experiment, overrides or [])
    shown = "json" if as_json else "auto"
    run = loaded.simulate(engine=engine, workers=workers, ray_address=ray_address, out=out, progress=shown)
    raise typer.Exit(0 if run.status == "finished" else 130)


@app.command()
def compare(
    experiment: Annotated[Path, typer.Argument(help="An experiment file (TOML).")],
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


@app.command()
def export(
    comparison: Annotated[Path, typer.Argument(help="A comparison's folder, or runs/7 for runs/0007-name.")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="Where the tables go.")],
    form: Annotated[str, typer.Option("--format", help="csv or parquet.")] = "csv",
) -> None:
    """Write a comparison's tables: arms, cells, every metric of every round, every client's."""
    from shoal.comparison import Comparison

    for path in Comparison(comparison).export(to, form):
        print(path)


Tls = Annotated[Path | None, typer.Option(metavar="DIR", help="Mutual TLS: a folder with ca.pem, cert.pem, key.pem.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Plain text; on this machine only, unless forced.")]
Force = Annotated[bool, typer.Option("--force", help="With --insecure: beyond this machine.")]


@app.command()
def server(
    experiments: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE... [KEY=VALUE]...", help="Experiments, run one after the other; changes to all of them."
        ),
    ],
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where clients call.")] = "127.0.0.1:8470",
    wait_for: Annotated[
        int | None, typer.Option(help="Clients before the first round.", show_default="a cohort")
    ] = None,
    tls: Tls = None,
    insecure: Insecure = False,
    force: Force = False,
    lease: Annotated[float, typer.Option(help="Seconds without a sign after which a client's task is lost.")] = 90.0,
    heartbeat: Annotated[float, typer.Option(help="Seconds between two signs of a client.")] = 30.0,
    sync: Annotated[bool, typer.Option(help="Let receipts wait for the disk: no power cut loses an update.")] = True,
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Show /metrics and /healthz there.", show_default="nowhere")
    ] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Do not go on with what this command has begun.")] = False,
    out: Out = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Run experiments on clients that connect. The same command goes on with runs that have not finished."""
    from shoal.experiment import Experiment
    from shoal.protos.errors import ExperimentError
    from shoal.serve import Door, serve

    files, overrides = [e for e in experiments if "=" not in e], [e for e in experiments if "=" in e]
    if not files:
        raise ExperimentError("there is nothing to serve; name at least one experiment file")
    loaded = [Experiment.from_file(file, overrides) for file in files]
    certificates = None if tls is None else str(tls.resolve())
    door = Door(listen, certificates, insecure, force, wait_for, lease, heartbeat, sync, http)
    runs = serve(loaded, door, out=out, progress="json" if as_json else "auto", anew=anew)
    raise typer.Exit(0 if all(run.status == "finished" for run in runs) and len(runs) == len(loaded) else 130)


@app.command()
def client(
    connect: Annotated[str, typer.Option(metavar="HOST:PORT", help="The server.")],
    data: Annotated[str, typer.Option(metavar="SPEC", help="A shard, table, image folder or reader; see the docs.")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="The reader's arguments: label=outcome")
    ] = None,
    name: Annotated[str | None, typer.Option("--id", help="This client's name.", show_default="the shard's")] = None,
    tls: Tls = None,
    insecure: Insecure = False,
    force: Force = False,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="FILE.py:NAME", help="Code of mine that a server may ask for.")
    ] = None,
    simulate: Annotated[int | None, typer.Option(metavar="N", help="Host N clients, of a folder of shards.")] = None,
    skip: Annotated[int, typer.Option(help="With --simulate: leave out the first shards.")] = 0,
    state: Annotated[
        Path | None, typer.Option(help="What this client keeps.", show_default="in ~/.local/state")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that train.", show_default="1; hosting: one a core")
    ] = None,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    once: Annotated[bool, typer.Option("--once", help="End when the server has finished its runs.")] = False,
    patience: Annotated[float | None, typer.Option(help="Seconds without a server, then give up.")] = None,
) -> None:
    """Take part with data of this machine."""
    from shoal.connect import Request
    from shoal.connect import connect as take_part

    request = Request(
        *(connect, data, options or (), name, tls, insecure, force, allow or (), simulate, skip),
        *(state, workers, device, once, patience),
    )
    take_part(request)


@app.command()
def status(
    server: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The server, as its clients call it.")],
    tls: Tls = None,
    insecure: Insecure = False,
    force: Force = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again each second, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what goes on at a server: its round, its clients, what fails. Exit code 1 if its disk takes no more."""
    from shoal.protos.transport import Address, check_exposure
    from shoal.status import look
    from shoal.status import watch as keep_looking

    address = Address.parse(server)
    certificates = check_exposure(address, tls, insecure, force)
    if watch:
        return keep_looking(address, certificates, as_json)
    raise typer.Exit(look(address, certificates, as_json))


class _Show(typer.core.TyperGroup):
    """``shoal data FILE`` stands for ``shoal data show FILE``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *self.get_help_option_names(ctx)}:
            args = ["show", *args]
        return super().parse_args(ctx, args)


data_app = typer.Typer(
    cls=_Show,
    no_args_is_help=True,
    help="How the data of an experiment lies among its clients: shoal data EXPERIMENT.toml [KEY=VALUE]...",
)
app.add_typer(data_app, name="data")


@data_app.command()
def show(
    experiment: Annotated[Path, typer.Argument(help="An experiment file (TOML).")],
    overrides: Overrides = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also as a page that holds all it needs.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show clients, sizes and mixes of labels, before anything is trained; 'show' may be left out."""
    from shoal.overview import Overview, write

    overview = Overview.of(experiment, overrides or [])
    if html is not None:
        from shoal.overview_page import page

        write(html, page(overview))
    overview.print_json() if as_json else overview.print()


@data_app.command()
def split(
    experiment: Annotated[Path, typer.Argument(help="An experiment file (TOML).")],
    to: Annotated[Path, typer.Option(metavar="DIR", help="Where the shards go, a file a client.")],
    overrides: Overrides = None,
    replace: Annotated[bool, typer.Option("--replace", help="Drop shards that are there.")] = False,
) -> None:
    """Write each client's shard to a file of its own, as a simulation would split the data."""
    from shoal.split import split as write

    for line in write(experiment, overrides or [], to, replace):
        print(line)


flower_app = typer.Typer(no_args_is_help=True, help="Apps written for Flower.")
app.add_typer(flower_app, name="flower")


@flower_app.command("run")
def flower_run(
    path: Annotated[Path, typer.Argument(help="The folder of a Flower app, with its pyproject.toml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the app's run config: lr=0.1")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Clients.", show_default="the pyproject's, or 2")] = None,
    seed: Annotated[int, typer.Option(help="Of cohorts, and of what the app draws.")] = 0,
    engine: Annotated[str, typer.Option(help="auto (processes of this machine), ray.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Worker processes; 0: in this one.", show_default="one a core")
    ] = None,
    ray_address: RayAddress = None,
    out: Out = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Run a Flower app, as it is, with simulated clients."""
    from shoal.flower import run

    shown = "json" if as_json else "auto"
    where: Any = {"engine": engine, "workers": workers, "ray_address": ray_address}
    done = run(path, overrides or [], nodes=nodes, seed=seed, out=out, progress=shown, **where)
    raise typer.Exit(0 if done.status == "finished" else 130)


NodeConfig = Annotated[
    str, typer.Option("--node-config", metavar="'KEY=VALUE …'", help="What the app is told of this device.")
]


@flower_app.command("server")
def flower_server(
    path: Annotated[Path, typer.Argument(help="The folder of a Flower app, with its pyproject.toml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the app's run config: lr=0.1")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Devices.", show_default="the pyproject's, or 2")] = None,
    seed: Annotated[int, typer.Option(help="Of cohorts, and of what the app draws.")] = 0,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where devices call.")] = "127.0.0.1:8470",
    tls: Tls = None,
    insecure: Insecure = False,
    force: Force = False,
    lease: Annotated[float, typer.Option(help="Seconds without a sign after which a device's turn is lost.")] = 90.0,
    heartbeat: Annotated[float, typer.Option(help="Seconds between two signs of a device.")] = 30.0,
    http: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Show /metrics and /healthz there.", show_default="nowhere")
    ] = None,
    out: Out = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Run a Flower app, as it is, on devices that connect. It begins when all of them are there."""
    from shoal.flower import serve
    from shoal.serve import Door

    certificates = None if tls is None else str(tls.resolve())
    door = Door(listen, certificates, insecure, force, lease=lease, heartbeat=heartbeat, http=http)
    shown = "json" if as_json else "auto"
    done = serve(path, overrides or [], door=door, nodes=nodes, seed=seed, out=out, progress=shown)
    raise typer.Exit(0 if done.status == "finished" else 130)


@flower_app.command("client")
def flower_client(
    path: Annotated[Path, typer.Argument(help="The folder of the app, whose ClientApp this device plays.")],
    connect: Annotated[str, typer.Option(metavar="HOST:PORT", help="The server.")],
    name: Annotated[str | None, typer.Option("--id", help="This device's name.", show_default="the machine's")] = None,
    node_config: NodeConfig = "",
    tls: Tls = None,
    insecure: Insecure = False,
    force: Force = False,
    state: Annotated[
        Path | None, typer.Option(help="What this device keeps.", show_default="in ~/.local/state")
    ] = None,
    stay: Annotated[bool, typer.Option("--stay", help="Wait for another run when one has finished.")] = False,
    patience: Annotated[float | None, typer.Option(help="Seconds without a server, then give up.")] = None,
) -> None:
    """Take part in a Flower app that is served: this device is one of its nodes."""
    from shoal.flower.joining import Device

    Device(path, connect, name, node_config, tls, insecure, force, state, stay, patience).join()


@flower_app.command("doctor")
def flower_doctor(
    path: Annotated[Path, typer.Argument(help="The folder of a Flower app, with its pyproject.toml.")],
    as_json: AsJson = False,
) -> None:
    """Say what a Flower app uses, and what of it does not run here. Its code is read, not run."""
    import dataclasses

    from shoal.flower import check_version
    from shoal.flower.doctor import diagnose

    check_version()
    found = diagnose(path)
    marks = {"runs": "✓", "differs": "≠", "not supported": "✗"}
    for finding in found:
        where = f"  ({finding.where})" if finding.where else ""
        print(json.dumps(dataclasses.asdict(finding)) if as_json else f"{marks[finding.verdict]} {finding.what}{where}")
    raise typer.Exit(2 if any(finding.verdict == "not supported" for finding in found) else 0)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="A run folder, or runs/7 for runs/0007-name.")],
    rounds: Annotated[int | None, typer.Option(help="Make the run longer.")] = None,
    as_json: AsJson = False,
) -> None:
    """Go on with an interrupted run, to the same bits."""
    from shoal.simulate import resume as go_on

    done = go_on(run, rounds=rounds, progress="json" if as_json else "auto")
    raise typer.Exit(0 if done.status == "finished" else 130)


@app.command()
def runs(out: Out = Path("runs"), as_json: AsJson = False) -> None:
    """List the runs there are."""
    from shoal.protos.errors import RunError
    from shoal.server.runs import list_runs

    rows = []
    for folder in list_runs(out):
        try:
            summary = folder.read("summary.json")
        except RunError:
            summary = {"status": "unreadable"}
        summary.setdefault("rounds", max((line["round"] for line in folder.lines("metrics.jsonl")), default="?"))
        if summary["status"] == "running" and not folder.in_use():
            summary["status"] = "killed"  # a run that ends says how; 'shoal resume' goes on with it
        rows.append({"run": str(folder.path), **summary})
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    if not rows:
        print(f"there are no runs in {out}; make one with 'shoal simulate'")
    width = max((len(row["run"]) for row in rows), default=0)
    for row in rows:
        last = "  ".join(f"{k.removeprefix('test_')} {v:.4f}" for k, v in row.get("last", {}).items() if "test_" in k)
        print(f"{row['run']:{width}}  {row['status']:11}  {row.get('rounds', '?'):>4} rounds  {last}")


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(help="The folder of a served run, or runs/7 for runs/0007-name.")],
    kept: Annotated[
        str | None, typer.Option(metavar="SHA256", help="What an earlier check gave as the last line's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check who contributed to a served run: no line of its audit log was changed. Exit code 1 if one was."""
    import dataclasses

    from shoal.audit import audit as check

    found = check(run, kept)
    if as_json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        covered = (
            f"{found.rounds} rounds, {found.clients} clients, {found.counted} updates counted, "
            f"{found.not_counted} not counted"
        )
        print(f"{found.run}: {covered}")
        if found.problem is None:
            print("every line fits the one before, and the last checkpoint holds the model that they end with")
            print(f"last line: {found.last or 'none'}")
        else:
            print(f"{found.problem}\nwhat is said above ends before it")
    raise typer.Exit(0 if found.problem is None else 1)


@app.command()
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


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"shoal {version('shoal')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Federated learning for PyTorch: simulate many clients, deploy them, compare strategies."""


def main() -> None:
    """Exit code 0 only if the run finished, 2 for what the user can mend, 130 after Ctrl-C."""
    from shoal.protos.errors import ShoalError

    try:
        app()
    except ShoalError as error:
        print(f"shoal: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
