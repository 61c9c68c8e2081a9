"""Every payload type goes through unchanged; sums are wide, ordered and rounded once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
import routings
from helpers import assert_same_bits, both, cases, per_rank

import jax_fusco as jf

NARROW = (
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "float16",
    "bfloat16",
    "float32",
    "float8_e4m3fn",
    "float8_e5m2",
    "complex64",
)
WIDE = ("int64", "uint64", "float64")
FLOATS = ("bfloat16", "float16", "float32")


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def random_bytes(rng, shape, dtype):
    """Any bit pattern, NaN excepted: hardware may quieten a NaN's payload."""
    dtype = dtype_of(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    size = (*shape[:-1], shape[-1] * dtype.itemsize) if shape else (dtype.itemsize,)
    values = np.frombuffer(rng.bytes(int(np.prod(size))), dtype).reshape(shape).copy()
    if dtype.kind not in "iu":
        part = values.view(np.float32) if dtype.kind == "c" else values
        with np.errstate(invalid="ignore"):
            bad = ~np.isfinite(part.astype(np.float64))
        part[bad] = 1
    return values


def dispatch_program(implementation, alignment=1):
    @functools.partial(per_rank, mesh=4)
    def run(ids, x):
        plan = jf.make_plan(
            ids,
            axis_name="expert",
            num_experts=8,
            alignment=alignment,
            implementation=implementation,
        )
        return jf.dispatch(x, plan)

    return run


@both
@pytest.mark.parametrize("x64", [False, True])
def test_every_dtype_in_one_pytree(implementation, x64):
    rng = np.random.default_rng(0)
    ids = routings.masked(rng, 4, 6, 3, 8)
    plan = oracle.make_plan(ids, 8, None, 4)
    with jax.enable_x64(x64):
        x = {name: random_bytes(rng, (4, 6, 3), name) for name in NARROW + (WIDE if x64 else ())}
        rows = dispatch_program(implementation, 4)(ids, x)
        for name, value in x.items():
            assert_same_bits(rows[name], oracle.dispatch(value, plan), name)


@both
def test_rows_of_any_rank_and_length_travel_together(implementation):
    # Quantised rows with their scales, adapter ids, and a matrix a token.
    rng = np.random.default_rng(0)
    ids = routings.distinct(rng, 4, 6, 3, 8)
    plan = oracle.make_plan(ids, 8)
    x = {
        "quantised": random_bytes(rng, (4, 6, 256), "float8_e4m3fn"),
        "scales": rng.random((4, 6, 2), np.float32),
        "adapter": rng.integers(0, 9, (4, 6), np.int32),
        "matrix": (rng.standard_normal((4, 6, 2, 3, 5)).astype("f4"),),
        "flag": rng.random((4, 6)) < 0.5,
    }
    rows = dispatch_program(implementation)(ids, x)
    jax.tree.map(lambda got, value: assert_same_bits(got, oracle.dispatch(value, plan)), rows, x)


@pytest.mark.parametrize("count", [17, 40])
def test_more_arrays_than_one_call_moves(count):
    rng = np.random.default_rng(0)
    ids = routings.distinct(rng, 4, 6, 3, 8)
    plan = oracle.make_plan(ids, 8)
    x = [rng.integers(0, 99, (4, 6, 1 + i % 3), np.int32) for i in range(count)]
    rows = dispatch_program("fused")(ids, x)
    jax.tree.map(lambda got, value: assert_same_bits(got, oracle.dispatch(value, plan)), rows, x)


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e5m2"])
def test_rows_that_are_no_multiple_of_a_word(implementation, dtype):
    rng = np.random.default_rng(0)
    ids = routings.distinct(rng, 4, 6, 3, 8)
    plan = oracle.make_plan(ids, 8)
    x = tuple(random_bytes(rng, (4, 6, d), dtype) for d in (1, 3, 5, 7, 13, 31, 33, 2880, 2881))
    rows = dispatch_program(implementation)(ids, x)
    jax.tree.map(lambda got, value: assert_same_bits(got, oracle.dispatch(value, plan)), rows, x)


@both
def test_quiet_nan_and_infinities_travel(implementation):
    ids = routings.distinct(np.random.default_rng(0), 4, 6, 3, 8)
    plan = oracle.make_plan(ids, 8)
    x = {
        name: np.resize(np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], "f4"), (4, 6, 5)).astype(
            dtype_of(name)
        )
        for name in FLOATS
    }
    rows = dispatch_program(implementation)(ids, x)
    for name, value in x.items():
        assert_same_bits(rows[name], oracle.dispatch(value, plan), name)


def combine_case(rng, y_dtype, weights_dtype, d=300):
    ids = routings.masked(rng, 4, 12, 4, 8)
    plan = oracle.make_plan(ids, 8)
    y = rng.standard_normal((4, plan.capacity, d)).astype(dtype_of(y_dtype))
    weights = rng.standard_normal(ids.shape).astype(dtype_of(weights_dtype))
    return ids, plan, y, weights


def combine_program(implementation, out_dtypes, weighted=True):
    @functools.partial(per_rank, mesh=4)
    def run(ids, y, weights):
        plan = jf.make_plan(ids, axis_name="expert", num_experts=8, implementation=implementation)
        weights = weights if weighted else None
        return tuple(jf.combine(y, weights, plan, out_dtype=out) for out in out_dtypes)

    return run


@cases(
    "y_dtype,weights_dtype",
    [(y, weights) for y in FLOATS for weights in (None, *FLOATS)],
    xla=[(FLOATS[0], None), (FLOATS[1], FLOATS[0]), (FLOATS[2], FLOATS[2])],
)
def test_combine_rounds_once(implementation, y_dtype, weights_dtype):
    ids, plan, y, weights = combine_case(
        np.random.default_rng(0), y_dtype, weights_dtype or "float32"
    )
    outs = (None, *(dtype_of(name) for name in FLOATS))
    got = combine_program(implementation, outs, weights_dtype is not None)(ids, y, weights)
    for out, value in zip(outs, got, strict=True):
        want = oracle.combine(y, weights if weights_dtype else None, plan, out)
        assert_same_bits(value, want, f"out_dtype={out}")


@both
def test_combine_in_float64(implementation):
    with jax.enable_x64(True):
        for weights_dtype in ("float64", "float32"):
            ids, plan, y, weights = combine_case(
                np.random.default_rng(0), "float64", weights_dtype, d=3
            )
            outs = (None, np.dtype("f4"))
            got = combine_program(implementation, outs)(ids, y, weights)
            for out, value in zip(outs, got, strict=True):
                assert_same_bits(value, oracle.combine(y, weights, plan, out))


@cases("dtype", FLOATS, xla=FLOATS[:1])
def test_sums_that_overflow_or_tie_round_as_ieee_says(implementation, dtype):
    dtype = dtype_of(dtype)
    rng = np.random.default_rng(0)
    ids = routings.distinct(rng, 4, 12, 4, 8)
    plan = oracle.make_plan(ids, 8)
    largest = float(ml_dtypes.finfo(dtype).max)
    values = np.array([largest, -largest, 1, 1 + float(ml_dtypes.finfo(dtype).eps), np.inf])
    y = rng.choice(values, (4, plan.capacity, 65)).astype(dtype)
    weights = rng.choice(np.array([1, 0.5, 2, -1, 2.0**-9], "f4"), ids.shape)
    (got,) = combine_program(implementation, (None,))(ids, y, weights)
    assert_same_bits(got, oracle.combine(y, weights, plan))


@cases("shape", [(), (1,), (2, 3, 5)], xla=[(), (2, 3, 5)])
def test_combine_of_any_trailing_shape(implementation, shape):
    rng = np.random.default_rng(0)
    ids = routings.distinct(rng, 4, 6, 2, 8)
    plan = oracle.make_plan(ids, 8)
    y = rng.standard_normal((4, plan.capacity, *shape)).astype(jnp.bfloat16)
    weights = rng.standard_normal(ids.shape).astype("f4")
    (got,) = combine_program(implementation, (None,))(ids, y, weights)
    assert_same_bits(got, oracle.combine(y, weights, plan))
