"""Data sets that papers generate: made here, from a number for the draw, by the recipes of their authors."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt

from shoal.client.data import Table, table

__all__ = ["fcube", "synthetic"]

Number = Annotated[int, Gt(0)]
Deviation = Annotated[float, Ge(0)]
Draw = Annotated[int, Ge(0)]


def synthetic(
    alpha: Deviation = 1.0, beta: Deviation = 1.0, clients: Number = 30, draw: Draw = 0, iid: bool = False
) -> Table:
    """Synthetic(α, β) of FedProx (Li et al. 2020, MLSys): 60 features, 10 classes, log-normal sizes of at least 50.

    Client k labels by argmax(x W + b) with W and b ~ N(uₖ, 1), uₖ ~ N(0, α²), and sees x ~ N(vₖ, Σ) with vₖ ~ N(Bₖ, 1),
    Bₖ ~ N(0, β²), Σ = diag(j^−1.2): α is how far models differ, β how far features do (standard deviations, as in the
    authors' code). With ``iid`` all share one W and b ~ N(0, 1), and v = 0.
    """
    rng = np.random.default_rng(draw)
    sizes = rng.lognormal(4, 2, clients).astype(int) + 50
    scales = np.arange(1, 61) ** -0.6  # roots of the variances j^−1.2
    common = (rng.normal(0, 1, (60, 10)), rng.normal(0, 1, 10)) if iid else None
    parts = []
    for size in sizes:
        u, b = (0.0, 0.0) if iid else (rng.normal(0, alpha), rng.normal(0, beta))
        v = np.zeros(60) if iid else rng.normal(b, 1, 60)
        weights, bias = common or (rng.normal(u, 1, (60, 10)), rng.normal(u, 1, 10))
        x = rng.normal(v, scales, (size, 60))
        parts.append((x.astype(np.float32), (x @ weights + bias).argmax(1)))
    ids = np.repeat([f"d{client}" for client in range(clients)], sizes)
    return table(np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts]), ids)


def fcube(examples: Number = 4000, test: Number = 1000, draw: Draw = 0) -> tuple[Table, Table]:
    """FCUBE of NIID-Bench (Li et al. 2022, ICDE): points of [−1, 1]³, labelled by the side of the plane x₁ = 0.

    Four clients, each with an octant and the one that is symmetric to it about the origin.
    """
    rng = np.random.default_rng(draw)
    x, y = _cube(examples, rng)
    octant = (x > 0) @ np.array([4, 2, 1])
    return table(x, y, np.minimum(octant, 7 - octant)), table(*_cube(test, rng))


def _cube(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    x = rng.uniform(-1, 1, (count, 3)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64)
