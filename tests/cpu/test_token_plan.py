"""Shuffles of one row per (token, rank), against loops and against a dense layer."""

from __future__ import annotations

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routings
from helpers import both, make_mesh, per_rank

import jax_fusco as jf

EXPERTS, TOKENS, K, D, H = 8, 7, 3, 5, 6


def loops(ids, capacity, rows):
    """(rows [R] of (source, token) in order, assignments [R][expert] of (row, j), dropped [R]).

    Only for what fits, but for whole rows that are cut off one by one from the fullest source.
    """
    ranks = len(ids)
    local = EXPERTS // ranks
    found = []
    for rank in range(ranks):
        here = [
            (source, t)
            for source in range(ranks)
            for t in range(ids.shape[1])
            if any(0 <= e < EXPERTS and e // local == rank for e in ids[source, t])
        ]
        assert len(here) <= rows
        groups = [
            [
                (row, j)
                for row, (source, t) in enumerate(here)
                for j in range(ids.shape[2])
                if ids[source, t, j] == rank * local + l
            ]
            for l in range(local)
        ]
        assert sum(map(len, groups)) <= capacity
        found.append((here, groups))
    return found


def plans(ids, implementation, capacity=None, alignment=1, **options):
    def run(ids):
        plan = jf.make_plan(
            ids,
            axis_name="expert",
            num_experts=EXPERTS,
            capacity=capacity,
            alignment=alignment,
            rows="token",
            implementation=implementation,
            **options,
        )
        return plan, jf.dispatch(jnp.arange(ids.shape[0], dtype=jnp.int32) + 1, plan)

    return per_rank(run, len(ids))(ids)


@both
@pytest.mark.parametrize(
    "routing",
    [routings.distinct, routings.masked, routings.duplicates, routings.empty, routings.one_rank],
)
@pytest.mark.parametrize("alignment", [1, 4])
def test_rows_and_assignments_are_those_of_loops(implementation, routing, alignment):
    ids = routing(np.random.default_rng(3), 4, TOKENS, K, EXPERTS)
    ids[1, 2, 1], ids[2, 0, 0] = EXPERTS, -7
    size = 4 * TOKENS * K + 8
    plan, tokens = plans(ids, implementation, size, alignment)
    assert plan.num_invalid.tolist() == [0, 1, 1, 0]
    for rank, (here, groups) in enumerate(loops(ids, size, 4 * TOKENS)):
        assert tokens[rank][: len(here)].tolist() == [t + 1 for _, t in here]
        assert not tokens[rank][len(here) :].any()
        assert plan.expert_counts[rank].tolist() == [len(group) for group in groups]
        start = 0
        for group, length in zip(groups, plan.group_sizes[rank].tolist(), strict=True):
            assert length == -(-len(group) // alignment) * alignment
            mine = slice(start, start + len(group))
            got = zip(plan.source[rank][mine], plan.choice[rank][mine], strict=True)
            assert [(int(row), int(j)) for row, j in got] == group
            assert (plan.source[rank][start + len(group) : start + length] == -1).all()
            start += length
        assert (plan.source[rank][start:] == -2).all()
    assert not plan.num_dropped.any()


def test_backward_repeats_neither_the_plan_nor_its_rows():
    """With its names saved, remat calls the engine as often as without."""
    policy = jax.checkpoint_policies.save_only_these_names(*jf.REMAT_SAVE_NAMES)
    ids = routings.distinct(np.random.default_rng(0), 4, TOKENS, K, EXPERTS)
    x, kernel = np.ones((4, TOKENS, 3), "f4"), np.ones((4, EXPERTS // 4, 3, 3), "f4")

    def layer(x, ids, kernel):
        plan = jf.make_plan(
            ids, axis_name="expert", num_experts=EXPERTS, rows="token", implementation="fused"
        )
        rows = jf.dispatch(x, plan)
        rows = jf.grouped_matmul(rows, kernel, plan.group_sizes, source=plan.source)
        merge = {"merge": plan.source, "num_rows": plan.capacity}
        rows = jf.grouped_matmul(jnp.tanh(rows), kernel, plan.group_sizes, **merge)
        return jf.combine(rows, None, plan)

    def calls(layer):
        def layers(x, ids, kernel):
            return jax.lax.scan(lambda x, _: (layer(x, ids, kernel), None), x, None, 2)[0].sum()

        run = per_rank(jax.grad(layers, argnums=(0, 2)), 4)
        text = run.lower(x, ids, kernel).compile().as_text()
        return Counter(re.findall(r'custom_call_target="jax_fusco_(\w+)"', text))

    plain, saved = calls(layer), calls(jax.checkpoint(layer, policy=policy))
    assert saved["plan"] == plain["plan"] > 0
    assert saved["gather_rows"] == plain["gather_rows"]


@both
def test_what_finds_no_room_is_counted_once(implementation):
    """Rows or assignments: kept and dropped ones make up what was wanted."""
    ids = routings.one_rank(np.random.default_rng(5), 4, TOKENS, K, EXPERTS)
    wanted = np.bincount(ids.reshape(-1) // 2, minlength=4)
    for capacity in (0, 1, 9, 17, 30):
        plan, _ = plans(ids, implementation, capacity)
        np.testing.assert_array_equal(plan.expert_counts.sum(1) + plan.num_dropped, wanted)
        assert plan.source.shape == (4, capacity)
        assert plan.rows.source.shape == (4, min(capacity, 4 * TOKENS))


def test_weights_of_assignments():
    """Expert-major, groups padded: zero where there is no assignment, forward and backward."""
    ids = jnp.asarray([[1, 0], [0, -1], [1, -1]], jnp.int32)
    plan = jf.make_plan(ids, axis_name=None, num_experts=2, rows="token", alignment=3, capacity=8)
    weights = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    there = [2, 3, 0, 1, 5, 0, 0, 0]
    np.testing.assert_array_equal(plan.local_weights(weights), there)
    gradient = jax.grad(lambda weights: plan.local_weights(weights) @ jnp.arange(1.0, 9.0))
    np.testing.assert_array_equal(gradient(weights), [[4, 1], [2, 0], [5, 0]])
    # Together with rows, whose tail nobody fills.
    _, here = jf.dispatch((jnp.ones((3, 4)), weights), plan, padding="undefined")
    np.testing.assert_array_equal(plan.weights_of(here), there)


def layer(make_plan, x, ids, weights, first, second, **options):
    """Two products with an expert's matrices, a token's row shared by the experts of a rank."""
    plan = make_plan(ids, num_experts=EXPERTS, rows="token", **options)
    rows = jf.dispatch(x, plan)
    hidden = jf.grouped_matmul(rows, first, plan.group_sizes, source=plan.source)
    y = jf.grouped_matmul(
        jnp.tanh(hidden),
        second,
        plan.group_sizes,
        merge=plan.source,
        merge_weights=plan.local_weights(weights),
        num_rows=plan.capacity,
    )
    return jf.combine(y, None, plan)


def dense(x, ids, weights, first, second):
    every = jnp.tanh(jnp.einsum("rtd,edh->rteh", x, first))
    y = jnp.einsum("rteh,ehd->rted", every, second)
    taken = jax.nn.one_hot(ids, EXPERTS) * weights[..., None]  # -1 is nobody
    return jnp.einsum("rtke,rted->rtd", taken, y)


@pytest.mark.parametrize(
    ("sizes", "topology", "implementation"),
    [
        ({"expert": 4}, None, "fused"),
        ({"expert": 4}, None, "xla"),
        ({"expert": 1}, None, "fused"),
        ({"node": 2, "expert": 2}, jf.Topology(), "fused"),
    ],
)
def test_a_layer_and_its_gradients_are_those_of_a_dense_one(sizes, topology, implementation):
    ranks, rng = int(np.prod(list(sizes.values()))), np.random.default_rng(0)
    ids = routings.masked(rng, ranks, TOKENS, K, EXPERTS)
    x, g = rng.standard_normal((2, ranks, TOKENS, D)).astype("f4")
    weights = rng.random(ids.shape, np.float32)
    first = rng.standard_normal((EXPERTS, D, H)).astype("f4")
    second = rng.standard_normal((EXPERTS, H, D)).astype("f4")
    axis = tuple(sizes)
    make_plan = functools.partial(
        jf.make_plan, axis_name=axis, topology=topology, implementation=implementation
    )

    def local(x, ids, weights, first, second, g):
        def run(x, weights, first, second):
            return layer(make_plan, x, ids, weights, first, second)

        out, pull = jax.vjp(run, x, weights, first, second)
        return out, pull(g)

    split = (ranks, EXPERTS // ranks)
    mesh = make_mesh(sizes)
    out, grads = per_rank(local, mesh, axis)(
        x, ids, weights, first.reshape(*split, D, H), second.reshape(*split, H, D), g
    )
    want, pull = jax.vjp(lambda x, w, a, b: dense(x, ids, w, a, b), x, weights, first, second)
    grads = *grads[:2], grads[2].reshape(EXPERTS, D, H), grads[3].reshape(EXPERTS, H, D)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(grads, pull(jnp.asarray(g)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_bad_arguments_are_said():
    def raises(message, function):
        with pytest.raises(ValueError, match=message):
            function()

    ids = jnp.zeros((3, 2), jnp.int32)
    raises(
        r"^rows: got 'expert', need 'assignment' or 'token'$",
        lambda: jf.make_plan(ids, axis_name=None, num_experts=2, rows="expert"),  # type: ignore
    )
    plan = jf.make_plan(ids, axis_name=None, num_experts=2, rows="token")
    y, weights = jnp.zeros((plan.capacity, 4)), jnp.zeros((3, 2))
    raises(
        r"^weights: got an array, need None with a TokenPlan",
        lambda: jf.combine(y, weights, plan),
    )
    raises(r"^weights: got shape \(3, 1\), need \(3, 2\)$", lambda: plan.local_weights(y[:3, :1]))
    raises(r"^weights: got shape \(3,\), need \(3, 2\)$", lambda: plan.local_weights(y[:3, 0]))
    with pytest.raises(TypeError, match=r"^weights: got dtype int32, need a floating dtype$"):
        plan.local_weights(jnp.zeros((3, 2), jnp.int32))
