"""Rows of a receive buffer: the formula, and that no top-k routing overflows the dropless one."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import oracle
from hypothesis import given

import jax_fusco as jf


@given(
    st.integers(0, 5000),
    st.integers(0, 16),
    st.integers(1, 64),
    st.integers(1, 64),
    st.floats(0, 8, exclude_min=True),
    st.integers(1, 128),
)
def test_formula(tokens, k, local, ranks, factor, alignment):
    got = jf.capacity(tokens, k, local * ranks, ranks, factor=factor, alignment=alignment)
    assert got == oracle.capacity(tokens, k, local * ranks, ranks, factor, alignment)
    assert isinstance(got, int)


def test_defaults():
    assert jf.capacity(4096, 8, 128, 8) == 40960
    assert jf.capacity(4096, 8, 128, 8, alignment=128) == 40960 + 16 * 127
    assert jf.capacity(1, 8, 128, 2, factor=100.0) == 16
    assert jf.capacity(8, 2, 8, 4, factor=np.float32(1.5)) == 24


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 7, 128]), st.integers(1, 4))
def test_dropless_never_drops_distinct_experts(seed, alignment, k):
    rng = np.random.default_rng(seed)
    ranks, local = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    experts = ranks * local
    k = min(k, experts)
    hot = np.exp(rng.standard_normal(experts) * 3)  # from even to hopelessly skewed
    keys = rng.exponential(size=(ranks, 6, experts)) / hot
    ids = np.argsort(keys, axis=-1)[..., :k].astype(np.int32)
    assert (oracle.make_plan(ids, experts, None, alignment).num_dropped == 0).all()
