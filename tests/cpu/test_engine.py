"""What the engine adds: instruction sets and threads, all of which give the same bits."""

from __future__ import annotations

import functools

import jax
import ml_dtypes
import numpy as np
import oracle
import pytest
import routings
from helpers import assert_same_bits, per_rank

import jax_fusco as jf

BF16, F16, F32, F64 = np.dtype(ml_dtypes.bfloat16), np.dtype("f2"), np.dtype("f4"), np.dtype("f8")
TYPES = (BF16, F16, F32, F64)
ISAS = ("generic", "avx2", "avx512", "amx")
LENGTH = 301  # whole column blocks, whole vectors and a rest


@pytest.fixture
def isas(monkeypatch):
    """Runs a function under every instruction set of this machine, and returns the results."""

    def run(function):
        results = {}
        for isa in ISAS:
            monkeypatch.setenv("JAX_FUSCO_ISA", isa)
            try:
                results[isa] = jax.device_get(function())
            except jax.errors.JaxRuntimeError as error:
                if "one that this machine has" not in str(error):
                    raise
        assert "generic" in results
        return results

    return run


@functools.cache
def program(y_dtype, out_dtype, weights_dtype):
    """(ids, y, weights, g) -> combine and its gradients."""

    def run(ids, y, weights, g):
        plan = jf.make_plan(ids, axis_name="expert", num_experts=4, implementation="fused")
        out, pull = jax.vjp(lambda y, w: jf.combine(y, w, plan, out_dtype=out_dtype), y, weights)
        return out, *pull(g)

    return per_rank(run, 2)


@pytest.mark.parametrize("out_dtype", TYPES, ids=str)
@pytest.mark.parametrize("y_dtype", TYPES, ids=str)
def test_every_instruction_set_gives_the_same_bits(isas, y_dtype, out_dtype):
    rng = np.random.default_rng(0)
    wide = F64 if y_dtype == F64 else F32
    length = 37 if wide == F64 else LENGTH  # exact float64 sums are slow to predict
    ids = routings.masked(rng, 2, 6, 3, 4)
    plan = oracle.make_plan(ids, 4)
    with jax.enable_x64(F64 in (y_dtype, out_dtype)):
        y = rng.standard_normal((2, plan.capacity, length)).astype(y_dtype)
        y[..., ::7] *= y_dtype.type(2.0**-12)
        y[~oracle.occupied(plan)] = np.nan
        weights = rng.standard_normal(ids.shape).astype(wide)
        g = rng.standard_normal((2, 6, length)).astype(out_dtype)
        results = isas(lambda: program(y_dtype, out_dtype, wide)(ids, y, weights, g))
    want_out = oracle.combine(y, weights, plan, out_dtype)
    want_y, want_w = oracle.combine_gradient(g, y, weights, plan)
    for isa, (out, dy, dweights) in results.items():
        assert_same_bits(out, want_out, isa)
        assert_same_bits(dy, want_y, isa)
        assert_same_bits(dweights, results["generic"][2], isa)
        np.testing.assert_allclose(dweights, want_w, rtol=1e-4, atol=1e-4)


def test_special_values_under_every_instruction_set(isas):
    """NaN, infinities, halves that tie, overflow of the narrow type, subnormal results."""
    rng = np.random.default_rng(0)
    ids = routings.distinct(rng, 2, 6, 3, 4)
    plan = oracle.make_plan(ids, 4)
    for dtype in (BF16, F16, F32):
        info = ml_dtypes.finfo(dtype)
        special = [0, -0.0, np.inf, -np.inf, np.nan, info.max, -info.max, 1, 1 + float(info.eps)]
        special = np.array(special, np.float64).astype(dtype)
        y = rng.choice(special, (2, plan.capacity, LENGTH))
        weights = rng.choice(np.array([1, -1, 0.5, 1 + 2.0**-9, 0], "f4"), ids.shape)
        g = np.ones((2, 6, LENGTH), dtype)
        for isa, (out, dy, _) in isas(
            lambda: program(dtype, dtype, F32)(ids, y, weights, g)  # noqa: B023
        ).items():
            assert_same_bits(out, oracle.combine(y, weights, plan), isa)
            assert_same_bits(dy, oracle.combine_gradient(g, y, weights, plan)[0], isa)


def test_subnormal_numbers(isas):
    """Small half-precision values keep their bits, in and out of float32."""
    rng = np.random.default_rng(0)
    ids = routings.distinct(rng, 2, 6, 2, 4)
    plan = oracle.make_plan(ids, 4)
    y = (rng.integers(-1023, 1024, (2, plan.capacity, LENGTH)) * 2.0**-24).astype(F16)
    weights = np.ones(ids.shape, "f4")
    g = y[:, :6]
    for isa, (out, dy, _) in isas(lambda: program(F16, F16, F32)(ids, y, weights, g)).items():
        assert_same_bits(out, oracle.combine(y, weights, plan), isa)
        assert_same_bits(dy, oracle.combine_gradient(g, y, weights, plan)[0], isa)


@pytest.mark.parametrize("dtype", [np.dtype("i1"), BF16, F32])
def test_dispatch_of_every_length_under_every_instruction_set(isas, dtype):
    """Rows from one byte to many lines, at every alignment of their first byte."""
    rng = np.random.default_rng(0)
    ids = routings.masked(rng, 2, 7, 2, 4)
    plan = oracle.make_plan(ids, 4, None, 4)
    lengths = (1, 5, 31, 64, 127, 129, 255, 256, 257, 511, 513, 1025)
    x = tuple(rng.integers(-100, 100, (2, 7, n)).astype(dtype) for n in lengths)

    @functools.partial(per_rank, mesh=2)
    def run(ids, x):
        made = jf.make_plan(
            ids, axis_name="expert", num_experts=4, alignment=4, implementation="fused"
        )
        return jf.dispatch(x, made)

    for isa, rows in isas(lambda: run(ids, x)).items():
        for got, value in zip(rows, x, strict=True):
            assert_same_bits(got, oracle.dispatch(value, plan), isa)


@pytest.mark.parametrize("threads", ["1", "2", "7"])
def test_any_number_of_threads(monkeypatch, threads):
    monkeypatch.setenv("JAX_FUSCO_THREADS", threads)
    rng = np.random.default_rng(0)
    ids = routings.skewed(rng, 4, 256, 2, 8)
    plan = oracle.make_plan(ids, 8)
    x = rng.standard_normal((4, 256, 512)).astype("f4")

    @functools.partial(per_rank, mesh=4)
    def run(ids, x):
        made = jf.make_plan(ids, axis_name="expert", num_experts=8, implementation="fused")
        rows = jf.dispatch(x, made)
        return rows, jf.combine(rows, None, made)

    rows, out = run(ids, x)
    assert_same_bits(rows, oracle.dispatch(x, plan))
    assert_same_bits(out, oracle.combine(np.asarray(rows), None, plan))


@pytest.mark.parametrize(
    ("name", "value"),
    [("JAX_FUSCO_ISA", "sse"), ("JAX_FUSCO_THREADS", "0"), ("JAX_FUSCO_THREADS", "1.5")],
)
def test_settings_that_make_no_sense_are_errors(monkeypatch, name, value):
    ids = np.zeros((2, 3, 1), np.int32)

    @functools.partial(per_rank, mesh=2)
    def run(ids):
        return jf.make_plan(ids, axis_name="expert", num_experts=4, implementation="fused").slot

    jax.block_until_ready(run(ids))
    monkeypatch.setenv(name, value)
    with pytest.raises(jax.errors.JaxRuntimeError, match=name):
        jax.block_until_ready(run(ids))
    monkeypatch.delenv(name)
    jax.block_until_ready(run(ids))
