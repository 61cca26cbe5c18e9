"""The command line: its commands in the order of ``shoal --help``, and its exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from shoal.commands import data, deployment, experiments, flower

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_COMMANDS: tuple[Callable[..., None], ...] = (
    experiments.simulate,
    experiments.compare,
    experiments.export,
    deployment.server,
    deployment.client,
    deployment.status,
    experiments.resume,
    experiments.runs,
    deployment.audit,
    experiments.strategies,
)
for command in _COMMANDS:
    app.command()(command)
app.add_typer(data.app, name="data")
app.add_typer(flower.app, name="flower")


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
