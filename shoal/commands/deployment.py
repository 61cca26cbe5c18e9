"""Experiments on clients that connect: both ends, and what a server did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shoal.commands.options import AsJson, Force, Http, Insecure, Out, Tls


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
    http: Http = None,
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
