"""Running an experiment here: from the start, or from where an earlier run ended."""

from __future__ import annotations

import shutil
import sys
import time
import tomllib
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from shoal.client.process import cores
from shoal.compose import Composition, Place
from shoal.execute import Execution, come_back, environment
from shoal.experiment import UNNAMED, Experiment
from shoal.progress import Display, display
from shoal.protos.errors import ExperimentError, RunError
from shoal.run import Run
from shoal.server.coordinator import Coordinator
from shoal.server.runs import RunFolder
from shoal.simulations.blocks import EngineName, Method
from shoal.simulations.fleet import LEAN, SimulatedFleet
from shoal.simulations.nursery import do
from shoal.simulations.planner import plan
from shoal.simulations.pool import WORKER

__all__ = ["complete", "resume", "simulate"]

PATIENCE = 10.0  # seconds
MAY_CHANGE = frozenset({"rounds", "evaluation", "target", "checkpoint_every"})


def simulate(
    experiment: Experiment,
    *,
    engine: str,
    workers: int | None,
    progress: str,
    out: Path,
    path: Path | None = None,
    ray_address: str | None = None,
) -> Run:
    """Run an experiment from the start; see :meth:`shoal.Experiment.simulate`. ``path`` is a folder of its own."""
    place = _place(experiment, engine, workers, ray_address)
    if place.workers and not place.on_ray:
        do(WORKER, "shoal.experiment")  # while the data is read
    engine = "auto" if engine == "ray" else engine
    method, show = None if engine == "auto" else Method.read(engine), display(progress)
    composition = Composition(experiment)
    composition.check_simulation()
    if engine != "auto":
        composition.check_engine(cast(EngineName, engine.partition(":")[0]))
    with closing(RunFolder.create(out, experiment.name) if path is None else RunFolder.make(path)) as folder:
        folder.claim()
        folder.write("experiment.toml", experiment.toml())
        env = environment(composition, engine, place.workers, _population(composition))
        folder.write("env.json", env | ({"ray": {"address": place.address}} if place.on_ray else {}))
        return _simulated(composition, folder, place, show, engine, method).run(composition.start())


def complete(experiment: Experiment, path: Path, *, engine: str, workers: int) -> Run:
    """A whole run in a folder of its own: from where an earlier process left it, or from the start; no word of it.

    What an earlier process left and nobody can read is dropped.
    """
    if path.exists():
        with closing(RunFolder(path)) as folder:
            _claim_soon(folder)
            try:
                return _resume(folder, experiment, None, display("none"))
            except RunError as error:
                print(f"{path} is begun anew: {error}", file=sys.stderr)
                shutil.rmtree(path)
    return simulate(experiment, engine=engine, workers=workers, progress="none", out=path.parent, path=path)


def _claim_soon(folder: RunFolder) -> None:
    """A worker whose parent was killed ends within a second or two, and holds its folder until then."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return folder.claim()
        except RunError:
            if time.monotonic() > until:
                raise
        time.sleep(0.1)


def _place(experiment: Experiment, engine: str, workers: int | None, ray_address: str | None) -> Place:
    if engine == "ray" or ray_address is not None:
        if find_spec("ray") is None:
            raise ExperimentError("the engine 'ray' needs Ray, which is not installed; pip install 'shoal[ray]'")
        return Place(workers, True, ray_address)
    if workers is not None and workers < 0:
        raise ExperimentError(f"workers is {workers}; it must be 0 (in this process) or more")
    if workers is None:
        workers = cores() if experiment.device == "cpu" else 1
    return Place(workers)


def _simulated(
    composition: Composition, folder: RunFolder, place: Place, show: Display, engine: str, method: Method | None
) -> Execution:
    """Without a ``method``, the best one for the engine is found before the first round, and recorded."""

    def ready(coordinator: Coordinator) -> None:
        fleet = coordinator.fleet
        if method is not None or not isinstance(fleet, SimulatedFleet):
            return
        done = coordinator.point.round
        found = plan(fleet, coordinator.ask(done + 1), engine, coordinator.plan.rounds - done)
        fleet.method = found.method
        folder.write("env.json", folder.read("env.json") | {"engine": str(found.method), "plan": asdict(found)})
        if found.measured:
            show.planned(str(found))

    return Execution(
        composition,
        folder,
        show,
        engine=f"{engine} {place}",
        population=_population(composition),
        make_fleet=lambda: composition.simulated(place, method or LEAN),
        shards=composition.shards,
        ready=ready,
    )


def _population(composition: Composition) -> int:
    return 0 if composition.data is None else len(composition.data.clients)


def resume(
    path: str | Path, *, rounds: int | None = None, experiment: Experiment | None = None, progress: str = "auto"
) -> Run:
    """Go on with an interrupted run, to the same bits as if it had not been; ``rounds`` makes it longer.

    A run that was served is served again, at the same address. ``experiment`` is needed only if the run was made from
    Python objects that a file cannot name.
    """
    show = display(progress)
    with closing(RunFolder.open(Path(path))) as folder:
        if folder.has("comparison.toml"):
            raise RunError(f"{folder.path} is a comparison; the command that began it goes on with it")
        folder.claim()
        if folder.has("summary.json") and "flower" in tomllib.loads(folder.experiment()):
            return _resume_flower(folder, rounds, show)
        return _resume(folder, experiment, rounds, show)


def _resume_flower(folder: RunFolder, rounds: int | None, show: Display) -> Run:
    if rounds is not None:
        raise RunError(f"the rounds of {folder.path} are its Flower app's own; start a new run with more of them")
    from shoal.flower.running import resume  # flwr, which nothing else needs

    return resume(folder, show)


def _resume(folder: RunFolder, experiment: Experiment | None, rounds: int | None, show: Display) -> Run:
    kept = folder.experiment()
    experiment = _kept_experiment(folder, kept) if experiment is None else experiment
    experiment = experiment if rounds is None else replace(experiment, rounds=rounds)
    _check_same(kept, experiment.toml())
    recorded = folder.read("env.json")
    if "served" in recorded:  # journal and audit log want a checkpoint of each round
        experiment = replace(experiment, checkpoint_every=1)
    composition = Composition(experiment)
    done = folder.latest()
    if done is not None and folder.read("summary.json")["status"] == "finished":
        if done.stopped:
            raise RunError(f"{folder.path} was stopped after round {done.round}: {done.stopped}; it is finished")
        if done.round >= experiment.rounds:
            raise RunError(f"{folder.path} has all its {done.round} rounds; make it longer with --rounds (rounds=…)")
    with _again(composition, folder, recorded, show) as execution:
        folder.write("experiment.toml", experiment.toml())
        return execution.run(come_back(composition, folder))


def _again(
    composition: Composition, folder: RunFolder, recorded: dict[str, Any], show: Display
) -> AbstractContextManager[Execution]:
    if "served" in recorded:
        from shoal.serve import served  # gRPC, which a simulation does not need

        return served(composition, folder, recorded, show)
    composition.check_simulation()
    engine = str(recorded["engine"])
    method = None if engine == "auto" else Method.read(engine)  # None: it ended while it was being measured
    on_ray = "ray" in recorded
    place = Place(recorded["workers"], on_ray, recorded["ray"]["address"] if on_ray else None)
    return nullcontext(_simulated(composition, folder, place, show, engine, method))


def _kept_experiment(folder: RunFolder, kept: str) -> Experiment:
    first = kept.partition("\n")[0]
    if first.startswith(UNNAMED):
        raise RunError(
            f"{folder.path} was made from Python objects ({first.removeprefix(UNNAMED).strip()}); "
            f"resume it from Python with shoal.resume(path, experiment=...)"
        )
    return Experiment.from_file(folder.path / "experiment.toml")


def _check_same(kept: str, given: str) -> None:
    """A resumed run is the same experiment; only how long and how it is watched may change."""
    before, now = tomllib.loads(kept), tomllib.loads(given)
    for key in sorted(before.keys() | now.keys()):
        if key not in MAY_CHANGE and before.get(key) != now.get(key):
            raise RunError(
                f"'{key}' differs from the run's own ({before.get(key)!r}, now {now.get(key)!r}); resume with the same "
                f"experiment, or start a new run"
            )
