"""An experiment's data as files, one for each client: what a device would hold."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from shoal.client.sources import write_shard
from shoal.experiment import Experiment
from shoal.protos.errors import DataError, ExperimentError
from shoal.simulations.dataset import Dataset
from shoal.simulations.federated import FederatedData

__all__ = ["shards_of", "split"]


def shards_of(experiment: Path, overrides: Sequence[str]) -> tuple[Experiment, FederatedData]:
    """An experiment, and the shards that ``shoal simulate`` would train on; ExperimentError if it has no data."""
    loaded = Experiment.from_file(experiment, overrides)
    if loaded.data is None:
        raise ExperimentError(f"{str(experiment)!r} has no [data] to split")
    return loaded, loaded.data.split(loaded.seed) if isinstance(loaded.data, Dataset) else loaded.data


def split(experiment: Path, overrides: Sequence[str], folder: Path, replace: bool) -> list[str]:
    """Write the shards that ``shoal simulate`` would train on; sentences about them.

    DataError if the folder holds other shards already, unless they may be replaced.
    """
    _, data = shards_of(experiment, overrides)
    paths, sizes = list[Path](), list[int]()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = list(folder.glob("*.npz"))
        if before and not replace:
            raise DataError(
                f"{str(folder)!r} holds {len(before)} shards already; take another folder, or --replace them"
            )
        for client in data.clients:
            shard = data.shard(client)
            paths.append(write_shard(folder, client, shard))
            sizes.append(len(shard))
        for old in set(before) - set(paths):
            old.unlink()
    except OSError as error:
        raise DataError(f"{str(folder)!r} cannot hold shards ({error.strerror}); give another folder") from error
    return [
        f"{len(paths)} shards of {min(sizes)} to {max(sizes)} examples (median {median(sizes):.0f}) in {folder}",
        f"one client of them: shoal client --connect HOST:PORT --data {shlex.quote(str(paths[0]))}",
    ]
