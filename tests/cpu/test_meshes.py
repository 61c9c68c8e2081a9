"""Expert axes inside larger meshes: any axis order, permuted devices, partly manual, both types."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import routings
from helpers import P, assert_same_bits, both, make_mesh, place, sharded
from jax.sharding import AxisType

import jax_fusco as jf

T, K, D = 4, 2, 5
ORDERS = list(itertools.permutations(("data", "expert", "model")))


def layer(implementation, axis_name="expert", num_experts=8, capacity=None, alignment=2):
    """(ids, x, weights) of one rank -> (slot, rows, out), rows doubled on the way."""

    def run(ids, x, weights):
        plan = jf.make_plan(
            ids,
            axis_name=axis_name,
            num_experts=num_experts,
            capacity=capacity,
            alignment=alignment,
            implementation=implementation,
        )
        rows = jf.dispatch(x, plan)
        return plan.slot, rows, jf.combine(rows * 2, weights, plan)

    return run


def want_layer(ids, x, weights, num_experts=8, capacity=None, alignment=2):
    plan = oracle.make_plan(ids, num_experts, capacity, alignment)
    rows = oracle.dispatch(x, plan)
    return plan.slot, rows, oracle.combine(rows * 2, weights, plan)


def inputs(shape, num_experts=8, seed=0):
    """Different routings and rows at every index of `shape`."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    ids = routings.masked(rng, count, T, K, num_experts).reshape(*shape, T, K)
    x = rng.standard_normal((*shape, T, D)).astype("f4")
    return ids, x, rng.standard_normal(ids.shape).astype("f4")


def squeezed(function, leading):
    """`function` for arguments with `leading` sharded dimensions of local size 1."""

    def run(*arguments):
        results = function(*(a.reshape(a.shape[leading:]) for a in arguments))
        return jax.tree.map(lambda a: a.reshape((1,) * leading + a.shape), results)

    return run


@both
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("order", ORDERS[::2], ids="-".join)
def test_groups_in_a_mesh_of_three_axes(implementation, order, axis_type):
    sizes = {"data": 2, "expert": 4, "model": 2}
    devices = np.random.default_rng(len(order[0])).permutation(16)
    mesh = make_mesh({name: sizes[name] for name in order}, axis_type=axis_type, order=devices)
    spec = P("data", "model", "expert")
    run = sharded(squeezed(layer(implementation), 3), mesh, in_specs=spec, out_specs=spec)
    arguments = inputs((2, 2, 4))
    got = jax.device_get(run(*place(mesh, spec, *arguments)))
    for data, model in np.ndindex(2, 2):
        want = want_layer(*(a[data, model] for a in arguments))
        for value, expected in zip(got, want, strict=True):
            assert_same_bits(value[data, model], expected)


@both
@pytest.mark.parametrize("check_vma", [True, False])
def test_what_is_replicated_stays_replicated(implementation, check_vma):
    mesh = make_mesh({"data": 2, "expert": 4, "model": 2}, axis_type=AxisType.Explicit)
    spec = P("data", "expert")
    run = sharded(
        squeezed(layer(implementation), 2),
        mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=check_vma,
    )
    arguments = inputs((2, 4))
    got = jax.device_get(run(*place(mesh, spec, *arguments)))
    for data in range(2):
        want = want_layer(*(a[data] for a in arguments))
        for value, expected in zip(got, want, strict=True):
            assert_same_bits(value[data], expected)


@both
@pytest.mark.parametrize("axis_name", [("node", "expert"), ("expert", "node"), ("node",)])
def test_a_tuple_of_axes_is_a_row_major_rank(implementation, axis_name):
    mesh = make_mesh({"expert": 4, "node": 2}, order=[5, 2, 7, 0, 1, 6, 3, 4])
    others = tuple(name for name in mesh.axis_names if name not in axis_name)
    spec = P(others, axis_name)
    ranks = int(np.prod([mesh.shape[name] for name in axis_name]))
    run = sharded(
        squeezed(layer(implementation, axis_name), 2), mesh, in_specs=spec, out_specs=spec
    )
    arguments = inputs((8 // ranks, ranks))
    got = jax.device_get(run(*arguments))
    for group in range(8 // ranks):
        want = want_layer(*(a[group] for a in arguments))
        for value, expected in zip(got, want, strict=True):
            assert_same_bits(value[group], expected)


@both
def test_an_axis_of_size_one(implementation):
    mesh = make_mesh({"data": 4, "expert": 1})
    spec = P("data", "expert")
    run = sharded(squeezed(layer(implementation), 2), mesh, in_specs=spec, out_specs=spec)
    arguments = inputs((4, 1))
    got = jax.device_get(run(*arguments))
    for data in range(4):
        want = want_layer(*(a[data] for a in arguments))
        for value, expected in zip(got, want, strict=True):
            assert_same_bits(value[data], expected)


@both
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("how", ["replicated", "rows sharded", "columns sharded"])
def test_partly_manual(implementation, axis_type, how):
    """Axes that are left to the compiler do not change what a shuffle means."""
    mesh = make_mesh({"data": 2, "expert": 4, "model": 2}, axis_type=axis_type)
    spec = P("expert")
    run = sharded(
        squeezed(layer(implementation), 1),
        mesh,
        in_specs=spec,
        out_specs=spec,
        axis_names={"expert"},
    )
    arguments = inputs((4,))
    ids, x, weights = arguments
    specs = {
        "replicated": (P("expert"),) * 3,
        "rows sharded": (P("expert", "data"),) * 3,
        "columns sharded": (P("expert"), P("expert"), P("expert", None, "model")),
    }[how]
    x = np.pad(x, ((0, 0), (0, 0), (0, 1)))
    placed = place(mesh, specs, ids, x, weights)
    for _ in range(5):
        got = jax.device_get(run(*placed))
        for value, expected in zip(got, want_layer(ids, x, weights), strict=True):
            assert_same_bits(value, expected)


@both
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_partly_manual_gradients(implementation, axis_type):
    mesh = make_mesh({"data": 2, "expert": 4}, axis_type=axis_type)
    ids, x, weights = inputs((4,))

    def loss(ids, x, weights):
        _, _, out = layer(implementation)(ids, x, weights)
        return jnp.sum(jnp.sin(out))

    grad = jax.grad(loss, argnums=(1, 2))
    spec = P("expert")
    options = {"in_specs": spec, "out_specs": spec}
    partly = sharded(squeezed(grad, 1), mesh, axis_names={"expert"}, **options)
    wholly = sharded(squeezed(grad, 1), make_mesh(4), **options)
    placed = place(mesh, P("expert", "data"), ids, x, weights)
    jax.tree.map(assert_same_bits, partly(*placed), wholly(ids, x, weights))


@both
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_of_replicated_operands_are_summed(implementation, check_vma):
    """x varies over the expert axis alone, the weights over data too: shapes of cotangents hold."""
    mesh = make_mesh({"data": 2, "expert": 4}, axis_type=AxisType.Explicit)
    ids, x, _ = inputs((4,))
    _, _, weights = inputs((2, 4), seed=1)

    def local(ids, x, weights):
        _, _, out = layer(implementation)(ids[0], x[0], weights[0, 0])
        return out[None, None]

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("expert"), P("expert"), P("data", "expert")),
        out_specs=P("data", "expert"),
        check_vma=check_vma,
    )
    specs = P("expert"), P("expert"), P("data", "expert")
    placed = place(mesh, specs, ids, x, weights)
    dx, dweights = jax.jit(jax.grad(lambda x, w: jnp.sum(run(placed[0], x, w)), argnums=(0, 1)))(
        *placed[1:]
    )
    present = oracle.make_plan(ids, 8, None, 2).slot >= 0
    want_x = 2 * (weights * present).sum((0, 3))[..., None] * np.ones_like(x)
    want_w = 2 * np.broadcast_to(x.sum(-1)[None, ..., None] * present, weights.shape)
    np.testing.assert_allclose(dx, want_x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dweights, want_w, rtol=1e-4, atol=1e-5)


@both
def test_two_expert_axes_in_one_program(implementation):
    """A layer over one axis feeds a layer over the other, and one over both."""
    mesh = make_mesh({"a": 2, "b": 4}, order=[3, 1, 0, 2, 7, 5, 6, 4])
    spec = P("a", "b")
    ids, x, weights = inputs((2, 4))

    def local(ids, x, weights):
        for axis_name in ("a", "b", ("b", "a"), ("a", "b")):
            x = layer(implementation, axis_name)(ids, x, weights)[2]
        return x

    got = np.asarray(
        sharded(squeezed(local, 2), mesh, in_specs=spec, out_specs=spec)(ids, x, weights)
    )
    for b in range(4):
        x[:, b] = want_layer(ids[:, b], x[:, b], weights[:, b])[2]
    for a in range(2):
        x[a] = want_layer(ids[a], x[a], weights[a])[2]
    for axes in ((1, 0), (0, 1)):
        turned = [np.moveaxis(v, (0, 1), np.argsort(axes)) for v in (ids, x, weights)]
        shape = turned[0].shape[:2]
        out = want_layer(*(v.reshape(8, *v.shape[2:]) for v in turned))[2]
        x = np.moveaxis(out.reshape(*shape, T, D), np.argsort(axes), (0, 1))
    assert_same_bits(got, x)


@both
def test_ranks_are_not_device_ordinals(implementation):
    mesh = make_mesh(16, order=np.random.default_rng(0).permutation(16))
    spec = P("expert")
    run = sharded(
        squeezed(layer(implementation, num_experts=16), 1), mesh, in_specs=spec, out_specs=spec
    )
    arguments = inputs((16,), 16)
    for value, expected in zip(run(*arguments), want_layer(*arguments, 16), strict=True):
        assert_same_bits(value, expected)


@both
def test_set_mesh_and_a_mesh_that_changes_size(implementation):
    for ranks in (2, 8, 4):
        with jax.set_mesh(make_mesh(ranks, axis_type=AxisType.Explicit)):
            arguments = inputs((ranks,))
            run = jax.jit(
                jax.shard_map(
                    squeezed(layer(implementation), 1), in_specs=P("expert"), out_specs=P("expert")
                )
            )
            placed = [jax.device_put(a, P("expert")) for a in arguments]
            for value, expected in zip(run(*placed), want_layer(*arguments), strict=True):
                assert_same_bits(value, expected)
