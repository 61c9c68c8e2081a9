"""Routings by name: functions of (rng, ranks, tokens, k, experts) that give ids `[R, T, k]`."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np


def mixed(draw, shape, experts):
    """(ids `[groups, R, T, k]`, the rng) drawn: any mix of spread, crowded, absent and bad ids."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    width = draw(st.integers(1, experts))  # ids crowd into so many experts ...
    first = draw(st.integers(0, experts - width))  # ... from here on
    ids = rng.integers(first, first + width, shape).astype(np.int32)
    absent, bad = draw(st.sampled_from([0, 0.1, 0.5, 1])), draw(st.sampled_from([0, 0, 0.2]))
    ids[rng.random(ids.shape) < absent] = -1
    invalid = draw(st.sampled_from([-2, experts, 2**31 - 1, -(2**31)]))
    ids[rng.random(ids.shape) < bad] = invalid
    if draw(st.booleans()):  # one rank on its own
        ids[:, draw(st.integers(0, shape[1] - 1))] = draw(st.integers(-1, experts - 1))
    return ids, rng


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
