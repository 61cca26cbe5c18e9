"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ExperimentFile = Annotated[Path, typer.Argument(help="An experiment file (TOML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, dotted as in the file: strategy.mu=0.1")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON lines for programs.")]
Out = Annotated[Path, typer.Option("--out", help="Where run folders are made.")]
RayAddress = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="A Ray cluster: auto or HOST:PORT.", show_default="none")
]
Tls = Annotated[Path | None, typer.Option(metavar="DIR", help="Mutual TLS: a folder with ca.pem, cert.pem, key.pem.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Plain text; on this machine only, unless forced.")]
Force = Annotated[bool, typer.Option("--force", help="With --insecure: beyond this machine.")]
Workers = Annotated[int | None, typer.Option(help="Worker processes; 0: in this one.", show_default="one a core")]
Http = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Show /metrics and /healthz there.", show_default="nowhere")
]
