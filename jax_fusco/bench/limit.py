"""The machine's own limit: copies of the same bytes into the same kind of memory, by all cores.

* **dispatch**: read as many bytes as the experts receive, in order, and write them once.
* **combine**: read the experts' rows once, in order, and write as many bytes as the tokens have.
* **forward**: one after the other. **train**: forward twice; the backward moves the same bytes.

`reads="once"` is a stricter bound for dispatch: a token's row is read from memory once and written
from the cache as often as it is dispatched. Nothing that writes rows in the experts' order can do
that where the tokens of all ranks are larger than the cache.

Written memory is fresh, as an XLA result is: a private anonymous mapping in which the system is
asked for huge pages (`madvise(MADV_HUGEPAGE)`). Mapping and page faults count, unmapping does not.
Read memory is resident. Several block sizes are tried, and the fastest counts.
"""

from __future__ import annotations

import concurrent.futures
import mmap
import os
import time
from collections.abc import Callable

import numpy as np

HUGE = 2 << 20
BLOCKS = (64 << 10, 256 << 10, 1 << 20)


# A core's share of fewer bytes is not worth a thread.
SMALLEST_PART = 64 << 10


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fresh(size: int) -> np.ndarray:
    """`size` bytes of a new private mapping, from a huge page's boundary, huge if offered."""
    mapping = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, np.uint8)
    skip = -whole.ctypes.data % HUGE
    return whole[skip : skip + size]


Copy = Callable[[np.ndarray, np.ndarray, int], None]


class CopyLimit:
    """Copies like the operations, for tokens of `token_bytes` that go to `fanout` experts each."""

    def __init__(self, token_bytes: int, fanout: int):
        self.tokens, self.rows = _resident(token_bytes), _resident(token_bytes * fanout)
        self.pool = concurrent.futures.ThreadPoolExecutor(cores())
        self.best: dict[tuple[str, str], tuple[Copy, int]] = {}

    def seconds(self, op: str, reads: str = "all") -> float:
        """Time of one turn; `reads` is "all" or "once"."""
        start = time.perf_counter()
        results = [self.step(step, reads) for step in STEPS[op]]
        elapsed = time.perf_counter() - start
        del results
        return elapsed

    def step(self, step: str, reads: str = "all") -> np.ndarray:
        """Dispatches or combines, in the way that is fastest in three tries of each."""
        key = step, reads
        if key not in self.best:
            tries = []
            for copy in COPIES[key]:
                for block in BLOCKS:
                    tries += [(self._timed(key, copy, block), copy, block) for _ in range(3)]
            self.best[key] = min(tries, key=lambda t: t[0])[1:]
        return self.copy(key, *self.best[key])

    def copy(self, key: tuple[str, str], copy: Copy, block: int) -> np.ndarray:
        """The result of one copy, which all cores share; it stays mapped as long as it is held."""
        dispatch = key[0] == "dispatch"
        source = self.tokens if key == ("dispatch", "once") else self.rows
        out = fresh(self.rows.size if dispatch else self.tokens.size)
        small = self.tokens.size < SMALLEST_PART * cores() or self.tokens.size % (64 * cores())
        parts = 1 if small else cores()
        pairs = zip(np.split(source, parts), np.split(out, parts), strict=True)
        jobs = [self.pool.submit(copy, a, b, block) for a, b in pairs]
        for job in jobs:
            job.result()
        return out

    def _timed(self, key: tuple[str, str], copy: Copy, block: int) -> float:
        start = time.perf_counter()
        result = self.copy(key, copy, block)
        elapsed = time.perf_counter() - start
        del result
        return elapsed

    def close(self) -> None:
        self.pool.shutdown()


def _copy(source: np.ndarray, out: np.ndarray, block: int) -> None:
    for start in range(0, out.size, block):
        out[start : start + block] = source[start : start + block]


def _repeat(source: np.ndarray, out: np.ndarray, block: int) -> None:
    """Every 4 KiB of `source` several times in a row."""
    width, fanout = min(4096, source.size), out.size // source.size
    pages, step = source.size // width, max(1, block // width)
    rows = source[: pages * width].reshape(pages, 1, width)
    places = out[: rows.size * fanout].reshape(pages, fanout, width)
    for start in range(0, pages, step):
        places[start : start + step] = rows[start : start + step]
    out[places.size :].reshape(fanout, -1)[:] = source[rows.size :]


def _gather_by_copy(source: np.ndarray, out: np.ndarray, block: int) -> None:
    """Copies one part of `source` to `out`, the others to a block that stays in the cache."""
    scratch = np.empty(block, np.uint8)
    for start in range(0, out.size, block):
        end = min(start + block, out.size)
        out[start:end] = source[start:end]
        for part in range(out.size, source.size, out.size):
            scratch[: end - start] = source[part + start : part + end]


def _gather_by_maximum(source: np.ndarray, out: np.ndarray, block: int) -> None:
    """Copies one part of `source`, and reads the others without writing: a vectorised maximum."""
    _copy(source[: out.size], out, block)
    for start in range(out.size, source.size, 4 * block):
        part = source[start : start + 4 * block]
        part[: part.size // 8 * 8].view(np.uint64).max(initial=0)


STEPS = {
    "dispatch": ("dispatch",),
    "combine": ("combine",),
    "forward": ("dispatch", "combine"),
    "train": ("dispatch", "combine") * 2,
}
COPIES: dict[tuple[str, str], tuple[Copy, ...]] = {
    ("dispatch", "all"): (_copy,),
    ("dispatch", "once"): (_repeat,),
    ("combine", "all"): (_gather_by_copy, _gather_by_maximum),
    ("combine", "once"): (_gather_by_copy, _gather_by_maximum),
}


def _resident(size: int) -> np.ndarray:
    array = fresh(size)
    array[:] = 1
    return array
