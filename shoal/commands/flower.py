"""``shoal flower``: apps written for Flower, here and on devices that connect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.commands.options import AsJson, Force, Http, Insecure, Out, RayAddress, Tls, Workers

app = typer.Typer(no_args_is_help=True, help="Apps written for Flower.")

AppFolder = Annotated[Path, typer.Argument(help="The folder of a Flower app, with its pyproject.toml.")]
RunConfig = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the app's run config: lr=0.1")
]
Seed = Annotated[int, typer.Option(help="Of cohorts, and of what the app draws.")]


@app.command()
def run(
    path: AppFolder,
    overrides: RunConfig = None,
    nodes: Annotated[int | None, typer.Option(help="Clients.", show_default="the pyproject's, or 2")] = None,
    seed: Seed = 0,
    engine: Annotated[str, typer.Option(help="auto (processes of this machine), ray.")] = "auto",
    workers: Workers = None,
    ray_address: RayAddress = None,
    out: Out = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Run a Flower app, as it is, with simulated clients."""
    from shoal.flower import run as run_app

    shown = "json" if as_json else "auto"
    where: Any = {"engine": engine, "workers": workers, "ray_address": ray_address}
    done = run_app(path, overrides or [], nodes=nodes, seed=seed, out=out, progress=shown, **where)
    raise typer.Exit(0 if done.status == "finished" else 130)


@app.command()
def server(
    path: AppFolder,
    overrides: RunConfig = None,
    nodes: Annotated[int | None, typer.Option(help="Devices.", show_default="the pyproject's, or 2")] = None,
    seed: Seed = 0,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where devices call.")] = "127.0.0.1:8470",
    tls: Tls = None,
    insecure: Insecure = False,
    force: Force = False,
    lease: Annotated[float, typer.Option(help="Seconds without a sign after which a device's turn is lost.")] = 90.0,
    heartbeat: Annotated[float, typer.Option(help="Seconds between two signs of a device.")] = 30.0,
    http: Http = None,
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


@app.command()
def client(
    path: Annotated[Path, typer.Argument(help="The folder of the app, whose ClientApp this device plays.")],
    connect: Annotated[str, typer.Option(metavar="HOST:PORT", help="The server.")],
    name: Annotated[str | None, typer.Option("--id", help="This device's name.", show_default="the machine's")] = None,
    node_config: Annotated[
        str, typer.Option("--node-config", metavar="'KEY=VALUE …'", help="What the app is told of this device.")
    ] = "",
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


@app.command()
def doctor(path: AppFolder, as_json: AsJson = False) -> None:
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
