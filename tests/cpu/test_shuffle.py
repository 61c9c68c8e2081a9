"""Plan, dispatch and combine against the literal oracle, on 1 to 16 devices."""

from __future__ import annotations

import functools

import jax
import numpy as np
import oracle
import pytest
import routings
from helpers import assert_same_bits, both, cases, per_rank

import jax_fusco as jf

FIELDS = ("group_sizes", "expert_counts", "slot", "num_dropped", "num_invalid")
# (ranks, alignment, capacity): None is dropless, a number is rows for each of a rank's experts.
LAYOUTS = (
    *((4, *layout) for layout in ((1, None), (8, None), (128, None), (1, 4), (3, 7), (1, 0))),
    *((1, *layout) for layout in ((8, None), (1, 4))),
    *((2, *layout) for layout in ((1, None), (8, 12))),
    *((8, *layout) for layout in ((128, None), (8, 16))),
    *((16, *layout) for layout in ((1, None), (3, 7))),
)
XLA_LAYOUTS = (
    *((4, *layout) for layout in ((1, None), (3, 7), (1, 0))),
    (1, 8, None),
    (2, 8, 12),
    (8, 128, None),
    (16, 3, 7),
)


@functools.cache
def program(implementation, num_ranks, num_experts, capacity, alignment, padding="zero"):
    """(ids, x, y, weights) -> everything a shuffle gives, on every rank."""

    def run(ids, x, y, weights):
        plan = jf.make_plan(
            ids,
            axis_name="expert",
            num_experts=num_experts,
            capacity=capacity,
            alignment=alignment,
            implementation=implementation,
        )
        return {
            **{name: getattr(plan, name) for name in FIELDS},
            "leaves": tuple(jax.tree.leaves(plan)),
            "rows": jf.dispatch(x, plan, padding=padding),
            "out": jf.combine(y, weights, plan),
            # JAX itself does not compile a shard_map all of whose used operands are empty.
            "operands": (x, y),
        }

    return per_rank(run, num_ranks)


def payload(rng, plan, d):
    """x, y and weights with NaN and infinities wherever nothing may be read from."""
    num_ranks, tokens, _ = plan.slot.shape
    x = rng.standard_normal((num_ranks, tokens, d)).astype(np.float32)
    y = rng.standard_normal((num_ranks, plan.capacity, d)).astype(np.float32)
    weights = rng.standard_normal(plan.slot.shape).astype(np.float32)
    x[(plan.slot < 0).all(axis=2)] = np.nan
    unread = ~oracle.occupied(plan)
    y[unread] = rng.choice(np.array([np.nan, np.inf, -np.inf], np.float32), y[unread].shape)
    weights[plan.slot < 0] = np.nan
    return x, y, weights


def check(implementation, ids, num_experts, capacity=None, alignment=1, *, d=5, seed=0):
    plan = oracle.make_plan(ids, num_experts, capacity, alignment)
    x, y, weights = payload(np.random.default_rng(seed), plan, d)
    run = program(implementation, len(ids), num_experts, capacity, alignment)
    got = jax.device_get(run(ids, x, y, weights))
    for name in FIELDS:
        assert_same_bits(got[name], getattr(plan, name), name)
    assert_same_bits(got["rows"], oracle.dispatch(x, plan), "dispatch")
    assert_same_bits(got["out"], oracle.combine(y, weights, plan), "combine")
    return got


@pytest.mark.parametrize("routing", routings.ALL, ids=lambda f: f.__name__)
@cases("num_ranks,alignment,rows_per_expert", LAYOUTS, xla=XLA_LAYOUTS)
def test_every_routing(implementation, num_ranks, alignment, rows_per_expert, routing):
    local, tokens, k = 2, 6, 3
    capacity = None if rows_per_expert is None else rows_per_expert * local
    rng = np.random.default_rng(num_ranks)
    ids = routing(rng, num_ranks, tokens, k, num_ranks * local)
    check(implementation, ids, num_ranks * local, capacity, alignment)


@cases(
    "num_ranks,tokens,k,local",
    [
        (4, 0, 2, 2),  # no token at all
        (4, 1, 1, 1),
        (4, 3, 0, 2),  # no assignment a token
        (2, 7, 1, 3),
        (8, 2, 4, 1),
        (2, 33, 8, 16),
        (1, 5, 2, 4),
    ],
    xla=[(4, 0, 2, 2), (4, 3, 0, 2), (8, 2, 4, 1), (1, 5, 2, 4)],
)
def test_every_shape(implementation, num_ranks, tokens, k, local):
    for routing in (routings.distinct, routings.masked, routings.one_rank):
        ids = routing(np.random.default_rng(1), num_ranks, tokens, k, num_ranks * local)
        check(implementation, ids, num_ranks * local, alignment=1 if tokens else 4)


@cases("d", [0, 1, 2, 3, 7, 16, 63, 64, 65, 2880], xla=[0, 65])
def test_every_row_length(implementation, d):
    ids = routings.distinct(np.random.default_rng(d), 4, 5, 2, 8)
    check(implementation, ids, 8, d=d)


@pytest.mark.parametrize(("num_ranks", "alignment", "rows_per_expert"), XLA_LAYOUTS)
def test_fused_equals_xla_in_every_leaf(num_ranks, alignment, rows_per_expert):
    local, tokens, k = 2, 6, 3
    capacity = None if rows_per_expert is None else rows_per_expert * local
    for seed, routing in enumerate((routings.masked, routings.skewed, routings.out_of_range)):
        ids = routing(np.random.default_rng(seed), num_ranks, tokens, k, num_ranks * local)
        both_results = [
            check(name, ids, num_ranks * local, capacity, alignment) for name in ("xla", "fused")
        ]
        for xla, fused in zip(*map(jax.tree.leaves, both_results), strict=True):
            assert_same_bits(fused, xla)


@both
def test_undefined_padding_defines_the_groups(implementation):
    ids = routings.masked(np.random.default_rng(0), 4, 6, 3, 8)
    plan = oracle.make_plan(ids, 8, None, 8)
    x, y, weights = payload(np.random.default_rng(1), plan, 5)
    run = program(implementation, 4, 8, None, 8, "undefined")
    rows = np.asarray(run(ids, x, y, weights)["rows"])
    inside = oracle.in_groups(plan)
    assert not inside.all()
    assert_same_bits(rows[inside], oracle.dispatch(x, plan)[inside])


def test_undefined_padding_leaves_the_tail_to_the_engine():
    """What "undefined" is for: nothing is written past the last group."""
    ids = np.zeros((1, 3, 1), np.int32)
    for padding, zeroed in (("zero", 1), ("undefined", 0)):
        run = program("fused", 1, 1, 5, 1, padding)
        x, y = np.zeros((1, 3, 2), "f4"), np.zeros((1, 5, 2), "f4")
        text = run.lower(ids, x, y, np.ones(ids.shape, "f4")).as_text()
        assert f"zero_tail = {zeroed} : i64" in text


@both
def test_repeated_runs_are_bit_equal(implementation):
    ids = routings.skewed(np.random.default_rng(0), 8, 64, 4, 16)
    plan = oracle.make_plan(ids, 16)
    x, y, weights = payload(np.random.default_rng(1), plan, 33)
    run = program(implementation, 8, 16, None, 1)
    first = jax.device_get(run(ids, x, y, weights))
    assert_same_bits(first["out"], oracle.combine(y, weights, plan))
    for _ in range(20):
        again = jax.device_get(run(ids, x, y, weights))
        jax.tree.map(assert_same_bits, again, first)


@both
def test_cancelling_sums_keep_their_order(implementation):
    # Big terms that cancel: any other order, or a product rounded on its own, shows.
    ids = routings.distinct(np.random.default_rng(0), 4, 16, 6, 8)
    plan = oracle.make_plan(ids, 8)
    rng = np.random.default_rng(1)
    y = (rng.standard_normal((4, plan.capacity, 9)) * 10.0 ** rng.integers(-6, 7, 9)).astype("f4")
    weights = (rng.standard_normal(ids.shape) * 10.0 ** rng.integers(-6, 7, 6)).astype("f4")
    x = np.zeros((4, 16, 9), np.float32)
    out = program(implementation, 4, 8, None, 1)(ids, x, y, weights)["out"]
    want = oracle.combine(y, weights, plan)
    assert_same_bits(out, want)
    # The test can tell: an unfused or a reversed sum differs in some value.
    flat = np.zeros_like(want)
    for r, t, j in np.ndindex(*ids.shape):
        flat[r, t] += weights[r, t, j] * y[plan.owner[r, t, j], plan.slot[r, t, j]]
    assert (flat != want).any()


@both
def test_negative_zero_sums_start_from_positive_zero(implementation):
    ids = np.array([[[0], [-1]]], np.int32)
    y = np.full((1, 2, 3), -0.0, np.float32)
    x = np.full((1, 2, 3), -0.0, np.float32)
    got = program(implementation, 1, 1, None, 1)(ids, x, y, np.ones((1, 2, 1), np.float32))
    assert not np.signbit(np.asarray(got["out"])).any()
    assert np.signbit(np.asarray(got["rows"])[0, 0]).all()


@both
def test_one_rank_without_a_mesh(implementation):
    ids = routings.duplicates(np.random.default_rng(0), 1, 6, 2, 4)
    plan = oracle.make_plan(ids, 4, 9, 2)
    x, y, weights = payload(np.random.default_rng(1), plan, 5)

    def run(ids, x, y, weights):
        made = jf.make_plan(
            ids,
            axis_name=None,
            num_experts=4,
            capacity=9,
            alignment=2,
            implementation=implementation,
        )
        return made.slot, jf.dispatch(x, made), jf.combine(y, weights, made)

    # Without jit too; operation by operation plain XLA is too slow for a test.
    for call in (run, jax.jit(run)) if implementation == "fused" else (jax.jit(run),):
        slot, rows, out = call(ids[0], x[0], y[0], weights[0])
        assert_same_bits(slot, plan.slot[0])
        assert_same_bits(rows, oracle.dispatch(x, plan)[0])
        assert_same_bits(out, oracle.combine(y, weights, plan)[0])


@both
def test_one_plan_for_two_payloads_and_two_plans_interleaved(implementation):
    rng = np.random.default_rng(0)
    a, b = routings.distinct(rng, 4, 6, 2, 8), routings.skewed(rng, 4, 6, 3, 16)
    plans = oracle.make_plan(a, 8), oracle.make_plan(b, 16, 40, 4)
    x = rng.standard_normal((2, 4, 6, 5)).astype(np.float32)

    def run(a, b, x0, x1):
        options = {"axis_name": "expert", "implementation": implementation}
        first = jf.make_plan(a, num_experts=8, **options)
        second = jf.make_plan(b, num_experts=16, capacity=40, alignment=4, **options)
        rows = [jf.dispatch(x, p) for p in (first, second) for x in (x0, x1)]
        back = [
            jf.combine(rows[2], None, second),
            jf.combine(rows[0], None, first),
            jf.combine(rows[3], None, second),
            jf.combine(rows[1], None, first),
        ]
        return rows, back

    rows, back = per_rank(run, 4)(a, b, *x)
    want = [oracle.dispatch(x[i], p) for p in plans for i in (0, 1)]
    for got, rows_ in zip(rows, want, strict=True):
        assert_same_bits(got, rows_)
    for got, (i, p) in zip(back, ((2, 1), (0, 0), (3, 1), (1, 0)), strict=True):
        assert_same_bits(got, oracle.combine(want[i], None, plans[p]))


@both
def test_token_counts_that_shrink_between_steps(implementation):
    rng = np.random.default_rng(0)
    for tokens in (9, 2, 0, 9):
        check(implementation, routings.distinct(rng, 2, tokens, 2, 4), 4, alignment=2)
