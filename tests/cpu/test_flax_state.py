"""The MoE block's parameters in NNX's hands: creation, transforms, training, checkpoints."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import make_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fusco as jf
from jax_fusco.flax import BalanceBias, MoE, MoEMetrics, SigmoidRouter, update_balance_bias

SPECS = {
    "router_kernel": P(None, None),
    "balance_bias": P(None),
    "wi_kernel": P("expert", None, None, "model"),
    "wi_bias": P("expert", None, "model"),
    "wo_kernel": P("expert", "model", None),
    "wo_bias": P("expert", None),
    "shared_wi_kernel": P(None, None, "model"),
    "shared_wo_kernel": P("model", None),
}


def block(seed: int = 0, **options: Any) -> MoE:
    options.setdefault("capacity_factor", None)
    return MoE(12, 8, num_experts=8, top_k=2, rngs=nnx.Rngs(seed), **options)


def full(seed: int = 0) -> MoE:
    """A block with every parameter there can be."""
    return block(
        seed, router=SigmoidRouter(), use_bias=True, num_shared_experts=1, model_axis="model"
    )


def tokens_of(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


@nnx.jit
def apply(moe: MoE, x: jax.Array) -> jax.Array:
    return moe(x)[0]


def test_parameters_name_their_axes_without_any_mesh() -> None:
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(full())))
    assert specs == SPECS


@pytest.mark.parametrize(
    ("jit", "axis_type"),
    [(True, AxisType.Auto), (True, AxisType.Explicit), (False, AxisType.Explicit)],
)
def test_parameters_are_made_sharded_and_the_same_on_any_mesh(
    axis_type: AxisType, jit: bool
) -> None:
    want = full().params()
    mesh = make_mesh({"expert": 4, "model": 2}, axis_type=axis_type)
    with jax.set_mesh(mesh):
        moe = nnx.jit(full)() if jit else full()
    for name, array in moe.params().items():
        sharding = NamedSharding(mesh, SPECS[name])
        assert array.sharding.is_equivalent_to(sharding, array.ndim), name
        np.testing.assert_allclose(array, want[name], rtol=1e-6, atol=1e-7)


def test_every_kernel_has_the_spread_of_its_own_fan_in() -> None:
    moe = MoE(64, 256, num_experts=4, top_k=1, num_shared_experts=2, rngs=nnx.Rngs(0))
    for name, fan_in in {
        "router_kernel": 64,
        "wi_kernel": 64,
        "wo_kernel": 256,
        "shared_wi_kernel": 64,
        "shared_wo_kernel": 512,
    }.items():
        spread = float(jnp.std(moe.params()[name]))
        np.testing.assert_allclose(spread, fan_in**-0.5, rtol=0.1, err_msg=name)


def test_only_params_are_trained() -> None:
    gradients = nnx.grad(lambda moe, x: moe(x)[0].sum())(full(), tokens_of(6, 12))
    assert set(nnx.to_pure_dict(gradients)) == set(SPECS) - {"balance_bias"}


def test_training_on_a_mesh_learns_and_balances() -> None:
    x, target = tokens_of(8, 8, 12), jnp.roll(tokens_of(8, 8, 12), 1, axis=-1)
    with jax.set_mesh(make_mesh({"data": 2, "expert": 2})):
        moe = block(router=SigmoidRouter(), capacity_factor=2.0)
        moe.router_kernel[...] = moe.router_kernel[...] * 4.0
        optimizer = nnx.Optimizer(moe, optax.adam(1e-2), wrt=nnx.Param)

        @nnx.jit
        def step(moe: MoE, optimizer: nnx.Optimizer) -> tuple[jax.Array, Any]:
            def loss_of(moe: MoE) -> tuple[jax.Array, Any]:
                y, metrics = moe(x)
                return ((y - target) ** 2).mean() + 1e-3 * metrics.router_z_loss, metrics

            (loss, metrics), gradients = nnx.value_and_grad(loss_of, has_aux=True)(moe)
            optimizer.update(moe, gradients)
            assert moe.balance_bias is not None
            moe.balance_bias[...] = update_balance_bias(
                moe.balance_bias[...], metrics.tokens_per_expert, 2e-2
            )
            return loss, metrics

        losses, loads = [], []
        for _ in range(60):
            loss, metrics = step(moe, optimizer)
            losses.append(float(loss))
            loads.append(int(metrics.tokens_per_expert.max()))
    assert losses[-1] < 0.5 * losses[0]
    assert loads[-1] < loads[0]
    assert isinstance(moe.balance_bias, BalanceBias)


def stack(mode: str, layers: int = 3) -> tuple[Any, Any]:
    """(blocks with a leading axis of layers, the function that runs them over x)."""

    @nnx.vmap(in_axes=0, out_axes=0, axis_size=layers, transform_metadata={"partition_name": None})
    def make(rngs: nnx.Rngs) -> MoE:
        return MoE(
            12, 8, num_experts=8, top_k=2, capacity_factor=None, rngs=rngs, report_expert_ids=True
        )

    def layer(x: jax.Array, moe: MoE) -> tuple[jax.Array, MoEMetrics]:
        y, metrics = moe(x)
        return x + y, metrics

    if mode != "plain":
        names = jf.REMAT_SAVE_NAMES if mode == "names" else ()
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        layer = nnx.remat(layer, policy=policy)
    scanned = nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    return make(nnx.Rngs(0).split(layers)), scanned


@pytest.mark.parametrize(
    ("mode", "axis_type"),
    [("plain", AxisType.Explicit), ("full", AxisType.Auto), ("names", AxisType.Explicit)],
)
def test_a_scan_over_layers_with_and_without_remat(mode: str, axis_type: AxisType) -> None:
    x = tokens_of(4, 6, 12)
    with jax.set_mesh(make_mesh({"data": 2, "expert": 2}, axis_type=axis_type)):
        blocks, scanned = stack(mode)
        assert nnx.get_partition_spec(blocks.wi_kernel).get_value() == P(
            None, "expert", None, None, None
        )

        graph, state = nnx.split(blocks)

        def loss(state: Any, x: jax.Array) -> tuple[jax.Array, MoEMetrics]:
            y, metrics = scanned(x, nnx.merge(graph, state))
            return (y**2).mean() + metrics.load_balance_loss.sum(), metrics

        @jax.jit
        def train(state: Any, stats: jf.RoutingStats, x: jax.Array) -> tuple[Any, ...]:
            (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state, x)
            return value, gradients, stats.update(metrics.expert_ids), metrics

        stats = jf.RoutingStats.zeros(8, 3, num_samples=16)
        step = train.lower(state, stats, x).compile()
        value, gradients, counted, metrics = step(state, stats, x)
    ids = jax.device_get(metrics.expert_ids)
    assert ids.shape == (3, 4, 6, 2)
    jax.tree.map(np.testing.assert_array_equal, counted, stats.update(ids))
    np.testing.assert_array_equal(counted.load, metrics.tokens_per_expert)
    # Remat repeats the plan and the dispatch, unless it may save them by name.
    calls = re.findall(r'custom_call_target="jax_fusco_(\w+)"', step.as_text())
    assert calls.count("plan") == (2 if mode == "full" else 1)
    assert calls.count("gather_rows") == (3 if mode == "full" else 2)
    state = jax.device_get(state)

    def loop(state: Any, x: jax.Array) -> jax.Array:
        total = jnp.zeros(())
        for i in range(3):
            y, metrics = nnx.merge(graph, jax.tree.map(lambda a: a[i], state))(x)  # noqa: B023
            x, total = x + y, total + metrics.load_balance_loss
        return (x**2).mean() + total

    want, want_gradients = jax.jit(jax.value_and_grad(loop))(state, x)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    want_gradients = nnx.to_pure_dict(want_gradients)
    for name, gradient in nnx.to_pure_dict(gradients).items():
        scale = max(1.0, float(np.abs(gradient).max()))
        np.testing.assert_allclose(gradient, want_gradients[name], rtol=1e-4, atol=1e-5 * scale)


def restored(path: pathlib.Path, mesh: Mesh | None) -> MoE:
    """The saved block on `mesh`, sharded as its parameters say."""
    abstract = nnx.eval_shape(full)
    graph, state = nnx.split(abstract)
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: one, state)
    else:
        shardings = nnx.get_named_sharding(state, mesh)
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
    with ocp.StandardCheckpointer() as checkpointer:
        return nnx.merge(graph, checkpointer.restore(path, target))


def test_orbax_restores_onto_another_number_of_devices(tmp_path: pathlib.Path) -> None:
    x = tokens_of(4, 6, 12)
    with jax.set_mesh(make_mesh({"expert": 2, "model": 2})):
        moe = full(seed=3)
        assert moe.balance_bias is not None
        moe.balance_bias[...] = moe.balance_bias[...] + jnp.linspace(-0.1, 0.1, 8)
        want = apply(moe, x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(moe))
    for sizes in ({"expert": 8, "model": 1}, {"expert": 4, "model": 2}, {"expert": 1, "model": 1}):
        mesh = make_mesh(sizes)
        back = restored(tmp_path / "state", mesh)
        for name, array in back.params().items():
            np.testing.assert_array_equal(array, moe.params()[name])
            assert array.sharding.is_equivalent_to(NamedSharding(mesh, SPECS[name]), array.ndim)
        with jax.set_mesh(mesh):
            np.testing.assert_allclose(apply(back, x), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        apply(restored(tmp_path / "state", None), x), want, rtol=1e-5, atol=1e-5
    )
