"""The routers against literal NumPy loops, in float64 where only the weights are compared."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_fusco.flax import (
    Router,
    SigmoidRouter,
    SoftmaxRouter,
    TopKSoftmaxRouter,
    update_balance_bias,
)


def softmax(v: np.ndarray) -> np.ndarray:
    e = np.exp(v - v.max())
    return e / e.sum()


def best(v: np.ndarray, k: int) -> list[int]:
    """Indices of the k largest, ties to the lower index."""
    return sorted(range(len(v)), key=lambda i: (-v[i], i))[:k]


def logits_of(seed: int, tokens: int, experts: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, experts)).astype(np.float32)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (16, 8), (4, 1), (3, 3)])
def test_softmax_router(renormalize: bool, experts: int, k: int) -> None:
    logits = logits_of(0, 33, experts)
    got = SoftmaxRouter(renormalize=renormalize)(jnp.asarray(logits), k)
    for t in range(len(logits)):
        probs = softmax(logits[t].astype(np.float64))
        ids = best(probs, k)
        weights = probs[ids] / (probs[ids].sum() if renormalize else 1.0)
        assert list(got.expert_ids[t]) == ids
        np.testing.assert_allclose(got.weights[t], weights, rtol=2e-6)
        np.testing.assert_allclose(got.probs[t], probs, rtol=2e-6)


def test_mixtral_softmax_of_the_chosen_is_the_renormalised_softmax() -> None:
    logits = jnp.asarray(logits_of(1, 20, 8))
    ours = SoftmaxRouter()(logits, 2)
    chosen = TopKSoftmaxRouter(use_bias=False)(logits, 2)
    np.testing.assert_array_equal(ours.expert_ids, chosen.expert_ids)
    np.testing.assert_allclose(ours.weights, chosen.weights, rtol=1e-6)


def deepseek(
    logits: np.ndarray, bias: np.ndarray, k: int, groups: int, kept: int, scale: float
) -> tuple[list[int], np.ndarray]:
    scores = 1 / (1 + np.exp(-logits))
    choice = scores + bias
    size = len(scores) // groups
    worth = np.array([np.sort(choice[g * size : (g + 1) * size])[-2:].sum() for g in range(groups)])
    allowed = best(worth, kept)
    choice = np.array([c if e // size in allowed else -np.inf for e, c in enumerate(choice)])
    ids = best(choice, k)
    return ids, scores[ids] / scores[ids].sum() * scale


@pytest.mark.parametrize(
    ("experts", "k", "groups", "kept", "scale"),
    [(32, 4, 8, 4, 2.5), (24, 6, 1, 1, 2.827), (8, 2, 8, 3, 1.0), (16, 8, 4, 2, 2.5)],
)
def test_sigmoid_router(experts: int, k: int, groups: int, kept: int, scale: float) -> None:
    logits = logits_of(2, 40, experts)
    bias = np.random.default_rng(3).normal(size=experts).astype(np.float32) * 0.3
    router = SigmoidRouter(num_groups=groups, groups_kept=kept, scale=scale)
    got = router(jnp.asarray(logits), k, jnp.asarray(bias))
    for t in range(len(logits)):
        ids, weights = deepseek(logits[t].astype(np.float64), bias, k, groups, kept, scale)
        assert list(got.expert_ids[t]) == ids
        np.testing.assert_allclose(got.weights[t], weights, rtol=3e-6)
    np.testing.assert_allclose(got.probs.sum(-1), 1.0, rtol=1e-6)


def test_group_limit_holds_where_every_kept_score_is_negative() -> None:
    bias = jnp.full(8, -5.0)
    got = SigmoidRouter(num_groups=4, groups_kept=1)(jnp.asarray(logits_of(4, 50, 8)), 2, bias)
    assert (got.expert_ids // 2 == got.expert_ids[:, :1] // 2).all()


def test_gpt_oss_router() -> None:
    logits = logits_of(5, 30, 16)
    got = TopKSoftmaxRouter()(jnp.asarray(logits), 4)
    for t in range(len(logits)):
        ids = best(logits[t], 4)
        assert list(got.expert_ids[t]) == ids
        np.testing.assert_allclose(got.weights[t], softmax(logits[t][ids]), rtol=2e-6)


@pytest.mark.parametrize("router", [SoftmaxRouter(), SigmoidRouter(), TopKSoftmaxRouter()])
def test_ties_go_to_the_lower_id(router: Router) -> None:
    ids = router(jnp.zeros((3, 8)), 3).expert_ids
    np.testing.assert_array_equal(ids, [[0, 1, 2]] * 3)


@pytest.mark.parametrize("router", [SoftmaxRouter(), SigmoidRouter(), TopKSoftmaxRouter()])
def test_the_balance_bias_changes_the_choice_alone(router: Router) -> None:
    logits = jnp.asarray(logits_of(6, 20, 8))
    bias = jnp.zeros(8).at[7].set(100.0)
    got = router(logits, 2, bias)
    assert (got.expert_ids[:, 0] == 7).all()
    plain = router(logits, 8)
    order = jnp.argsort(plain.expert_ids, axis=-1)
    every = jnp.take_along_axis(plain.weights, order, axis=-1)
    ratio = jnp.take_along_axis(every, got.expert_ids, axis=-1)
    np.testing.assert_allclose(
        got.weights[:, 0] / got.weights[:, 1], ratio[:, 0] / ratio[:, 1], rtol=1e-5
    )
    gradient = jax.grad(lambda b: router(logits, 2, b).weights[:, 0].sum())(bias)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize(
    "router",
    [
        SoftmaxRouter(),
        SoftmaxRouter(renormalize=False),
        SigmoidRouter(num_groups=4, groups_kept=2, scale=2.5),
        TopKSoftmaxRouter(),
    ],
)
def test_weights_are_differentiable(router: Router) -> None:
    logits = jnp.asarray(logits_of(7, 4, 8), jnp.float32)
    pull = jnp.asarray(logits_of(8, 4, 3))
    bias = jnp.zeros(8) if router.use_balance_bias else None

    @jax.jit
    def f(v: jax.Array) -> jax.Array:
        return (router(v, 3, bias).weights * pull).sum()

    steps = 1e-2 * jnp.eye(logits.size).reshape(-1, *logits.shape)
    slopes = jax.vmap(lambda step: f(logits + step) - f(logits - step))(steps) / 2e-2
    np.testing.assert_allclose(jax.grad(f)(logits), slopes.reshape(logits.shape), atol=2e-3)


def test_scores_that_all_vanish_give_finite_weights_and_gradients() -> None:
    logits = jnp.full((2, 4), -200.0)
    f = lambda v: SigmoidRouter()(v, 2).weights.sum()  # noqa: E731
    assert jnp.isfinite(f(logits))
    assert jnp.isfinite(jax.grad(f)(logits)).all()


def test_the_balance_update_is_the_sign_of_the_load_error() -> None:
    got = update_balance_bias(jnp.asarray([0.5, 0.0, 0.0, -1.0]), jnp.asarray([4, 0, 2, 2]), 0.1)
    np.testing.assert_allclose(got, [0.4, 0.1, 0.0, -1.0], atol=1e-7)


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (jnp.ones(7), ValueError, "tokens_per_expert: got shape (7,), need (8,) of bias"),
        (jnp.ones((2, 8)), ValueError, "tokens_per_expert: got shape (2, 8), need (8,) of bias"),
        (None, TypeError, "tokens_per_expert: got NoneType, need an array"),
    ],
)
def test_the_balance_update_needs_a_count_of_each_expert(
    counts: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        update_balance_bias(jnp.zeros(8), counts)


def test_the_balance_update_evens_out_a_skewed_router() -> None:
    logits = jnp.asarray(logits_of(9, 512, 8)) + jnp.linspace(2.0, -2.0, 8)
    router, bias = SigmoidRouter(), jnp.zeros(8)

    def load(bias: jax.Array) -> jax.Array:
        return jnp.bincount(router(logits, 2, bias).expert_ids.reshape(-1), length=8)

    before = load(bias)
    for _ in range(150):
        bias = update_balance_bias(bias, load(bias), 1e-2)
    assert before.max() > 300
    assert load(bias).max() < 1.15 * 512 * 2 / 8


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    groups=st.sampled_from([1, 2, 4]),
    size=st.integers(1, 4),
    data=st.data(),
)
def test_sigmoid_router_over_many_shapes(
    seed: int, groups: int, size: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, kept * size))
    logits = np.round(logits_of(seed, 6, groups * size), 1)  # ties are likely
    bias = np.zeros(groups * size, np.float32)
    router = SigmoidRouter(num_groups=groups, groups_kept=kept)
    router.check(groups * size, k)
    got = router(jnp.asarray(logits), k, jnp.asarray(bias))
    assert all(len(set(row)) == k for row in np.asarray(got.expert_ids).tolist())
    assert all(len(set(row)) <= kept for row in (np.asarray(got.expert_ids) // size).tolist())
    np.testing.assert_allclose(got.weights.sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("router", "experts", "k", "message"),
    [
        (SoftmaxRouter(), 4, 5, "top_k: got 5, need 1 to num_experts (4)"),
        (TopKSoftmaxRouter(), 4, 0, "top_k: got 0, need 1 to num_experts (4)"),
        (
            SigmoidRouter(num_groups=3),
            8,
            2,
            "num_groups: got 3, need a divisor of num_experts (8)",
        ),
        (
            SigmoidRouter(num_groups=4, groups_kept=5),
            8,
            2,
            "groups_kept: got 5, need 1 to num_groups (4)",
        ),
        (
            SigmoidRouter(num_groups=4, groups_kept=1),
            8,
            3,
            "top_k: got 3, need at most the 2 experts of groups_kept",
        ),
    ],
)
def test_what_a_router_cannot_do_is_said(
    router: Router, experts: int, k: int, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        router.check(experts, k)


def test_routers_are_hashable_and_equal_by_value() -> None:
    assert hash(SoftmaxRouter()) == hash(SoftmaxRouter())
    assert SigmoidRouter(scale=2.5) == SigmoidRouter(scale=2.5)
    assert isinstance(SoftmaxRouter(), Router)
