"""What a Flower app uses, and how much of that Shoal runs: ``shoal flower doctor PATH``.

The app's code is read, not run; only its ServerApp and ClientApp are looked up, because flwr looks them up too.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from shoal.flower.app import FlowerApp

__all__ = ["Finding", "diagnose"]

Verdict = Literal["runs", "differs", "not supported"]

# What is looked for: a name as it is imported or called, what it is, and what becomes of it here.
KNOWN: dict[str, tuple[Verdict, str]] = {
    "flwr.serverapp.ServerApp": ("runs", "a ServerApp"),
    "flwr.clientapp.ClientApp": ("runs", "a ClientApp"),
    "flwr.client.NumPyClient": ("runs", "legacy clients"),
    "flwr.client.Client": ("runs", "legacy clients"),
    "flwr.server.ServerAppComponents": ("differs", "the legacy server: its runs cannot be resumed"),
    "flwr.server.LegacyContext": ("differs", "the legacy workflow: its runs cannot be resumed"),
    "flwr.server.workflow.SecAggPlusWorkflow": ("runs", "secure aggregation (SecAgg+)"),
    "flwr.server.workflow.SecAggWorkflow": ("runs", "secure aggregation (SecAgg)"),
    "flwr.simulation.run_simulation": (
        "not supported",
        "it starts Ray itself; use the apps' folder, or shoal.flower.run",
    ),
    "flwr.simulation.start_simulation": (
        "not supported",
        "Flower's oldest interface; write a ServerApp and a ClientApp",
    ),
    "flwr.server.start_server": (
        "not supported",
        "Flower's gRPC server; write a ServerApp and run it with 'shoal flower server'",
    ),
    "flwr.client.start_client": (
        "not supported",
        "a client of Flower's gRPC server; write a ClientApp and run it with 'shoal flower client'",
    ),
    "flwr.client.start_numpy_client": (
        "not supported",
        "a client of Flower's gRPC server; write a ClientApp and run it with 'shoal flower client'",
    ),
    "flwr.agentapp": ("not supported", "agents"),
    "flwr_datasets": ("runs", "Flower's data sets: they need a network, or a folder of your own"),
}
MODS = ("flwr.clientapp.mod.", "flwr.client.mod.")
STRATEGIES = ("flwr.serverapp.strategy.", "flwr.server.strategy.")
GLOBALS = {"np.random.seed", "random.seed", "torch.manual_seed", "numpy.random.seed"}


@dataclass(frozen=True)
class Finding:
    """One thing that an app uses; ``where`` is file:line."""

    verdict: Verdict
    what: str
    where: str


def diagnose(path: str | Path) -> list[Finding]:
    """What the app in this folder uses, in the order of its files; ExperimentError if it is no app."""
    app = FlowerApp.read(path)
    trees = {name: _parsed(name, content) for name, content in app.files().items() if name.endswith(".py")}
    own = _own_modules(app.path)
    found = list(_named_apps(app, trees, own))
    for name, tree in trees.items():
        found += [tree] if isinstance(tree, Finding) else _in_file(tree, name, own)
    seen = dict[str, Finding]()
    for finding in found:
        seen.setdefault(finding.what, finding)
    return list(seen.values())


def _parsed(name: str, content: bytes) -> ast.Module | Finding:
    try:
        return ast.parse(content, filename=name)
    except (SyntaxError, ValueError) as error:  # ValueError: it holds a null byte
        line = getattr(error, "lineno", None) or 1
        return Finding("not supported", f"{name} is no Python ({getattr(error, 'msg', error)})", f"{name}:{line}")


def _own_modules(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} | {path.name for path in folder.iterdir() if path.is_dir()}


def _named_apps(app: FlowerApp, trees: Mapping[str, ast.Module | Finding], own: Collection[str]) -> Iterator[Finding]:
    """Whether what the pyproject names is there, where flwr finds it too: assigned by name, at the top of a module."""
    for kind, reference in (("ServerApp", app.server), ("ClientApp", app.client)):
        module, _, attribute = reference.partition(":")
        place, top = module.replace(".", "/"), module.partition(".")[0]
        file = next((file for file in (f"{place}.py", f"{place}/__init__.py") if file in trees), None)
        if file is not None:
            tree = trees[file]
            if isinstance(tree, ast.Module):  # that it is none is told of the file
                yield from _named_in(tree, f"{kind} {reference}", attribute.partition(".")[0], file)
        elif top in own or not _is_installed(top):
            yield Finding("not supported", f"{kind} {reference}: there is no module {module!r}", "pyproject.toml")
        else:
            yield Finding("differs", f"{kind} {reference}: its module is not in the folder but an installed one", "")


def _named_in(tree: ast.Module, what: str, sought: str, where: str) -> Iterator[Finding]:
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    if sought in {target.id for target in targets if isinstance(target, ast.Name)}:
        return
    if not {sought, "*", "__getattr__"}.isdisjoint(_bound(tree)):
        yield Finding("differs", f"{what}: Shoal loads it, flwr itself wants '{sought} = …' at top level", where)
    else:
        yield Finding("not supported", f"{what}: its module has no {sought!r}", where)


def _bound(tree: ast.AST) -> set[str]:
    """All names that are given to anything in a module, at its top or not; ``*`` for what that brings."""
    found = set[str]()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                found |= {alias.asname or alias.name.partition(".")[0] for alias in names}
    return found


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _missing(tree: ast.Module, own: Collection[str], name: str) -> Iterator[Finding]:
    """Imports that every load makes: not those in functions, nor those that a ``try`` expects to fail."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        for module in {module.partition(".")[0] for module in modules}:
            if module not in own and not _is_installed(module):
                yield Finding("not supported", f"the package {module}: it is not installed", f"{name}:{node.lineno}")


def _in_file(tree: ast.Module, name: str, own: Collection[str]) -> Iterator[Finding]:
    yield from _missing(tree, own, name)
    for line, used in _imports(tree):
        yield from _judged(used, f"{name}:{line}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node).endswith("context.state"):
            yield Finding(
                "runs", "state of nodes, kept from message to message and across a resume", f"{name}:{node.lineno}"
            )
        if isinstance(node, ast.Call) and ast.unparse(node.func) in GLOBALS:
            yield Finding(
                "runs", f"{ast.unparse(node.func)}: the app's own seed wins over --seed", f"{name}:{node.lineno}"
            )
        if isinstance(node, ast.FunctionDef) and node.name == "start" and "initial_arrays" in ast.unparse(node.args):
            yield Finding(
                "differs", "a strategy with a start of its own: no checkpoints, so no resume", f"{name}:{node.lineno}"
            )


def _imports(tree: ast.AST) -> Sequence[tuple[int, str]]:
    """Full names that a module imports, and their lines; also ``fl.server.x`` after ``import flwr as fl``."""
    found, aliases = list[tuple[int, str]](), dict[str, str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
            aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
            aliases |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in aliases and aliases[root].startswith("flwr"):
                found.append((node.lineno, f"{aliases[root]}.{rest}"))
    return found


def _judged(name: str, where: str) -> Iterator[Finding]:
    short = name.rpartition(".")[2]
    if name.startswith(MODS) and short.endswith(("mod", "Mod")):
        yield Finding("runs", f"the mod {short}", where)
    elif name.startswith(STRATEGIES) and short[:1].isupper() and short not in ("Strategy", "Result"):
        yield Finding("runs", f"the strategy {short}", where)
    elif name.startswith("flwr.") and any(f".{part}." in f"{name}." for part in ("supercore", "superlink", "proto")):
        yield Finding("differs", f"{name}, an internal of flwr's that may not be what it is under flwr run", where)
    for known, (verdict, what) in KNOWN.items():
        if name == known or name.startswith(f"{known}."):
            yield Finding(verdict, f"{known.rpartition('.')[2]}: {what}", where)
