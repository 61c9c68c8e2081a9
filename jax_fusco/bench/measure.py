"""Timing in turn with cold caches, and the memory that a call adds."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import random
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

COLD_BYTES = 128 << 20


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one contestant's runs, in order."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.runs))

    def to_json(self) -> dict[str, Any]:
        low, high = np.percentile(self.runs, [25, 75])
        return {
            "median_ms": round(self.median, 4),
            "p25_ms": round(float(low), 4),
            "p75_ms": round(float(high), 4),
            "min_ms": round(min(self.runs), 4),
            "runs_ms": [round(run, 4) for run in self.runs],
        }


class ColdCaches:
    """Overwrites more memory than caches hold: between the layers of a step others use them."""

    def __init__(self) -> None:
        self._buffer = np.zeros(COLD_BYTES, np.uint8)
        self._turn = 0

    def __call__(self) -> None:
        self._turn += 1
        self._buffer.fill(self._turn % 256)


def seconds(step: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Wall time of one call, to its last result; freeing the results is not timed."""
    start = time.perf_counter()
    result = jax.block_until_ready(step(*arguments))
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def in_turn(
    contestants: dict[str, Callable[[], float]], rounds: int, before: Callable[[], None]
) -> dict[str, Timing]:
    """Runs every contestant once a round, in an order that is drawn anew for each round.

    A turn is an untimed run, `before`, and the timed run. The untimed run leaves the system with
    free pages that have just been in use, as one layer of a step leaves them to the next: on a
    virtual machine whose host takes back what stays free, the first touch of other pages costs 20
    times more, and whoever comes next would pay for it.
    """
    rng = random.Random(0)
    names = list(contestants)
    runs: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in rng.sample(names, len(names)):
            contestants[name]()
            before()
            runs[name].append(contestants[name]() * 1e3)
    return {name: Timing(tuple(values)) for name, values in runs.items()}


def added_memory(step: Callable[..., Any], arguments: tuple[Any, ...]) -> int | None:
    """Bytes by which the process's resident set rises at its highest during one call (Linux: VmHWM
    after a reset), results included; None where the system does not tell."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _resident("VmRSS")
        jax.block_until_ready(step(*arguments))
        return _resident("VmHWM") - before
    except (OSError, AttributeError, KeyError):
        return None


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file if ":" in line)
    return int(lines[field].split()[0]) << 10


def num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
