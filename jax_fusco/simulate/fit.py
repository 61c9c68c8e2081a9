"""Fits the five constants of the links to the published times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from jax_fusco.simulate.cluster import CONSTANTS, FUSCO_CLUSTER, Cluster
from jax_fusco.simulate.published import CELLS, ROW_BYTES, Cell, workload
from jax_fusco.simulate.ways import seconds

START = (150.0, 25.0, 700.0, 50.0, 50.0)
BOUNDS = ((10.0, 1.0, 50.0, 1.0, 2.0), (900.0, 50.0, 3350.0, 2000.0, 2000.0))
"""No faster than the hardware: 900 GB/s, 50 GB/s, 3350 GB/s, a microsecond, two."""
TARGET = 0.15


def predict(cluster: Cluster, cells: Sequence[Cell] = CELLS) -> np.ndarray:
    """Milliseconds of each cell."""
    return np.array(
        [1e3 * seconds(c.way, workload(c.routing, c.tokens), cluster, ROW_BYTES) for c in cells]
    )


def fit(cells: Sequence[Cell] = CELLS, said: Callable[[], Any] = lambda: None) -> Cluster:
    """The cluster whose times are nearest to the published ones.

    Least squares of the logarithms' differences, with `scipy.optimize.least_squares`; a soft loss,
    so that a few cells that the model cannot reach do not bend the others.

    Args:
      cells: what to fit to.
      said: called at each evaluation.
    """
    published = np.array([cell.milliseconds for cell in cells])

    def residuals(logs: np.ndarray) -> np.ndarray:
        said()
        return np.log(predict(cluster_of(logs), cells) / published)

    low, high = np.log(BOUNDS)
    found = least_squares(
        residuals,
        np.log(START),
        bounds=(low, high),
        loss="soft_l1",
        f_scale=0.1,
        diff_step=1e-3,
        ftol=1e-5,
        xtol=1e-4,
    )
    return cluster_of(found.x)


def cluster_of(logs: np.ndarray) -> Cluster:
    values = dict(zip(CONSTANTS, np.exp(logs).tolist(), strict=True))
    return dataclasses.replace(FUSCO_CLUSTER, **values)


def residuals(cluster: Cluster, cells: Sequence[Cell] = CELLS) -> list[dict[str, Any]]:
    """Each cell, what the model says, and the difference as a part of the published time."""
    return [
        {
            **dataclasses.asdict(cell),
            "model": round(float(model), 2),
            "off": round(float(model / cell.milliseconds - 1), 4),
        }
        for cell, model in zip(cells, predict(cluster, cells), strict=True)
    ]
