"""Every contestant's results against NumPy, before anything is timed."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jax_fusco.bench.cases import Case
from jax_fusco.bench.rivals import Shuffle

SAMPLE = 256
"""Tokens, and buffer rows of each rank, that are compared (all of them where there are fewer)."""


class WrongResult(AssertionError):
    """A contestant's values differ from the oracle's."""


class Oracle:
    """The expected results of a case, in float32 from the same bf16 inputs."""

    def __init__(self, case: Case):
        s, self.case = case.sizes, case
        ids = case.host_ids.reshape(-1)
        order = np.argsort(ids, kind="stable")
        owner = ids[order] // s.local_experts
        self.loads = np.bincount(owner, minlength=s.ranks)
        first = np.cumsum(self.loads) - self.loads
        self.slot = np.empty(ids.size, np.int64)
        self.slot[order] = np.arange(ids.size) - first[owner] + owner * s.capacity
        self.group_sizes = np.bincount(ids, minlength=s.experts)
        rng = np.random.default_rng(0)
        count = min(SAMPLE, s.ranks * s.tokens)
        self.tokens = np.sort(rng.choice(s.ranks * s.tokens, count, replace=False))
        drawn = [rng.integers(0, load, min(SAMPLE, load)) for load in self.loads]
        self.rows = np.concatenate([rows + r * s.capacity for r, rows in enumerate(drawn)])
        self.row_tokens = _lookup(self.slot, self.rows) // s.k
        self.weights = np.asarray(case.weights)[self.tokens]
        self.layer: np.ndarray | None = None

    def check(self, op: str, shuffle: Shuffle, result: Any, plan: Any) -> None:
        """Raises WrongResult unless `result` of `shuffle` is right."""
        compare = getattr(self, f"_{op}", None)
        if compare is not None:
            compare(shuffle.name, result, plan)

    def groups(self, name: str, group_sizes: jax.Array) -> None:
        _equal(f"{name}: group sizes", np.asarray(group_sizes), self.group_sizes)

    def _dispatch(self, name: str, rows: jax.Array, plan: Any) -> None:
        expected = _bits(self.case.x, self.row_tokens)
        _equal(f"{name}: dispatched rows", _bits(rows, self.rows), expected)

    def _combine(self, name: str, out: jax.Array, plan: Any) -> None:
        k = self.case.sizes.k
        slots = self.slot.reshape(-1, k)[self.tokens]
        y = _floats(self.case.y, slots.reshape(-1)).reshape(*slots.shape, -1)
        expected = np.einsum("tk,tkd->td", self.weights, y)
        bound = np.einsum("tk,tkd->td", self.weights, np.abs(y))
        _close(f"{name}: combined rows", _floats(out, self.tokens), expected, bound)

    def _forward(self, name: str, out: jax.Array, plan: Any) -> None:
        x = _floats(self.case.x, self.tokens)
        expected = x * self.weights.sum(1, keepdims=True)
        _close(f"{name}: outputs", _floats(out, self.tokens), expected, np.abs(expected))

    def _layer(self, name: str, out: jax.Array, plan: Any) -> None:
        """Against the first contestant: all share one grouped product."""
        got = _floats(out, self.tokens)
        if self.layer is None:
            self.layer = got
        bound = np.abs(self.layer).max(1, keepdims=True)
        _close(f"{name}: outputs of the layer", got, self.layer, bound)

    def _train(self, name: str, results: Any, plan: Any) -> None:
        out, dx, dweights = results
        self._forward(name, out, plan)
        x, g = _floats(self.case.x, self.tokens), _floats(self.case.g, self.tokens)
        expected = g * self.weights.sum(1, keepdims=True)
        _close(f"{name}: gradient of x", _floats(dx, self.tokens), expected, np.abs(expected))
        dots = np.broadcast_to((x * g).sum(1, keepdims=True), self.weights.shape)
        bound = np.broadcast_to(np.abs(x * g).sum(1, keepdims=True), dots.shape)
        _close(f"{name}: gradient of weights", np.asarray(dweights)[self.tokens], dots, bound)


def _lookup(slot: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The assignment in each of `rows`."""
    order = np.argsort(slot)
    return order[np.searchsorted(slot[order], rows)]


def _bits(array: jax.Array, rows: np.ndarray) -> np.ndarray:
    return np.asarray(array).view(np.uint16)[rows]


def _floats(array: jax.Array, rows: np.ndarray) -> np.ndarray:
    return (_bits(array, rows).astype(np.uint32) << 16).view(np.float32)


def _equal(what: str, got: np.ndarray, expected: np.ndarray) -> None:
    if not np.array_equal(got, expected):
        raise WrongResult(f"{what}: {np.sum(got != expected)} of {expected.size} values differ")


def _close(what: str, got: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> None:
    """Rivals may round partial sums to bf16: a few units of it in the sum of magnitudes."""
    error = np.abs(got - expected) / (2.0**-8 * bound + 1e-6)
    if not np.all(error <= 8):
        raise WrongResult(f"{what}: off by {error.max():.1f} bf16 units of the sum of magnitudes")
