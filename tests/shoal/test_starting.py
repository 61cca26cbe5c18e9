"""Commands have one process that forks their workers, and it begins before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

APP = Path(__file__).parents[1] / "flower" / "apps" / "averaging"
COMMANDS = {
    "simulate": ("simulate", "tiny.toml", "--workers", "2", "--engine", "lean"),
    "compare": ("compare", "tiny.toml", "--strategies", "fedavg,fedprox:mu=0.1", "--seeds", "1", "--workers", "2"),
    "flower run": ("flower", "run", str(APP), "--nodes", "4", "--workers", "2"),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems' libraries do not stand forks")
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_one_process_is_begun_first(command: tuple[str, ...], folder: Path) -> None:
    code = f"""
        import subprocess, sys
        begun = []

        class Noted(subprocess.Popen):
            def __init__(self, command, *args, **how):
                if command[0] == sys.executable:
                    begun.append(sorted({{"torch", "flwr"}} & set(sys.modules)))
                super().__init__(command, *args, **how)

        subprocess.Popen = Noted
        sys.argv = ["shoal", *{command!r}]
        from shoal.cli import main
        try:
            main()
        finally:
            print("begun", begun, file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("begun [[]]\n")
