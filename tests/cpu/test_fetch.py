"""How plain XLA moves rows: all of them to all ranks, or in slices those that a rank asks for."""

from __future__ import annotations

import contextlib
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
from helpers import assert_same_bits, per_rank, rows_in_slices
from hypothesis import given

from jax_fusco import fetch
from jax_fusco.mesh import Axis

# Ranks, rows and requests of each, shapes and dtypes of the rows of each array, requests expected,
# whether to ask for rows in slices, and whether the ranks are an axis of `jax.vmap`.
CASES = (
    (4, 32, 40, {(3,): "u2"}, 40, True, False),
    (4, 32, 40, {(3,): "u2"}, 40, False, False),
    (8, 5, 40, {(2, 2): "u1", (): "u4"}, 4, True, False),
    (3, 9, 7, {(0,): "u1", (1,): "u4"}, 1000, True, False),
    (2, 1, 1, {(): "u4"}, 0, True, False),
    (1, 6, 7, {(2,): "u4"}, 7, True, False),
    (4, 6, 0, {(2,): "u4"}, 7, True, False),
    (4, 32, 40, {(3,): "u2"}, 10, True, True),
)


@functools.cache
def program(case):
    ranks, *_, expected, in_slices, mapped = CASES[case]

    def local(arrays, owner, row):
        axis = Axis(("expert",), ranks)
        return fetch.fetch(arrays, owner, row, axis=axis, expected=expected)

    run = jax.vmap(local, axis_name="expert") if mapped else per_rank(local, ranks)
    jitted = jax.jit(run)

    def call(*arguments):
        with rows_in_slices() if in_slices else contextlib.nullcontext():
            return jitted(*arguments)

    return call


@given(
    case=st.sampled_from(range(len(CASES))),
    hot=st.booleans(),
    absent=st.sampled_from([0, 0.3, 1]),
    seed=st.integers(0, 2**32 - 1),
)
@hypothesis.settings(max_examples=80)
def test_rows_come_from_their_owners(case, hot, absent, seed):
    ranks, number, requests, kinds, *_ = CASES[case]
    rng = np.random.default_rng(seed)
    owner = rng.integers(ranks - 1 if hot else 0, ranks, (ranks, requests), np.int32)
    row = rng.integers(0, number, (ranks, requests), np.int32)
    row = np.where(rng.random(row.shape) < absent, rng.integers(-2, 0, row.shape, np.int32), row)
    arrays = tuple(
        rng.integers(0, 256, (ranks, number, *shape)).astype(dtype)
        for shape, dtype in kinds.items()
    )
    want = tuple(np.zeros((ranks, requests, *x.shape[2:]), x.dtype) for x in arrays)
    for out, x in zip(want, arrays, strict=True):
        for rank, request in np.ndindex(row.shape):
            if row[rank, request] >= 0:
                out[rank, request] = x[owner[rank, request], row[rank, request]]
    jax.tree.map(assert_same_bits, program(case)(arrays, owner, row), want)
