"""RankLimitedRouter: its promise, what it is made of, training with it, its refusals."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import make_mesh
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_fusco as jf
from jax_fusco.flax import (
    MoE,
    MoEMetrics,
    RankLimitedRouter,
    SigmoidRouter,
    SoftmaxRouter,
    TopKSoftmaxRouter,
)

EXPERTS = 16
ROUTERS = [
    SoftmaxRouter(),
    SoftmaxRouter(renormalize=False),
    SigmoidRouter(scale=2.5),
    TopKSoftmaxRouter(),
]


def logits_of(seed: int, tokens: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, EXPERTS)).astype(np.float32)


@settings(max_examples=25)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(ROUTERS),
    st.sampled_from([(4, 1), (4, 2), (8, 2), (8, 4)]),
    st.integers(1, 4),
    st.sampled_from([None, 1, 2]),
    st.booleans(),
)
def test_no_token_passes_the_limits_and_it_is_limit_ranks(
    seed: int, router: Any, ranks: tuple[int, int], most: int, nodes: int | None, similar: bool
) -> None:
    count, local = ranks
    logits = logits_of(seed)
    similarity = jf.router_similarity(logits_of(seed + 1)) if similar else None
    limited = RankLimitedRouter(router, count, most, local, nodes, similarity)
    limited.check(EXPERTS, 4)
    hash(limited)
    bias = np.linspace(-0.1, 0.1, EXPERTS, dtype=np.float32) if router.use_balance_bias else None
    got = limited(jnp.asarray(logits), 4, bias)
    ids = np.asarray(got.expert_ids)
    for token in ids:
        rank = token[token >= 0] // (EXPERTS // count)
        assert len(set(rank.tolist())) <= most
        assert len(set((rank // local).tolist())) <= (nodes or count // local)
    own = router(jnp.asarray(logits), 4, bias)
    by_hand = jf.limit_ranks(
        own.expert_ids,
        own.weights,
        own.probs,
        jf.Placement.identity(EXPERTS, count, ranks_per_node=local),
        most,
        max_nodes=nodes,
        method="similarity" if similar else "router",
        similarity=similarity,
        renormalize=router != SoftmaxRouter(renormalize=False),
    )
    np.testing.assert_array_equal(ids, by_hand[0])
    np.testing.assert_array_equal(got.weights, by_hand[1])
    np.testing.assert_array_equal(got.probs, own.probs)


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_reach_the_logits(router: Any) -> None:
    """Those of the weights that the router itself would give the experts it ends with."""
    limited, logits = RankLimitedRouter(router, 4, 1), jnp.asarray(logits_of(0))
    ids = limited(logits, 4).expert_ids
    assert (ids != router(logits, 4).expert_ids).any(1).sum() > 20
    mix = jnp.asarray(np.random.default_rng(1).normal(size=ids.shape), jnp.float32)

    def expected(logits: jax.Array) -> jax.Array:
        chosen = jnp.take_along_axis(logits, ids, axis=1)
        if isinstance(router, SigmoidRouter):
            scores = jax.nn.sigmoid(chosen)
            weights = 2.5 * scores / scores.sum(1, keepdims=True)
        elif router == SoftmaxRouter(renormalize=False):
            weights = jnp.take_along_axis(jax.nn.softmax(logits), ids, axis=1)
        else:
            weights = jax.nn.softmax(chosen)
        return (weights * mix).sum()

    value, gradient = jax.value_and_grad(lambda x: (limited(x, 4).weights * mix).sum())(logits)
    want_value, want = jax.value_and_grad(expected)(logits)
    np.testing.assert_allclose(value, want_value, rtol=1e-4)
    np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-5)
    assert (np.abs(want).max(1) > 1e-4).all()


def block(router: Any) -> MoE:
    return MoE(
        8,
        12,
        num_experts=EXPERTS,
        top_k=4,
        router=router,
        capacity_factor=None,
        report_expert_ids=True,
        rngs=nnx.Rngs(0),
    )


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(graph: Any, state: Any, x: jax.Array) -> Any:
    def loss(state: Any) -> tuple[jax.Array, tuple[jax.Array, MoEMetrics]]:
        y, metrics = nnx.merge(graph, state)(x)
        return ((y - x) ** 2).mean(), (y, metrics)

    return jax.value_and_grad(loss, has_aux=True)(state)


def test_a_block_on_a_mesh_trains_with_it() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 8)), jnp.float32)
    with jax.set_mesh(make_mesh(4)):
        graph, state = nnx.split(block(RankLimitedRouter(SoftmaxRouter(), 4, 2, 2, 1)))
        optimizer = optax.adam(3e-2)

        @jax.jit
        def step(state: Any, moments: Any) -> tuple[Any, ...]:
            (loss, (_, metrics)), gradients = value_and_gradients(graph, state, x)
            updates, moments = optimizer.update(gradients, moments)
            router = jnp.abs(gradients["router_kernel"][...]).max()
            return optax.apply_updates(state, updates), moments, loss, router, metrics

        moments, losses = jax.jit(optimizer.init)(state), []
        for _ in range(6):
            state, moments, loss, router_gradient, metrics = step(state, moments)
            assert router_gradient > 0
            losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    rank = np.asarray(metrics.expert_ids) // 4
    assert max(len(set(token)) for token in rank.reshape(-1, 4).tolist()) == 2
    assert (rank.min(-1) // 2 == rank.max(-1) // 2).all()
    assert metrics.invalid == metrics.dropped == 0


def test_all_ranks_are_the_plain_router_bit_for_bit() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)
    with jax.set_mesh(make_mesh(4)):
        found = []
        for router in (SoftmaxRouter(), RankLimitedRouter(SoftmaxRouter(), 4, 4, 2, 2)):
            found.append(jax.device_get(value_and_gradients(*nnx.split(block(router)), x)))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (TypeError, {"router": "softmax"}, "router: got 'softmax', need a jax_fusco.flax.Router"),
        (
            TypeError,
            {"router": SoftmaxRouter},
            f"router: got {SoftmaxRouter!r}, need a jax_fusco.flax.Router",
        ),
        (
            ValueError,
            {"router": SigmoidRouter(num_groups=3)},
            "num_groups: got 3, need a divisor of num_experts (16)",
        ),
        (TypeError, {"num_ranks": 4.0}, "num_ranks: got 4.0, need an integer of at least 1"),
        (
            ValueError,
            {"num_ranks": 5},
            "num_experts: got 16, need a multiple of the number of ranks (5)",
        ),
        (ValueError, {"max_ranks": 0}, "max_ranks: got 0, need an integer of at least 1"),
        (
            ValueError,
            {"ranks_per_node": 3},
            "ranks_per_node: got 3, need a divisor of the 4 ranks",
        ),
        (TypeError, {"max_nodes": True}, "max_nodes: got True, need an integer of at least 1"),
        (
            ValueError,
            {"router": SigmoidRouter(num_groups=8, groups_kept=2)},
            "num_ranks: got 4, need a multiple of the router's 8 groups: on a rank with experts of "
            "two groups tokens would leave those they keep",
        ),
        (ValueError, {"similarity": np.eye(3)}, "similarity: got shape (3, 3), need (16, 16)"),
        (ValueError, {"similarity": np.ones(3)}, "similarity: got shape (3,), need [E, E]"),
        (
            TypeError,
            {"similarity": [[1.0], [1.0, 2.0]]},
            "similarity: got list, need an array [E, E] or None",
        ),
        (
            ValueError,
            {"similarity": np.full((16, 16), np.nan)},
            "similarity: got a value that is not finite, need finite ones",
        ),
    ],
)
def test_errors(kind: type[Exception], options: dict[str, Any], message: str) -> None:
    options = {"router": SoftmaxRouter(), "num_ranks": 4, "max_ranks": 2, **options}
    with pytest.raises(kind) as error:
        block(RankLimitedRouter(**options))
    assert str(error.value) == message
