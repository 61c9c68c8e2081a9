"""Drawn routings, shapes, dtypes, alignments, capacities and meshes, against the oracle."""

from __future__ import annotations

import contextlib
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import ml_dtypes
import numpy as np
import oracle
import routings
from helpers import P, assert_same_bits, make_mesh, rows_in_slices, sharded
from hypothesis import given

import jax_fusco as jf

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype("f2"), np.dtype("f4")
# Mesh sizes by axis (the device order is drawn from the index), the expert axis (a tuple names
# the rank row-major), T, k, E_local, d, dtype, alignment, capacity.
CASES = (
    ({"expert": 1}, "expert", 9, 3, 4, 3, F32, 1, None),
    ({"expert": 2}, "expert", 8, 2, 3, 7, BF16, 4, None),
    ({"expert": 2}, "expert", 16, 4, 8, 1, F32, 1, 40),
    ({"expert": 4}, "expert", 5, 3, 2, 17, F16, 1, 11),
    ({"expert": 4}, "expert", 7, 2, 1, 2, F32, 8, 16),
    ({"data": 2, "expert": 4}, "expert", 6, 2, 2, 5, BF16, 1, None),
    ({"expert": 4, "model": 3}, "expert", 4, 2, 3, 4, F32, 3, 10),
    ({"expert": 8}, "expert", 4, 4, 1, 33, F32, 1, 6),
    ({"a": 2, "b": 3}, ("b", "a"), 5, 2, 2, 4, F32, 2, 9),
    ({"expert": 16}, "expert", 3, 2, 1, 6, BF16, 128, None),
)


@functools.cache
def program(case: int, implementation: str, in_slices: bool):
    sizes, axis, _, _, local, _, _, alignment, capacity = CASES[case]
    count = int(np.prod(list(sizes.values())))
    order = np.random.default_rng(case).permutation(count)
    mesh = make_mesh(sizes, order=order)
    names = (axis,) if isinstance(axis, str) else axis
    ranks = int(np.prod([sizes[name] for name in names]))
    others = tuple(name for name in sizes if name not in names)
    spec = P(others or None, names)

    def run(ids, x, y, weights, g_rows, g_out):
        ids, x, y, weights, g_rows, g_out = (a[0, 0] for a in (ids, x, y, weights, g_rows, g_out))
        plan = jf.make_plan(
            ids,
            axis_name=axis,
            num_experts=local * ranks,
            capacity=capacity,
            alignment=alignment,
            implementation=implementation,
        )
        rows, pull_rows = jax.vjp(lambda x: jf.dispatch(x, plan), x)
        out, pull_out = jax.vjp(lambda y, w: jf.combine(y, w, plan), y, weights)
        results = {
            "integers": (
                plan.group_sizes,
                plan.expert_counts,
                plan.slot,
                plan.num_dropped,
                plan.num_invalid,
            ),
            "rows": rows,
            "out": out,
            "dx": pull_rows(g_rows)[0],
            "dy_dweights": pull_out(g_out),
        }
        return jax.tree.map(lambda a: a[None, None], results)

    jitted = sharded(run, mesh, in_specs=spec, out_specs=spec)

    def call(*arguments):
        with rows_in_slices() if in_slices else contextlib.nullcontext():
            return jitted(*arguments)

    return ranks, call


XLA_CASES = (0, 1, 3, 6, 8)  # plain XLA compiles slowly


@st.composite
def shuffles(draw, cases):
    """A case, and ids `[groups, R, T, k]`: any mix of spread, crowded, absent and bad ids."""
    case = draw(st.sampled_from(cases))
    sizes, axis, tokens, k, local, *_ = CASES[case]
    names = (axis,) if isinstance(axis, str) else axis
    ranks = int(np.prod([sizes[name] for name in names]))
    groups = int(np.prod(list(sizes.values()))) // ranks
    ids, rng = routings.mixed(draw, (groups, ranks, tokens, k), ranks * local)
    return case, ids, rng


@given(shuffle=shuffles(range(len(CASES))))
@hypothesis.settings(max_examples=150)
def test_the_engine(shuffle):
    check("fused", *shuffle)


@given(shuffle=shuffles(XLA_CASES))
@hypothesis.settings(max_examples=50)
def test_plain_xla(shuffle):
    check("xla", *shuffle)


@given(shuffle=shuffles((4, 5)))
@hypothesis.settings(max_examples=40)
def test_plain_xla_in_slices(shuffle):
    check("xla", *shuffle, in_slices=True)


def check(implementation, case, ids, rng, *, in_slices=False):
    _, _, tokens, _, local, d, dtype, alignment, capacity = CASES[case]
    ranks, run = program(case, implementation, in_slices)
    groups = len(ids)
    plans = [oracle.make_plan(i, ranks * local, capacity, alignment) for i in ids]

    def normal(*shape):
        return rng.standard_normal((groups, ranks, *shape)).astype("f4").astype(dtype)

    x, g_out = normal(tokens, d), normal(tokens, d)
    y, g_rows = normal(plans[0].capacity, d), normal(plans[0].capacity, d)
    weights = rng.standard_normal(ids.shape).astype("f4")
    got = jax.device_get(run(ids, x, y, weights, g_rows, g_out))
    for g, plan in enumerate(plans):
        mine = jax.tree.map(lambda a: a[g], got)  # noqa: B023
        integers = plan.group_sizes, plan.expert_counts, plan.slot
        integers += plan.num_dropped, plan.num_invalid
        jax.tree.map(assert_same_bits, mine["integers"], integers)
        assert_same_bits(mine["rows"], oracle.dispatch(x[g], plan), "rows")
        assert_same_bits(mine["out"], oracle.combine(y[g], weights[g], plan), "out")
        assert_same_bits(mine["dx"], oracle.dispatch_gradient(g_rows[g], plan, dtype), "dx")
        dy, dweights = oracle.combine_gradient(g_out[g], y[g], weights[g], plan)
        assert_same_bits(mine["dy_dweights"][0], dy, "dy")
        _, scale = oracle.combine_gradient(np.abs(g_out[g]), np.abs(y[g]), None, plan)
        error = np.abs(mine["dy_dweights"][1] - dweights)
        assert (error <= d * np.finfo("f4").eps * scale).all()
