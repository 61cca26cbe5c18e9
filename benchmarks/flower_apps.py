"""Flower apps, unmodified, on flwr's own simulation and on Shoal: are the results equal, and how long does each take?

    python -m benchmarks.flower_apps                       # all of tests/flower/apps, both ways, in turns
    python -m benchmarks.flower_apps --apps legacy,trees
    python -m benchmarks.flower_apps --record              # and keep flwr's results for the tests

Each run is a process of its own, from its start to its end (:mod:`benchmarks.flower_ways`). Apps choose their cohorts
by names or ask everybody, because flwr gives its nodes new ids in every run. How long rounds take is measured by
:mod:`benchmarks.flower_speed`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.flower_ways import distance, under_flower, under_shoal

APPS = Path(__file__).parent.parent / "tests" / "flower" / "apps"
EXPECTED = APPS.parent / "expected.json"
NODES = 4
TOLERANCES = {"secagg": 1e-3, "trees": 1e-5}  # one rounds at random, the other computes in single precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--apps", default=",".join(sorted(path.parent.name for path in APPS.glob("*/pyproject.toml"))))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.record:
            for name in options.apps.split(","):
                record(name, Path(folder))
        else:
            compare(options.apps.split(","), Path(folder))


def record(name: str, folder: Path) -> None:
    """Keep flwr's result of an app for the tests."""
    kept = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {"results": {}}
    done = under_flower(APPS / name, NODES, {}, folder)
    kept |= {"flwr": version("flwr"), "nodes": NODES}
    kept["results"][name] = [array.tolist() for array in done.arrays.values()]
    EXPECTED.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    print(json.dumps({"app": name, "recorded": True, "seconds": round(done.seconds, 2)}), flush=True)


def compare(names: Sequence[str], folder: Path) -> None:
    """Both ways, in turns; the exit code is 0 if all results are equal."""
    wrong = []
    for name in names:
        theirs, ours = (under(APPS / name, NODES, {}, folder) for under in (under_flower, under_shoal))
        apart = distance(theirs.arrays, ours.arrays)
        equal = apart <= TOLERANCES.get(name, 1e-9)
        wrong += [] if equal else [name]
        seconds = {"flwr": round(theirs.seconds, 2), "shoal": round(ours.seconds, 2)}
        print(json.dumps({"app": name, "equal": equal, "apart": apart, "seconds": seconds}), flush=True)
    sys.exit(f"differ: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
