"""Memory as Linux counts it, of real processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shoal import Experiment, datasets, memory
from shoal.memory import memory_mb

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")


def test_peaks_of_a_process_and_its_children_count() -> None:
    """100 MB that are held no more, 50 MB of a child's."""
    code = """
        import subprocess, sys
        from shoal.memory import memory_mb

        first = memory_mb()
        bytearray(100_000_000)
        own = memory_mb()
        hold = "held = bytearray(50_000_000); print(flush=True); input()"
        with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            print(own - first, memory_mb() - own)
            child.communicate(b"go")
        print(memory_mb() - own)
    """
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    own, child, after = map(float, said.stdout.split())

    assert 95 < own < 110
    assert 50 < child < 70
    assert -1 < after < 10


def test_what_a_forked_child_or_its_child_has_of_its_parent_counts_once() -> None:
    """100 MB that three hold, 50 MB that the youngest has besides."""
    code = """
        import os
        from shoal.memory import memory_mb

        held, before = bytearray(100_000_000), memory_mb()
        there, ready = os.pipe()
        stays, leaves = os.pipe()
        if not os.fork():
            if not os.fork():
                more = bytearray(50_000_000)
                os.write(ready, b"!")
            os.close(leaves)
            os.read(stays, 1)  # until the first is gone
            os._exit(0)
        os.read(there, 1)
        print(memory_mb() - before)
    """
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)

    assert 50 < float(said.stdout) < 65


def test_a_run_says_what_it_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = datasets.from_arrays([[0.0], [1.0]], [0, 1], clients=["a", "b"])
    run = Experiment(model="linear", data=data, rounds=1, cohort=2).simulate(workers=0, out=tmp_path, progress="plain")

    assert run.summary["memory_mb"] > 50
    assert f" down, {run.summary['memory_mb']:.0f} MB of memory\n" in capsys.readouterr().out


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PROCESSES", tmp_path)

    assert memory_mb() is None
