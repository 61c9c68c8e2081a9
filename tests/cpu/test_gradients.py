"""Gradients of dispatch and combine: against loops, and against a dense formulation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import routings
from helpers import assert_same_bits, both, cases, make_mesh, per_rank

import jax_fusco as jf
from jax_fusco.mesh import Axis
from jax_fusco.movers import IMPLEMENTATIONS


def vjp_program(implementation, num_ranks, num_experts, capacity, alignment, weighted=True, **kw):
    """(ids, x, y, weights, g_rows, g_out) -> (dx, dy, dweights)."""

    def run(ids, x, y, weights, g_rows, g_out):
        plan = jf.make_plan(
            ids,
            axis_name="expert",
            num_experts=num_experts,
            capacity=capacity,
            alignment=alignment,
            implementation=implementation,
        )
        (dx,) = jax.vjp(lambda x: jf.dispatch(x, plan), x)[1](g_rows)
        if weighted:
            return dx, *jax.vjp(lambda y, w: jf.combine(y, w, plan), y, weights)[1](g_out)
        return dx, *jax.vjp(lambda y: jf.combine(y, None, plan), y)[1](g_out), weights

    return per_rank(run, num_ranks, **kw)


def vjp_case(seed, routing, num_ranks, local, capacity, alignment, dtype, d=17):
    rng = np.random.default_rng(seed)
    num_experts = num_ranks * local
    ids = routing(rng, num_ranks, 6, 3, num_experts)
    plan = oracle.make_plan(ids, num_experts, capacity, alignment)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32).astype(dtype)

    x, y = draw(num_ranks, 6, d), draw(num_ranks, plan.capacity, d)
    g_rows, g_out = draw(num_ranks, plan.capacity, d), draw(num_ranks, 6, d)
    weights = rng.standard_normal(ids.shape).astype(np.float32)
    # Rows that hold no assignment are never read, in either direction.
    g_rows[~oracle.occupied(plan)] = np.nan
    y[~oracle.occupied(plan)] = np.nan
    return plan, (ids, x, y, weights, g_rows, g_out)


def check_vjp(got, plan, arguments, weighted=True):
    _, x, y, weights, g_rows, g_out = arguments
    dx, dy, dweights = jax.device_get(got)
    assert_same_bits(dx, oracle.dispatch_gradient(g_rows, plan, x.dtype), "dx")
    want_y, want_w = oracle.combine_gradient(g_out, y, weights if weighted else None, plan)
    assert_same_bits(dy, want_y, "dy")
    if weighted:
        assert dweights.dtype == weights.dtype
        y = np.where(oracle.occupied(plan)[..., None], y, np.zeros_like(y))
        _, scale = oracle.combine_gradient(np.abs(g_out), np.abs(y), None, plan)
        # Each of d products and sums is rounded in float32 (float64): an error per term at most.
        eps = np.finfo(weights.dtype).eps * y.shape[-1]
        assert (np.abs(dweights - want_w) <= eps * scale).all()
        assert (dweights[plan.slot < 0] == 0).all()


@pytest.mark.parametrize("routing", routings.ALL, ids=lambda f: f.__name__)
@cases("num_ranks", [1, 4, 16], xla=[1, 4])
def test_every_routing(implementation, num_ranks, routing):
    run = _cached_vjp(implementation, num_ranks, num_ranks * 2, None, 4)
    plan, arguments = vjp_case(0, routing, num_ranks, 2, None, 4, np.float32)
    check_vjp(run(*arguments), plan, arguments)


_cached_vjp = functools.cache(vjp_program)


@cases("num_ranks,capacity,alignment", [(2, 9, 1), (8, 16, 8), (4, 0, 1)], xla=[(2, 9, 1)])
def test_overflow(implementation, num_ranks, capacity, alignment):
    run = _cached_vjp(implementation, num_ranks, num_ranks * 2, capacity, alignment)
    for seed, routing in enumerate((routings.one_rank, routings.skewed, routings.masked)):
        plan, arguments = vjp_case(seed, routing, num_ranks, 2, capacity, alignment, np.float32)
        check_vjp(run(*arguments), plan, arguments)


@cases(
    "dtype,weighted",
    [(dtype, weighted) for dtype in ("bfloat16", "float16") for weighted in (True, False)],
    xla=[("bfloat16", True), ("float16", False)],
)
def test_narrow_types(implementation, dtype, weighted):
    run = _cached_vjp(implementation, 4, 8, None, 1, weighted)
    plan, arguments = vjp_case(0, routings.masked, 4, 2, None, 1, jnp.dtype(dtype))
    check_vjp(run(*arguments), plan, arguments, weighted)


@both
def test_float64(implementation):
    with jax.enable_x64(True):
        run = vjp_program(implementation, 4, 8, None, 1)
        plan, arguments = vjp_case(0, routings.masked, 4, 2, None, 1, np.float64, d=5)
        ids, x, y, weights, *gs = arguments
        arguments = ids, x, y, weights.astype(np.float64), *gs
        check_vjp(run(*arguments), plan, arguments)


@both
@pytest.mark.parametrize("check_vma", [True, False])
def test_weights_of_a_narrow_type_keep_it(implementation, check_vma):
    run = vjp_program(implementation, 4, 8, None, 1, check_vma=check_vma)
    plan, arguments = vjp_case(0, routings.distinct, 4, 2, None, 1, jnp.bfloat16, d=8)
    ids, x, y, weights, *gs = arguments
    weights = weights.astype(jnp.bfloat16)
    _, dy, dweights = run(ids, x, y, weights, *gs)
    assert dweights.dtype == jnp.bfloat16
    want_y, want_w = oracle.combine_gradient(gs[1], y, weights, plan)
    assert_same_bits(dy, want_y)
    np.testing.assert_allclose(np.asarray(dweights, np.float64), want_w, rtol=2**-7, atol=0.05)


@cases(
    "num_ranks,check_vma",
    [(ranks, check_vma) for ranks in (1, 4) for check_vma in (True, False)],
    xla=[(4, True), (4, False)],
)
def test_a_layer_equals_its_dense_formulation(implementation, num_ranks, check_vma):
    """x, router weights and expert parameters of a small MoE, forward and backward."""
    rng = np.random.default_rng(0)
    local, tokens, k, d = 2, 6, 2, 4
    experts = num_ranks * local
    ids = routings.distinct(rng, num_ranks, tokens, k, experts)
    x = rng.standard_normal((num_ranks, tokens, d)).astype("f4")
    logits = rng.standard_normal(ids.shape).astype("f4")
    params = rng.standard_normal((num_ranks, local, d, d)).astype("f4")
    capacity = oracle.dropless(tokens, k, experts, num_ranks, 4)

    def layer(params, x, logits, ids):
        plan = jf.make_plan(
            ids,
            axis_name="expert",
            num_experts=experts,
            alignment=4,
            implementation=implementation,
        )
        rows = jf.dispatch(x, plan)
        ends = jnp.cumsum(plan.group_sizes)
        expert = jnp.searchsorted(ends, jnp.arange(capacity), side="right")
        y = jnp.tanh(jnp.einsum("cd,cde->ce", rows, params[jnp.minimum(expert, local - 1)]))
        return jf.combine(y, jax.nn.softmax(logits), plan)

    run = per_rank(layer, num_ranks, check_vma=check_vma)

    def sharded_loss(params, x, logits):
        return jnp.sum(jnp.sin(run(params, x, logits, ids)))

    def dense_loss(params, x, logits):
        each = jnp.tanh(jnp.einsum("rtd,xde->rtxe", x, params.reshape(experts, d, d)))
        chosen = jnp.take_along_axis(each, jnp.asarray(ids)[..., None], axis=2)
        return jnp.sum(jnp.sin(jnp.einsum("rtk,rtkd->rtd", jax.nn.softmax(logits), chosen)))

    got = jax.jit(jax.value_and_grad(sharded_loss, argnums=(0, 1, 2)))(params, x, logits)
    want = jax.jit(jax.value_and_grad(dense_loss, argnums=(0, 1, 2)))(params, x, logits)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)


@both
@pytest.mark.parametrize("topology", [None, jf.Topology()])
def test_gradients_of_gradients_by_finite_differences(implementation, topology):
    from jax.test_util import check_grads

    sizes = {"expert": 2} if topology is None else {"node": 2, "expert": 2}
    ranks, axis = 2 * sizes.get("node", 1), tuple(sizes)
    ids = routings.masked(np.random.default_rng(0), ranks, 3, 2, 4)
    with jax.enable_x64(True):

        def layer(ids, x, weights):
            plan = jf.make_plan(
                ids,
                axis_name=axis,
                num_experts=4,
                topology=topology,
                implementation=implementation,
            )
            y = jnp.sin(jf.dispatch(x, plan))
            return jf.combine(y, weights, plan) + jf.combine(y, None, plan) ** 2

        run = per_rank(layer, make_mesh(sizes), axis)
        rng = np.random.default_rng(1)
        x, weights = rng.standard_normal((2, ranks, 3, 2))
        check_grads(functools.partial(run, ids), (x, weights), order=2, modes=["rev"])


@both
def test_integer_leaves_of_a_payload_have_no_gradient(implementation):
    ids = routings.distinct(np.random.default_rng(0), 4, 6, 2, 8)
    plan = oracle.make_plan(ids, 8)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4, 6, 3)).astype("f4")
    adapter = rng.integers(0, 5, (4, 6), np.int32)
    scale = rng.standard_normal(plan.capacity).astype("f4")

    def loss(x, ids, adapter):
        made = jf.make_plan(ids, axis_name="expert", num_experts=8, implementation=implementation)
        rows = jf.dispatch({"x": x, "adapter": adapter}, made)
        value = (rows["x"] * scale[:, None] * rows["adapter"][:, None]).sum()
        return value

    grad = per_rank(jax.grad(loss), 4)(x, ids, adapter)
    g = scale[None, :, None] * oracle.dispatch(adapter, plan)[..., None] * np.ones(3, "f4")
    assert_same_bits(grad, oracle.dispatch_gradient(g.astype("f4"), plan, np.dtype("f4")))


@both
def test_rows_without_a_source_have_no_dot(implementation):
    """The mover behind the gradient of combine never reads their rows of y."""
    mover = IMPLEMENTATIONS[implementation].gather_rows_weighted
    source = np.array([1, -1, 0, -2], np.int32)
    y = np.array([[1, 2], [np.nan, np.nan], [3, 4], [np.inf, np.nan]], np.float32)
    g, weights = np.array([[10, 1]], np.float32), np.array([[2, 3]], np.float32)

    @jax.jit
    def run(source, y, g, weights):
        rank = jnp.minimum(source, 0)
        return mover(g, weights, y, rank, source, source[:0], axis=Axis((), 1))

    dy, dots = run(source, y, g, weights)
    assert_same_bits(dy, np.array([[30, 3], [0, 0], [20, 2], [0, 0]], np.float32))
    assert_same_bits(dots, np.array([12, 0, 34, 0], np.float32))


@both
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "complex64"])
def test_payloads_that_are_not_summed_as_they_are(implementation, dtype):
    """Cotangents of 8 bits are summed wide and rounded once, complex ones part by part."""
    rng = np.random.default_rng(0)
    ids = routings.masked(rng, 4, 12, 3, 8)
    plan = oracle.make_plan(ids, 8)
    parts = rng.standard_normal((4, plan.capacity, 32)) * 4.0 ** rng.integers(-3, 3, 32)
    g = parts.astype("f4").view(dtype) if dtype == "complex64" else parts.astype(jnp.dtype(dtype))
    x = np.zeros((4, 12, g.shape[-1]), g.dtype)

    def gradient(ids, x, g):
        made = jf.make_plan(ids, axis_name="expert", num_experts=8, implementation=implementation)
        return jax.vjp(lambda x: jf.dispatch(x, made), x)[1](g)[0]

    got = np.asarray(per_rank(gradient, 4)(ids, x, g))
    part = np.dtype("f4") if dtype == "complex64" else g.dtype
    want = oracle.dispatch_gradient(g.view(part), plan, part).view(g.dtype)
    assert_same_bits(got, want)


@both
def test_a_plan_serves_a_second_use_in_backward(implementation):
    """One plan for two layers: both gradients are right, and the plan is made once."""
    rng = np.random.default_rng(0)
    ids = routings.distinct(rng, 4, 6, 2, 8)
    x = rng.standard_normal((4, 6, 5)).astype("f4")
    weights = rng.random(ids.shape).astype("f4")

    def layer(x, weights, ids, passes):
        plan = jf.make_plan(ids, axis_name="expert", num_experts=8, implementation=implementation)
        for _ in range(passes):
            x = jf.combine(jnp.sin(jf.dispatch(x, plan)), weights, plan)
        return x

    def dense(x, weights, passes):
        for _ in range(passes):
            x = jnp.sin(x) * weights.sum(-1, keepdims=True)
        return x

    twice = per_rank(functools.partial(layer, passes=2), 4)
    got = jax.grad(lambda x, w: jnp.sum(twice(x, w, ids) ** 2), (0, 1))(x, weights)
    want = jax.grad(lambda x, w: jnp.sum(dense(x, w, 2) ** 2), (0, 1))(x, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


@both
def test_gradients_without_experts(implementation):
    """k = 0: tokens that choose nothing have a zero sum, and rows and weights zero cotangents."""
    run = vjp_program(implementation, 2, 4, 3, 1)
    ids = np.zeros((2, 5, 0), np.int32)
    x, rows = np.ones((2, 5, 4), np.float32), np.ones((2, 3, 4), np.float32)
    got = run(ids, x, rows, np.zeros(ids.shape, np.float32), rows, x)
    jax.tree.map(
        assert_same_bits, jax.device_get(got), (0 * x, 0 * rows, np.zeros((2, 5, 0), "f4"))
    )
