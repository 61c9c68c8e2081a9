"""Routings by name: functions of (rng, ranks, tokens, k, experts) that give ids `[R, T, k]`."""

from __future__ import annotations

import numpy as np


def distinct(rng, ranks, tokens, k, experts):
    """Top-k of random logits; with replacement where there are fewer experts than k."""
    if k > experts:
        return duplicates(rng, ranks, tokens, k, experts)
    logits = rng.random((ranks, tokens, experts))
    return np.argsort(logits, axis=-1)[..., :k].astype(np.int32)


def duplicates(rng, ranks, tokens, k, experts):
    return rng.integers(0, experts, (ranks, tokens, k), dtype=np.int32)


def same_expert_k_times(rng, ranks, tokens, k, experts):
    return np.repeat(duplicates(rng, ranks, tokens, 1, experts), k, axis=2)


def masked(rng, ranks, tokens, k, experts):
    ids = distinct(rng, ranks, tokens, k, experts)
    return np.where(rng.random(ids.shape) < 0.4, np.int32(-1), ids)


def empty(rng, ranks, tokens, k, experts):
    return np.full((ranks, tokens, k), -1, np.int32)


def one_assignment(rng, ranks, tokens, k, experts):
    ids = empty(rng, ranks, tokens, k, experts)
    if ids.size:
        ids[ranks // 2, tokens // 2, k // 2] = experts // 2
    return ids


def one_expert(rng, ranks, tokens, k, experts):
    return np.full((ranks, tokens, k), experts - 1, np.int32)


def one_rank(rng, ranks, tokens, k, experts):
    local = experts // ranks
    return (rng.integers(0, local, (ranks, tokens, k)) + ranks // 2 * local).astype(np.int32)


def rank_sends_nothing(rng, ranks, tokens, k, experts):
    ids = distinct(rng, ranks, tokens, k, experts)
    ids[0] = -1
    return ids


def rank_receives_nothing(rng, ranks, tokens, k, experts):
    ids = distinct(rng, ranks, tokens, k, experts)
    return np.where(ids // (experts // ranks) == ranks - 1, np.int32(-1), ids)


def ragged_lengths(rng, ranks, tokens, k, experts):
    ids = distinct(rng, ranks, tokens, k, experts)
    for rank in range(ranks):
        ids[rank, rng.integers(0, tokens + 1) :] = -1
    return ids


def skewed(rng, ranks, tokens, k, experts):
    p = 1 / np.arange(1, experts + 1)
    return rng.choice(experts, (ranks, tokens, k), p=p / p.sum()).astype(np.int32)


def out_of_range(rng, ranks, tokens, k, experts):
    ids = duplicates(rng, ranks, tokens, k, experts)
    bad = rng.choice(
        np.array([-2, -7, experts, experts + 3, 2**31 - 1, -(2**31)], np.int64), ids.shape
    )
    return np.where(rng.random(ids.shape) < 0.3, bad, ids).astype(np.int32)


ALL = (
    distinct,
    duplicates,
    same_expert_k_times,
    masked,
    empty,
    one_assignment,
    one_expert,
    one_rank,
    rank_sends_nothing,
    rank_receives_nothing,
    ragged_lengths,
    skewed,
    out_of_range,
)
