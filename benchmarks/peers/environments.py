"""Environments for the peers under ``benchmarks/.envs``: each framework with what it needs and nothing of ours.

``python -m benchmarks.peers.environments`` builds those that are missing, with pip. One that cannot be built keeps the
reason in a file beside it, which the benchmark's table then tells.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

__all__ = ["NAMES", "python", "why_not"]

FOLDER = Path(__file__).resolve().parents[1] / ".envs"
TORCH = "torch==2.13.0"
# For each environment the arguments of one pip install after the other.
RECIPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "pfl": (("pfl==0.6.0", TORCH),),
    # 2.0.3 asks for Python 3.12 but runs on 3.11, where PyTorch's CPU build is the one of everybody else here.
    "blazefl": ((TORCH, "numpy", "tqdm>=4.67.1"), ("--ignore-requires-python", "--no-deps", "blazefl==2.0.3")),
    # FedJAX calls jax.tree_map, which JAX has up to 0.4.25; haiku, numpy and scipy have to be of that time.
    "fedjax": (("fedjax==0.0.17", "jax==0.4.25", "jaxlib==0.4.25", "dm-haiku==0.0.12", "numpy<2", "scipy<1.13"),),
    # A JAX of today, for which the peer puts jax.tree_map back.
    "fedjax-new": (("fedjax==0.0.17", "jax==0.10.2", "jaxlib==0.10.2"),),
}
NAMES = tuple(RECIPES)


def python(name: str) -> Path:
    """The environment's interpreter, which may not be there."""
    return FOLDER / name / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def why_not(name: str) -> str | None:
    """Why the environment cannot be used; None if it can."""
    failed = FOLDER / f"{name}.failed"
    if failed.exists():
        return f"cannot be installed: {failed.read_text().strip()}"
    return None if _stamp(name).exists() else "not installed: make bench-peers"


def _stamp(name: str) -> Path:
    return FOLDER / name / "recipe"


def build(name: str) -> bool:
    """Whether the environment is there, made now if it was not, or was made by another recipe."""
    recipe, failed = repr((RECIPES[name], sys.version)), FOLDER / f"{name}.failed"
    if _stamp(name).exists() and _stamp(name).read_text() == recipe:
        return True
    print(f"building {name}", flush=True)
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    failed.unlink(missing_ok=True)
    FOLDER.mkdir(exist_ok=True)
    commands = [[sys.executable, "-m", "venv", str(FOLDER / name)]]
    pip = [str(python(name)), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    for command in [*commands, *([*pip, *arguments] for arguments in RECIPES[name])]:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-300:]]
            failed.write_text(errors[-1] + "\n")
            print(f"{name} failed: {errors[-1]}", file=sys.stderr)
            return False
    _stamp(name).write_text(recipe)
    return True


if __name__ == "__main__":
    for name in NAMES:
        build(name)
