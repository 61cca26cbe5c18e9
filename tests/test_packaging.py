"""The house: what is on disk is in the wheel, no room imports upward, the front door opens at once."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FLOORS = {"protos": 0, "strategies": 1, "client": 2, "server": 2, "simulations": 3, "shoal": 4}
MODULES = [(room, path) for room in FLOORS for path in sorted((ROOT / room).rglob("*.py"))]


def rooms_imported(path: Path) -> set[str]:
    """The rooms that a module imports, wherever in the file."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    inside = {name.split(".")[1] for name in names if name.startswith("shoal.")}
    return {room if room in FLOORS else "shoal" for room in inside}


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running ``code``."""
    script = f"{code}\nimport sys; print('\\n'.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(("room", "path"), MODULES, ids=[f"{room}/{path.name}" for room, path in MODULES])
def test_no_room_imports_upward(room: str, path: Path) -> None:
    for other in rooms_imported(path) - {room}:
        assert FLOORS[other] < FLOORS[room], f"{room}/{path.name} imports shoal.{other}"


def test_strategies_touch_no_network_files_or_clocks() -> None:
    banned = re.compile(r"^\s*(?:import|from) (grpc|asyncio|pathlib|time|datetime|os)\b", re.MULTILINE)
    for path in (ROOT / "strategies").glob("*.py"):
        assert not banned.search(path.read_text()), path


def test_every_package_on_disk_is_listed() -> None:
    tops = {folder: name for name, folder in SETUPTOOLS["package-dir"].items()}
    found = {
        ".".join([tops[top], *init.parent.relative_to(ROOT / top).parts])
        for top in tops
        for init in (ROOT / top).rglob("__init__.py")
    }

    assert found == set(SETUPTOOLS["packages"])


def test_every_module_is_type_checked() -> None:
    links = {path.name for path in (ROOT / ".types" / "shoal").iterdir()}
    kept = [path for path in (ROOT / "shoal").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    beside = {path.name for path in kept} | {"py.typed"}

    assert links == beside | (FLOORS.keys() - {"shoal"})


@pytest.mark.slow
def test_the_wheel_holds_everything(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves files behind, and takes old ones in
    leave = shutil.ignore_patterns(".*", "build", "dist", "runs", "tests", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=leave, symlinks=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
    tops = {folder: name.replace(".", "/") for name, folder in SETUPTOOLS["package-dir"].items()}
    kept = {".j2", ".py", ".pyi", ".proto", ".npz"}
    wanted = {
        f"{inside}/{path.relative_to(ROOT / top).as_posix()}"
        for top, inside in tops.items()
        for path in (ROOT / top).rglob("*")
        if path.suffix in kept or path.name in ("py.typed", "LICENSE-fashion-mnist")
    }

    assert wanted <= held, wanted - held
    assert {name.split("/")[0] for name in held if "dist-info" not in name} == {"shoal"}


def test_entry_points_lead_somewhere() -> None:
    from shoal.protos import registry

    for group, points in PROJECT["project"]["entry-points"].items():
        assert registry.names(group) == sorted(points), "reinstall: pip install -e ."
        for name in points:
            assert callable(registry.load(group, name))


def test_only_one_package_touches_flwr() -> None:
    touches = re.compile(r"^\s*(?:import|from) flwr\b|import_module\(.flwr", re.MULTILINE)
    for room, path in MODULES:
        if "flower" not in path.relative_to(ROOT).parts:
            assert not touches.search(path.read_text()), f"{room}: {path}"


@pytest.mark.slow
def test_import_shoal_is_light() -> None:
    assert not {"torch", "pandas", "flwr", "numpy"} & loaded_by("import shoal; dir(shoal)")


@pytest.mark.slow
def test_help_is_light() -> None:
    code = "import sys; sys.argv = ['shoal', '--help']\nfrom shoal.cli import app\napp(standalone_mode=False)"

    heavy = {"torch", "pandas", "flwr", "numpy", "pydantic", "grpc", "jinja2", "plotly"}

    assert not heavy & loaded_by(f"{code}\nprint()")


@pytest.mark.slow
def test_protos_and_run_reading_need_no_flwr() -> None:
    loaded = loaded_by("import shoal.protos.codec, shoal.protos.experiment, shoal.protos.registry, shoal.flower")

    assert not {"torch", "pandas", "flwr"} & loaded
    assert not {"flwr", "pandas"} & loaded_by("import shoal.client.participant")


@pytest.mark.slow
def test_a_client_that_waits_needs_no_torch() -> None:
    assert not {"torch", "pandas", "flwr"} & loaded_by("import shoal.connect, shoal.client.host")


def test_public_names_are_sorted_and_exist() -> None:
    import shoal

    assert shoal.__all__ == sorted(shoal.__all__, key=lambda name: (not name[0].isupper(), name))
    for name in shoal.__all__:
        assert getattr(shoal, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = shoal.nothing
