"""``shoal data``: how the data of an experiment lies among its clients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click
import typer
import typer.core

from shoal.commands.options import AsJson, ExperimentFile, Overrides


class _Show(typer.core.TyperGroup):
    """``shoal data FILE`` stands for ``shoal data show FILE``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *self.get_help_option_names(ctx)}:
            args = ["show", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Show,
    no_args_is_help=True,
    help="How the data of an experiment lies among its clients: shoal data EXPERIMENT.toml [KEY=VALUE]...",
)


@app.command()
def show(
    experiment: ExperimentFile,
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


@app.command()
def split(
    experiment: ExperimentFile,
    to: Annotated[Path, typer.Option(metavar="DIR", help="Where the shards go, a file a client.")],
    overrides: Overrides = None,
    replace: Annotated[bool, typer.Option("--replace", help="Drop shards that are there.")] = False,
) -> None:
    """Write each client's shard to a file of its own, as a simulation would split the data."""
    from shoal.split import split as write

    for line in write(experiment, overrides or [], to, replace):
        print(line)
