"""Everything runs where JAX refuses to promote ranks and dtypes, as some programs ask it to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import make_mesh
from jax.sharding import PartitionSpec as P

import jax_fusco as jf
from jax_fusco import two_level
from jax_fusco.flax import (
    MoE,
    RankLimitedRouter,
    SigmoidRouter,
    SoftmaxRouter,
    TopKSoftmaxRouter,
    update_balance_bias,
)

EXPERTS, K, D, H = 8, 2, 4, 3
RANKS = ("node", "expert")


@pytest.fixture(autouse=True, params=["ranks", "dtypes"])
def strict(request: pytest.FixtureRequest) -> Iterator[None]:
    jax.clear_caches()  # what was traced before would not be refused
    context: Any = contextlib.nullcontext()
    if request.param == "ranks":
        context = jax.numpy_rank_promotion("raise")
    else:
        context = jax.numpy_dtype_promotion("strict")
    with context:
        yield


def layer(x, ids, weights, kernel, *, grouped: dict[str, Any], plan: dict[str, Any]):
    made = jf.make_plan(ids, axis_name=RANKS, num_experts=EXPERTS, **plan)
    rows = jf.dispatch(x, made)
    if isinstance(made, jf.TokenPlan):
        options = {"source": made.source, "merge": made.source, "num_rows": made.capacity}
        scale = made.local_weights(weights)
        y = jf.grouped_matmul(
            rows, kernel, made.group_sizes, merge_weights=scale, **options, **grouped
        )
        return jf.combine(y, None, made)
    y = jf.grouped_matmul(rows, kernel, made.group_sizes, **grouped)
    return jf.combine(y, weights, made)


@pytest.mark.parametrize(("implementation", "dtype"), [("fused", "bfloat16"), ("xla", "float32")])
@pytest.mark.parametrize("case", ["plain", "token", "topology", "overlap", "ragged", "replicas"])
def test_layers_and_their_gradients(case, dtype, implementation, monkeypatch):
    monkeypatch.setattr(two_level, "_overlaps", lambda: case == "overlap")
    plan: dict[str, Any] = {"implementation": implementation}
    grouped: dict[str, Any] = {} if implementation == "fused" else {"implementation": "xla"}
    slots = np.arange(EXPERTS)
    if case == "token":
        plan["rows"] = "token"
    elif case in ("topology", "overlap", "ragged"):
        exchange = "ragged" if case == "ragged" else "dense"
        plan["topology"] = jf.Topology(slice_rows=2, exchange=exchange)
    elif case == "replicas":
        slots = np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 0, 3])
        plan["placement"] = jf.Placement.of_slots(slots, num_experts=EXPERTS, num_ranks=4)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4 * 6, D)), dtype)
    ids = jnp.asarray(rng.permuted(np.tile(np.arange(EXPERTS), (24, 1)), axis=1)[:, :K], jnp.int32)
    weights = jnp.asarray(rng.random((24, K)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(EXPERTS, D, H)), dtype)[slots]
    mapped = jax.shard_map(
        lambda *a: layer(*a, grouped=grouped, plan=plan),
        mesh=make_mesh({"node": 2, "expert": 2}),
        in_specs=P(RANKS),
        out_specs=P(RANKS),
    )

    def loss(x, weights, kernel):
        return jnp.square(mapped(x, ids, weights, kernel).astype(jnp.float32)).sum()

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, weights, kernel)
    assert all(np.isfinite(np.asarray(g, "f4")).all() and np.any(np.asarray(g)) for g in found)


@pytest.mark.parametrize(
    "options",
    [
        {"rows": "token"},
        {"router": SigmoidRouter(num_groups=4, groups_kept=2), "num_shared_experts": 1},
        {"router": TopKSoftmaxRouter(), "activation": "clamped_swiglu", "use_bias": True},
        {"router": SoftmaxRouter(use_bias=True), "dtype": jnp.bfloat16, "report_expert_ids": True},
        {"router": RankLimitedRouter(SoftmaxRouter(), num_ranks=4, max_ranks=1)},
    ],
)
def test_blocks(options):
    mesh = make_mesh(4)
    with jax.set_mesh(mesh):
        moe = MoE(D, H, num_experts=EXPERTS, top_k=K, rngs=nnx.Rngs(0), **options)

        @nnx.jit
        def step(moe, x):
            def loss(moe):
                y, metrics = moe(x, jnp.ones(x.shape[:-1], bool))
                return jnp.square(y.astype(jnp.float32)).mean() + metrics.load_balance_loss, metrics

            return nnx.grad(loss, has_aux=True)(moe)

        _, metrics = step(moe, jnp.ones((8, 4, D)))
        if moe.router.use_balance_bias:
            update_balance_bias(moe.balance_bias[...], metrics.tokens_per_expert)
        if moe.report_expert_ids:
            stats = jf.RoutingStats.zeros(EXPERTS).update(metrics.expert_ids)
            assert int(stats.tokens) == 32


def test_statistics_and_placements():
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, EXPERTS, (3, 50, K)), jnp.int32)
    stats = jf.RoutingStats.zeros(EXPERTS, 3).update(ids)
    placement = jf.optimize_placement(stats, 4)
    state = {"router": jnp.ones((3, D, EXPERTS)), "kernel": jnp.ones((3, EXPERTS, D, H))}
    placement.apply(state, expert_axes={"router": -1, "kernel": -3})
    jax.jit(lambda s: placement.apply(s, expert_axes={"kernel": -3})[0])(state)
    gradients = jnp.ones((4, D))
    one = jf.Placement.of_slots([0, 1, 0, 1], num_experts=2, num_ranks=2)
    assert (jax.jit(one.sum_replicas)(gradients) == 2).all()
    few = jf.RoutingStats.zeros(EXPERTS, num_samples=8).update(ids[0])
    assert int(few.merge(few).tokens) == 100
