"""limit_ranks against literal loops; its promise, its gradients, its refusals."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_fusco as jf
from jax_fusco.flax import SigmoidRouter, SoftmaxRouter, TopKSoftmaxRouter


def admit(ids, scores, group, most):
    """The first `most` distinct groups, from the best expert down."""
    admitted = []
    for expert in sorted((e for e in ids if e >= 0), key=lambda e: -scores[e]):
        if group[expert] not in admitted and len(admitted) < most:
            admitted.append(group[expert])
    return admitted


def limit(ids, scores, group, most, similarity):
    """One token's experts."""
    valid = sorted((e for e in ids if e >= 0), key=lambda e: -scores[e])
    if len({group[e] for e in valid}) <= most:
        return list(ids)
    admitted = admit(ids, scores, group, most)
    there = [e for e in range(len(scores)) if group[e] in admitted]
    if similarity is None:
        chosen = sorted(there, key=lambda e: -scores[e])[: len(valid)]
    else:
        chosen = [e if group[e] in admitted else None for e in valid]
        for j, expert in enumerate(valid):
            free = [e for e in there if e not in chosen]
            if chosen[j] is None:
                chosen[j] = max(free, key=lambda e: similarity[expert, e]) if free else -1
    return chosen + [-1] * (len(ids) - len(chosen))


def literal(ids, weights, scores, placement, most, nodes=None, similarity=None, renormalize=True):
    rank = placement.rank_of_expert
    new_ids, new_weights = ids.copy(), weights.copy()
    for t in range(len(ids)):
        chosen = list(ids[t])
        if nodes is not None:
            chosen = limit(chosen, scores[t], rank // placement.ranks_per_node, nodes, similarity)
        chosen = limit(chosen, scores[t], rank, most, similarity)
        if chosen == list(ids[t]):
            continue
        new = np.array([scores[t, e] if e >= 0 else 0.0 for e in chosen])
        old = sum(scores[t, e] for e in ids[t] if e >= 0)
        total = sum(w for w, e in zip(weights[t], ids[t], strict=True) if e >= 0)
        new_ids[t] = chosen
        new_weights[t] = new * total / (new.sum() if renormalize else old)
    return new_ids, new_weights


def case(seed, k=4, experts=16, ranks=4, local=2, tokens=40, holes=True):
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.full(experts, 0.5), tokens).astype(np.float32)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)
    if holes:
        ids[rng.random(ids.shape) < 0.15] = -1
    weights = np.where(ids >= 0, 2.5 * np.take_along_axis(scores, ids, 1), 0).astype(np.float32)
    placement = jf.Placement.of_slots(
        rng.permutation(experts), num_experts=experts, num_ranks=ranks, ranks_per_node=local
    )
    logits = rng.normal(size=(100, experts))
    return ids, weights, scores, placement, np.asarray(jf.router_similarity(logits))


@functools.cache
def limiter(most, nodes, similar, renormalize):
    def run(ids, weights, scores, placement, similarity):
        return jf.limit_ranks(
            ids,
            weights,
            scores,
            placement,
            max_ranks=most,
            max_nodes=nodes,
            renormalize=renormalize,
            method="similarity" if similar else "router",
            similarity=similarity if similar else None,
        )

    return jax.jit(run)


@settings(max_examples=25)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([None, 1, 2]),
    st.booleans(),
    st.booleans(),
)
def test_against_literal_loops(seed, most, nodes, similar, renormalize):
    ids, weights, scores, placement, similarity = case(seed)
    options = {"similarity": similarity} if similar else {}
    run = limiter(most, nodes, similar, renormalize)
    new_ids, new_weights = run(ids, weights, scores, placement, similarity)
    want = literal(ids, weights, scores, placement, most, nodes, renormalize=renormalize, **options)
    np.testing.assert_array_equal(new_ids, want[0])
    np.testing.assert_allclose(new_weights, want[1], rtol=1e-5, atol=1e-6)
    rank = placement.rank_of_expert
    for token, before in zip(np.asarray(new_ids), ids, strict=True):
        valid = token[token >= 0]
        assert len(set(valid.tolist())) == len(valid)
        assert len(set(rank[valid].tolist())) <= most
        assert len(set((rank[valid] // 2).tolist())) <= (nodes or most)
        if len(set(rank[before[before >= 0]].tolist())) <= most and nodes is None:
            np.testing.assert_array_equal(token, before)


@pytest.mark.parametrize(
    "router",
    [
        SoftmaxRouter(),
        SoftmaxRouter(renormalize=False),
        SigmoidRouter(scale=2.5),
        TopKSoftmaxRouter(),
    ],
)
def test_weights_are_what_the_router_itself_would_give(router):
    """Limited weights equal those of the same router that sees no other experts."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(64, 16)), jnp.float32)
    routing = router(logits, 4)
    placement = jf.Placement.identity(16, 4)
    proportional = (
        jax.nn.softmax(logits)
        if isinstance(router, TopKSoftmaxRouter)
        else (jax.nn.sigmoid(logits) if isinstance(router, SigmoidRouter) else routing.probs)
    )
    renormalize = getattr(router, "renormalize", True)
    ids, weights = jf.limit_ranks(
        routing.expert_ids, routing.weights, proportional, placement, 1, renormalize=renormalize
    )
    for t in range(64):
        rank = int(routing.expert_ids[t, 0]) // 4
        assert sorted(ids[t].tolist()) == list(range(4 * rank, 4 * rank + 4))
        alone = router(logits[t : t + 1, 4 * rank : 4 * rank + 4], 4)
        if isinstance(router, SoftmaxRouter) and not renormalize:
            alone = alone._replace(weights=jnp.take(proportional[t], ids[t])[None])
        np.testing.assert_allclose(weights[t], alone.weights[0], rtol=1e-5)


def test_experts_run_out():
    ids, weights, scores, _, _ = case(0, k=6, experts=8, ranks=4, holes=False)
    placement = jf.Placement.identity(8, 4)
    new_ids, new_weights = jf.limit_ranks(ids, weights, scores, placement, 1)
    assert ((np.asarray(new_ids) >= 0).sum(1) == 2).all()
    assert (np.asarray(new_weights)[np.asarray(new_ids) < 0] == 0).all()
    np.testing.assert_allclose(new_weights.sum(1), weights.sum(1), rtol=1e-5)


def test_ids_that_are_no_experts_become_none():
    """They must not come back as the last expert, which a clamped index would make of them."""
    scores = np.full((2, 8), 1 / 8, "f4")
    ids = np.array([[0, 8, 2], [7, -5, 99]], np.int32)
    placement = jf.Placement.identity(8, 4)
    got, _ = jf.limit_ranks(ids, np.ones((2, 3), "f4"), scores, placement, 3)
    np.testing.assert_array_equal(np.sort(got), [[-1, 0, 2], [-1, -1, 7]])
    got, _ = jf.limit_ranks(ids, np.ones((2, 3), "f4"), scores, placement, 1)
    np.testing.assert_array_equal(np.sort(got), [[-1, 0, 1], [-1, -1, 7]])


def test_all_ranks_change_nothing_and_leading_shapes_stay():
    ids, weights, scores, placement, _ = case(1)
    shape = (5, 8)
    new_ids, new_weights = jf.limit_ranks(
        ids.reshape(*shape, 4), weights.reshape(*shape, 4), scores.reshape(*shape, 16), placement, 4
    )
    np.testing.assert_array_equal(new_ids, ids.reshape(*shape, 4))
    np.testing.assert_array_equal(new_weights, weights.reshape(*shape, 4))


@pytest.mark.parametrize("renormalize", [True, False])
def test_gradients_reach_the_scores(renormalize):
    ids, _, scores, placement, _ = case(2, holes=False, tokens=6)
    rng = np.random.default_rng(0)
    mix = rng.normal(size=ids.shape).astype(np.float32)

    def objective(scores):
        weights = jnp.take_along_axis(scores, ids, axis=1)
        return (
            jf.limit_ranks(ids, weights, scores, placement, 2, renormalize=renormalize)[1] * mix
        ).sum()

    gradient = jax.grad(objective)(scores)
    assert np.isfinite(gradient).all()
    direction = rng.normal(size=scores.shape).astype(np.float32) * scores
    step = 1e-3
    numeric = (objective(scores + step * direction) - objective(scores - step * direction)) / (
        2 * step
    )
    np.testing.assert_allclose((gradient * direction).sum(), numeric, rtol=2e-2, atol=1e-3)
    dead = np.zeros_like(scores)
    assert np.isfinite(jax.grad(objective)(dead)).all()


def test_similarity_is_the_cosine():
    logits = np.random.default_rng(0).normal(size=(3, 20, 5)).astype(np.float32)
    flat = logits.reshape(-1, 5).astype(float)
    want = [[a @ b / (a @ a) ** 0.5 / (b @ b) ** 0.5 for b in flat.T] for a in flat.T]
    np.testing.assert_allclose(jf.router_similarity(logits), want, atol=1e-6)


def test_errors():
    ids, weights, scores, placement, similarity = case(0)
    call = functools.partial(jf.limit_ranks, ids, weights, scores, placement)
    layers = jf.Placement.identity(16, 4, num_layers=2)
    copies = jf.Placement.of_slots([*range(16), 0, 1, 2, 3], num_experts=16, num_ranks=4)
    cases = [
        (ValueError, lambda: call(0), "max_ranks: got 0, need an integer of at least 1"),
        (TypeError, lambda: call(1.5), "max_ranks: got 1.5, need an integer of at least 1"),
        (
            ValueError,
            lambda: call(1, max_nodes=0),
            "max_nodes: got 0, need an integer of at least 1",
        ),
        (
            ValueError,
            lambda: call(1, method="x"),
            "method: got 'x', need one of router, similarity",
        ),
        (
            ValueError,
            lambda: call(1, method="similarity"),
            "similarity: got None, need one with method 'similarity' and None with 'router'",
        ),
        (
            ValueError,
            lambda: call(1, similarity=similarity),
            "similarity: got an array, need one with method 'similarity' and None with 'router'",
        ),
        (
            ValueError,
            lambda: call(1, method="similarity", similarity=similarity[:3]),
            "similarity: got shape (3, 16), need (16, 16)",
        ),
        (
            TypeError,
            lambda: jf.limit_ranks(ids, weights, scores, 3, 1),
            "placement: got int, need a Placement",
        ),
        (
            ValueError,
            lambda: jf.limit_ranks(ids, weights, scores, layers, 1),
            "placement: got one of 2 layers, need placement.layer(index)",
        ),
        (
            ValueError,
            lambda: jf.limit_ranks(ids, weights, scores, copies, 1),
            "placement: got one with replicas, need one rank for each expert",
        ),
        (
            TypeError,
            lambda: jf.limit_ranks(weights, weights, scores, placement, 1),
            "expert_ids: got dtype float32, need an integer dtype",
        ),
        (
            TypeError,
            lambda: jf.limit_ranks(ids, ids, scores, placement, 1),
            "weights: got dtype int32, need a floating dtype",
        ),
        (
            ValueError,
            lambda: jf.limit_ranks(ids, weights[:1], scores, placement, 1),
            "weights: got shape (1, 4), need (40, 4)",
        ),
        (
            ValueError,
            lambda: jf.limit_ranks(ids, weights, scores[:, :8], placement, 1),
            "scores: got shape (40, 8), need (40, 16)",
        ),
    ]
    for kind, wrong, message in cases:
        with pytest.raises(kind) as info:
            wrong()
        assert str(info.value) == message
