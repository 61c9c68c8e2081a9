"""The machine's own limit: copies of the same bytes into the same kind of memory, by all cores.

* **dispatch**: read the tokens' rows in order, each as often as it is dispatched, and write as many
  bytes as the experts receive.
* **combine**: read the experts' rows once, in order, and write as many bytes as the tokens have.
* **forward**: one after the other. **train**: forward twice, since the backward moves the same
  bytes.

Written memory is fresh, as an XLA result is: an anonymous mapping in which the system is asked for
huge pages (`madvise(MADV_HUGEPAGE)`); mapping and page faults count, unmapping does not. Read
memory is resident. Each core copies blocks that fit its cache, so that a block which is written k
times is read from memory once; several block sizes and one or all cores are tried, and the fastest
counts.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import mmap
import os
import time

import numpy as np

HUGE = 2 << 20
BLOCKS = (64 << 10, 256 << 10, 1 << 20)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fresh(size: int) -> np.ndarray:
    """`size` bytes of a new anonymous mapping, at a huge page's boundary, on huge pages if
    offered."""
    mapping = mmap.mmap(-1, size + HUGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, np.uint8)
    skip = -whole.ctypes.data % HUGE
    return whole[skip : skip + size]


class CopyLimit:
    """Copies `reads` (bytes of tokens, then of experts' rows) as the operations above do."""

    def __init__(self, token_bytes: int, row_bytes: int):
        self.tokens, self.rows = _resident(token_bytes), _resident(row_bytes)
        self.fanout = max(1, row_bytes // max(1, token_bytes))
        self.pool = concurrent.futures.ThreadPoolExecutor(cores())
        self.ways = list(itertools.product(BLOCKS, sorted({1, cores()})))
        self.best: dict[str, tuple[int, int]] = {}

    def seconds(self, op: str) -> float:
        """Time of one turn, in the way that was fastest in three tries of each."""
        if op not in self.best:
            turns = [(min(self._turn(op, *way) for _ in range(3)), way) for way in self.ways]
            self.best[op] = min(turns)[1]
        return self._turn(op, *self.best[op])

    def close(self) -> None:
        self.pool.shutdown()

    def _turn(self, op: str, block: int, threads: int) -> float:
        steps = {"dispatch": "d", "combine": "c", "forward": "dc", "train": "dcdc"}[op]
        start = time.perf_counter()
        results = [self._copy(step, block, threads) for step in steps]
        elapsed = time.perf_counter() - start
        del results
        return elapsed

    def _copy(self, step: str, block: int, threads: int) -> np.ndarray:
        """One operation; its result stays mapped until the turn is over, as an XLA result does."""
        out = fresh(self.rows.size if step == "d" else self.tokens.size)
        work = _expand if step == "d" else _gather
        source = self.tokens if step == "d" else self.rows
        if threads == 1:
            work(source, out, self.fanout, block)
            return out
        parts = zip(_split(source, threads), _split(out, threads), strict=True)
        jobs = [self.pool.submit(work, a, b, self.fanout, block) for a, b in parts]
        for job in jobs:
            job.result()
        return out


def _expand(source: np.ndarray, out: np.ndarray, fanout: int, block: int) -> None:
    """Writes every block of `source` to `fanout` places."""
    size = out.size // fanout
    for copy, start in ((c, s) for s in range(0, source.size, block) for c in range(fanout)):
        part = source[start : min(start + block, size)]
        out[copy * size + start : copy * size + start + part.size] = part


def _gather(source: np.ndarray, out: np.ndarray, fanout: int, block: int) -> None:
    """Reads all of `source`, writes one block in `fanout`; the others go to a block in cache."""
    scratch = np.empty(block, np.uint8)
    for start in range(0, out.size, block):
        width = min(block, out.size - start)
        for copy in range(fanout):
            part = source[copy * out.size + start :][:width]
            target = out[start : start + width] if copy == 0 else scratch[:width]
            target[: part.size] = part


def _split(a: np.ndarray, parts: int) -> list[np.ndarray]:
    size = -(-a.size // parts)
    return [a[i * size : (i + 1) * size] for i in range(parts)]


def _resident(size: int) -> np.ndarray:
    array = fresh(size)
    array[:] = 1
    return array
