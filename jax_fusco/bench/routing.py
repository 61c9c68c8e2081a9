"""Routings: which experts each token goes to, made with NumPy from a seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Ids = np.ndarray


def _distinct(rng: np.random.Generator, log_weights: np.ndarray, tokens: int, k: int) -> Ids:
    """k distinct experts per token, drawn in proportion to their weights (Gumbel top-k)."""
    scores = log_weights + rng.gumbel(size=(tokens, log_weights.size))
    return np.argpartition(-scores, k - 1, axis=1)[:, :k].astype(np.int32)


def uniform(rng: np.random.Generator, tokens: int, k: int, experts: int, ranks: int) -> Ids:
    """Every expert is equally likely."""
    del ranks
    return _distinct(rng, np.zeros(experts), tokens, k)


def zipf(rng: np.random.Generator, tokens: int, k: int, experts: int, ranks: int) -> Ids:
    """The n-th most popular expert has weight 1/n; popularity is shuffled over the experts."""
    del ranks
    return _distinct(rng, -np.log(1.0 + rng.permutation(experts)), tokens, k)


def one_rank(rng: np.random.Generator, tokens: int, k: int, experts: int, ranks: int) -> Ids:
    """Every token goes to experts of rank 0 (to some of them twice where it has fewer than k)."""
    local = experts // ranks
    first = rng.integers(0, local, size=(tokens, 1))
    return ((first + np.arange(k)) % local).astype(np.int32)


ROUTINGS: dict[str, Callable[[np.random.Generator, int, int, int, int], Ids]] = {
    "uniform": uniform,
    "zipf": zipf,
    "one-rank": one_rank,
}


def loads(ids: Ids, experts: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Assignments that each rank receives `[R]`, and that each pair (source, destination) exchanges
    `[R, R]`, for `ids` of all ranks `[R * T, k]`."""
    owners = (ids // (experts // ranks)).reshape(ranks, -1)
    pairs = np.stack([np.bincount(row, minlength=ranks) for row in owners])
    return pairs.sum(0), pairs
