"""The public functions on GPUs, against the oracles of the tests on CPU devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
import routings
from cpu import (
    test_dtypes,
    test_gather_into,
    test_gradients,
    test_ragged_all_to_all,
    test_shuffle,
    test_transforms,
)
from flax import nnx
from helpers import assert_same_bits, make_mesh, per_rank

import jax_fusco as jf
from jax_fusco.flax import MoE

RANKS = jax.device_count()
LAYOUTS = [(1, None), (8, None), (128, None), (1, 4), (3, 7), (1, 0), (8, 12)]


@pytest.mark.parametrize("routing", routings.ALL, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("alignment", "rows_per_expert"), LAYOUTS)
def test_every_routing(routing, alignment, rows_per_expert):
    local = 4
    capacity = None if rows_per_expert is None else rows_per_expert * local
    ids = routing(np.random.default_rng(0), RANKS, 6, 3, RANKS * local)
    test_shuffle.check("fused", ids, RANKS * local, capacity, alignment)


@pytest.mark.parametrize("d", [0, 1, 2, 3, 7, 63, 64, 65, 256, 2048, 2880, 7168])
def test_every_row_length(d):
    ids = routings.distinct(np.random.default_rng(d), RANKS, 33, 4, RANKS * 4)
    test_shuffle.check("fused", ids, RANKS * 4, d=d)


@pytest.mark.parametrize(("tokens", "k", "local"), [(0, 2, 2), (3, 0, 2), (1, 1, 1), (1000, 8, 64)])
def test_every_shape(tokens, k, local):
    ids = routings.masked(np.random.default_rng(1), RANKS, tokens, k, RANKS * local)
    test_shuffle.check("fused", ids, RANKS * local)


def test_a_large_shuffle():
    ids = routings.skewed(np.random.default_rng(2), RANKS, 4096, 8, RANKS * 64)
    test_shuffle.check("fused", ids, RANKS * 64, alignment=128, d=512)
    test_shuffle.check("fused", ids, RANKS * 64, capacity=20000, alignment=8, d=512)


@pytest.mark.parametrize("dtype", test_dtypes.NARROW)
def test_every_dtype_goes_through_unchanged(dtype):
    rng = np.random.default_rng(3)
    ids = routings.masked(rng, RANKS, 17, 3, RANKS * 4)
    plan = oracle.make_plan(ids, RANKS * 4, None, 8)
    x = test_dtypes.random_bytes(rng, (RANKS, 17, 24), dtype)

    def run(ids, x):
        plan = jf.make_plan(
            ids, axis_name="expert", num_experts=RANKS * 4, alignment=8, implementation="fused"
        )
        return jf.dispatch({"x": x, "ids": jnp.arange(17)}, plan)["x"]

    assert_same_bits(per_rank(run, RANKS)(ids, x), oracle.dispatch(x, plan))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("d", [17, 2048])
def test_every_gradient(dtype, weighted, d):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    for routing, capacity in ((routings.masked, None), (routings.skewed, 12), (routings.empty, 8)):
        plan, arguments = test_gradients.vjp_case(4, routing, RANKS, 4, capacity, 8, dtype, d)
        run = test_gradients.vjp_program("fused", RANKS, RANKS * 4, capacity, 8, weighted)
        test_gradients.check_vjp(run(*arguments), plan, arguments, weighted)


@pytest.mark.parametrize("wrap", ["none", "checkpoint", "named"])
def test_layers_in_a_scan_and_remat(monkeypatch, wrap):
    monkeypatch.setattr(test_transforms, "RANKS", RANKS)
    monkeypatch.setattr(test_transforms, "EXPERTS", RANKS * 4)
    x, ids, weights, scale = test_transforms.arguments()
    results = [
        jax.device_get(
            test_transforms.loss_and_gradients(name, test_transforms.WRAPS[wrap])(
                x, weights, scale, ids
            )
        )
        for name in ("fused", "xla")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)


def test_the_same_bits_on_every_run():
    rng = np.random.default_rng(5)
    ids = routings.skewed(rng, RANKS, 512, 8, RANKS * 16)
    x = rng.standard_normal((RANKS, 512, 2048)).astype(ml_dtypes.bfloat16)
    weights = rng.standard_normal(ids.shape).astype("f4")

    def run(ids, x, weights):
        plan = jf.make_plan(
            ids, axis_name="expert", num_experts=RANKS * 16, capacity=4000, implementation="fused"
        )
        out = jf.combine(jf.dispatch(x, plan), weights, plan)
        return jax.tree.leaves(plan), out

    program = per_rank(run, RANKS)
    first = jax.device_get(program(ids, x, weights))
    for _ in range(50):
        for a, b in zip(*map(jax.tree.leaves, (first, program(ids, x, weights))), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("each", [1, 3])
def test_a_ragged_exchange(each):
    rng = np.random.default_rng(6)
    tables, in_rows, out_rows = test_ragged_all_to_all.tables(rng, RANKS, each)
    for shape, dtype in (((3,), "f4"), ((2048,), "f2"), ((5,), "i1")):
        operand, output = test_ragged_all_to_all.arrays(rng, RANKS, in_rows, out_rows, shape, dtype)
        want = oracle.ragged_all_to_all(operand, output, *tables)
        run = per_rank(test_ragged_all_to_all.exchange("fused"), RANKS)
        assert_same_bits(run(operand, output, *tables), want)


@pytest.mark.parametrize("fanout", [1, 3])
@pytest.mark.parametrize("rows", [test_gather_into.DTYPES, (("float16", (2048,)), ("int8", (48,)))])
def test_gathers_into_arrays_that_hold_something(fanout, rows):
    rng = np.random.default_rng(9)
    operands = test_gather_into.random_arrays(rng, RANKS, 9, rows)
    into = test_gather_into.random_arrays(rng, RANKS, 40, rows)
    sources = test_gather_into.random_sources(rng, RANKS, 9, 40, fanout)
    test_gather_into.check("fused", operands, *sources, into, fanout)


def test_two_levels_move_the_rows_of_one():
    rng = np.random.default_rng(10)
    ids = routings.masked(rng, RANKS, 64, 4, RANKS * 4)
    x = rng.standard_normal((RANKS, 64, 256)).astype("f4")
    weights = rng.random(ids.shape, np.float32)

    def run(ids, x, weights, topology):
        plan = jf.make_plan(
            ids,
            axis_name="expert",
            num_experts=RANKS * 4,
            implementation="fused",
            topology=topology,
        )
        rows = jf.dispatch(x, plan)
        out, pull = jax.vjp(lambda rows, weights: jf.combine(rows, weights, plan), rows, weights)
        return plan.slot, plan.source, rows, out, *pull(out)

    # Nodes of one rank, and one node of all.
    topologies = [jf.Topology(None, "expert", size, slice_rows=16) for size in {1, RANKS}]
    flat, *others = (
        per_rank(lambda *arrays, topology=topology: run(*arrays, topology), RANKS)(ids, x, weights)
        for topology in (None, *topologies)
    )
    for found in others:
        for a, b in zip(found[:3], flat[:3], strict=True):
            assert_same_bits(a, b)
        for a, b in zip(found[3:], flat[3:], strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


def test_without_a_mesh():
    rng = np.random.default_rng(7)
    ids = routings.masked(rng, 1, 20, 3, 8)
    x = rng.standard_normal((1, 20, 64)).astype("f4")

    @jax.jit
    def run(ids, x):
        plan = jf.make_plan(ids, axis_name=None, num_experts=8, implementation="fused")
        return jf.combine(jf.dispatch(x, plan), None, plan)

    plan = oracle.make_plan(ids, 8)
    want = oracle.combine(oracle.dispatch(x, plan), None, plan)
    assert_same_bits(run(ids[0], x[0]), want[0])


def test_the_flax_block_trains_as_with_plain_xla():
    mesh = make_mesh(RANKS)
    x = np.random.default_rng(8).standard_normal((RANKS * 2, 16, 64)).astype("f4")
    losses = {}
    for name in ("fused", "xla"):
        moe = MoE(64, 32, num_experts=RANKS * 4, top_k=2, mesh=mesh, implementation=name,
                  rngs=nnx.Rngs(0))  # fmt: skip

        @nnx.jit
        def step(moe):
            def loss(moe):
                y, metrics = moe(jnp.asarray(x))
                return jnp.square(y - 1).mean() + 0.01 * metrics.load_balance_loss

            value, gradients = nnx.value_and_grad(loss)(moe)
            nnx.update(
                moe, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(moe, nnx.Param), gradients)
            )
            return value

        losses[name] = [float(step(moe)) for _ in range(10)]
    np.testing.assert_allclose(losses["fused"], losses["xla"], rtol=1e-4)
    assert losses["fused"][-1] < losses["fused"][0]
