"""Shuffles over nodes against the oracle: the flat plan's slots, rows and, but for order, sums."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
import routings
from helpers import P, assert_same_bits, both, make_mesh, sharded
from hypothesis import given

import jax_fusco as jf
from jax_fusco import crossing, crossing_reference, two_level
from jax_fusco.topology import Levels

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype("f2"), np.dtype("f4")
TWO = jf.Topology("node", "expert")


def one_axis(ranks_per_node: int, name: str | tuple[str, ...] = "expert", **options: Any):
    return jf.Topology(None, name, ranks_per_node, **options)


def two_axes(**options):
    return jf.Topology("node", "expert", **options)


WIDE = two_axes(slice_rows=3, wire_dtype="float32")
# Mesh sizes by axis, topology, T, k, E_local, d, dtype, alignment, capacity.
CASES = (
    ({"node": 2, "expert": 4}, two_axes(), 9, 3, 2, 5, F32, 1, None),
    ({"node": 4, "expert": 2}, two_axes(slice_rows=2), 7, 2, 3, 3, BF16, 4, None),
    (
        {"node": 2, "expert": 2},
        two_axes(slice_rows=3, wire_dtype="float32"),
        8,
        4,
        2,
        7,
        BF16,
        1,
        9,
    ),
    ({"node": 3, "expert": 2}, two_axes(slice_rows=1), 5, 3, 2, 4, F16, 3, 10),
    ({"node": 3, "expert": 2}, two_axes(slice_rows=2, exchange="ragged"), 5, 3, 2, 4, F32, 1, None),
    ({"expert": 8}, one_axis(4, slice_rows=4), 6, 2, 1, 6, F32, 1, 7),
    ({"node": 4, "expert": 1}, two_axes(slice_rows=2), 5, 2, 2, 3, F32, 1, None),
    ({"node": 1, "expert": 4}, two_axes(), 5, 2, 2, 3, F32, 1, None),
    ({"a": 2, "b": 4}, one_axis(4, ("b", "a"), slice_rows=3), 5, 3, 2, 4, BF16, 2, 9),
    ({"a": 2, "b": 4}, one_axis(2, ("b", "a")), 5, 3, 2, 4, F32, 2, 9),
    ({"expert": 2, "model": 2, "node": 2}, two_axes(), 4, 2, 2, 3, BF16, 1, 4),
)


def ranks_of(sizes, topology):
    return int(np.prod([sizes[name] for name in topology.axis_name]))


@functools.cache
def program(case: int, implementation: str):
    sizes, topology, _, _, local, _, _, alignment, capacity = CASES[case]
    count = int(np.prod(list(sizes.values())))
    order = np.random.default_rng(case).permutation(count).tolist()
    mesh = make_mesh(sizes, order=order)
    names = topology.axis_name
    spec = P(tuple(name for name in sizes if name not in names) or None, names)

    def run(ids, x, y, weights, g_rows, g_out):
        ids, x, y, weights, g_rows, g_out = (a[0, 0] for a in (ids, x, y, weights, g_rows, g_out))
        options = {
            "axis_name": names,
            "num_experts": local * ranks_of(sizes, topology),
            "capacity": capacity,
            "alignment": alignment,
        }
        plan = jf.make_plan(ids, topology=topology, implementation=implementation, **options)
        rows, pull_rows = jax.vjp(lambda x: jf.dispatch(x, plan), x)
        out, pull_out = jax.vjp(lambda y, w: jf.combine(y, w, plan), y, weights)
        crossing = plan.crossing
        packed = None if crossing is None else (crossing.pack_rank, crossing.pack_token)
        results = {
            "integers": (
                plan.group_sizes,
                plan.expert_counts,
                plan.slot,
                plan.num_dropped,
                plan.num_invalid,
            ),
            "sources": (plan.slot_rank, plan.source_rank, plan.source),
            "packed": packed,
            "rows": rows,
            "out": out,
            "dx": pull_rows(g_rows)[0],
            "dy_dweights": pull_out(g_out),
        }
        return jax.tree.map(lambda a: a[None, None], results)

    return sharded(run, mesh, in_specs=spec, out_specs=spec)


@st.composite
def routed(draw, case):
    """Ids `[groups, R, T, k]` for a case: any mix of spread, crowded, absent and bad ids."""
    sizes, topology, tokens, k, local, *_ = CASES[case]
    ranks = ranks_of(sizes, topology)
    groups = int(np.prod(list(sizes.values()))) // ranks
    return routings.mixed(draw, (groups, ranks, tokens, k), ranks * local)


# Plain XLA compiles slowly.
@pytest.mark.parametrize(
    ("implementation", "case"), [*(("fused", case) for case in range(len(CASES))), ("xla", 2)]
)
@given(data=st.data())
@hypothesis.settings(max_examples=12)
def test_drawn_routings(implementation, case, data):
    check(implementation, case, *data.draw(routed(case)))


@pytest.mark.parametrize("case", [2, 3])
def test_slices_that_overlap(case, monkeypatch):
    """As on GPUs."""
    monkeypatch.setattr(two_level, "_overlaps", lambda: True)
    program.cache_clear()
    sizes, topology, tokens, k, local, *_ = CASES[case]
    ranks = ranks_of(sizes, topology)
    try:
        for seed, routing in enumerate((routings.distinct, routings.masked, routings.empty)):
            rng = np.random.default_rng(seed)
            check("fused", case, routing(rng, ranks, tokens, k, ranks * local)[None], rng)
    finally:
        program.cache_clear()


def check(implementation, case, ids, rng):
    sizes, topology, tokens, _, local, d, dtype, alignment, capacity = CASES[case]
    groups, ranks = ids.shape[:2]
    plans = [oracle.make_plan(i, ranks * local, capacity, alignment) for i in ids]
    per_node = topology.shape(sizes)[1]
    wire = F32 if topology.wire_dtype else dtype

    def normal(*shape):
        return rng.standard_normal((groups, ranks, *shape)).astype("f4").astype(dtype)

    x, g_out = normal(tokens, d), normal(tokens, d)
    y, g_rows = normal(plans[0].capacity, d), normal(plans[0].capacity, d)
    weights = rng.standard_normal(ids.shape).astype("f4")
    got = jax.device_get(program(case, implementation)(ids, x, y, weights, g_rows, g_out))
    for g, plan in enumerate(plans):
        mine = jax.tree.map(lambda a: a[g], got)  # noqa: B023
        integers = plan.group_sizes, plan.expert_counts, plan.slot
        integers += plan.num_dropped, plan.num_invalid
        jax.tree.map(assert_same_bits, mine["integers"], integers)
        jax.tree.map(assert_same_bits, mine["sources"], sources(plan))
        assert_same_bits(mine["rows"], oracle.dispatch(x[g], plan), "rows")
        out = oracle.combine_two_level(y[g], weights[g], plan, per_node, wire)
        assert_same_bits(mine["out"], out, "out")
        dx = oracle.combine_two_level(g_rows[g], None, plan, per_node, wire)
        assert_same_bits(mine["dx"], dx, "dx")
        dy, dweights = oracle.combine_gradient(g_out[g], y[g], weights[g], plan)
        assert_same_bits(mine["dy_dweights"][0], dy, "dy")
        _, scale = oracle.combine_gradient(np.abs(g_out[g]), np.abs(y[g]), None, plan)
        error = np.abs(mine["dy_dweights"][1] - dweights)
        assert (error <= d * np.finfo("f4").eps * scale).all()
        if mine["packed"] is not None:
            check_rails(mine["packed"], plan, per_node)


def sources(plan):
    """(slot_rank, source_rank, source) of the flat plan, `[R, T, k]`, `[R, C]` and `[R, C]`."""
    empty = np.where(oracle.in_groups(plan), -1, -2).astype(np.int32)
    source_rank, source = empty.copy(), empty.copy()
    for rank, t, j in np.ndindex(*plan.slot.shape):
        if plan.slot[rank, t, j] >= 0:
            row = plan.owner[rank, t, j], plan.slot[rank, t, j]
            source_rank[row], source[row] = rank, t * plan.slot.shape[2] + j
    return plan.owner, source_rank, source


def check_rails(packed, plan, per_node):
    """Each row that must cross is packed once, in order, and rails of a node differ by one row."""
    owner, token = packed  # [R, N, T]
    nodes = owner.shape[1]
    for (source, target), rows in oracle.crossings(plan, per_node).items():
        sent = []
        for rail in range(per_node):
            mine = source * per_node + rail
            filled = token[mine, target] >= 0
            assert (np.diff(filled.astype(int)) <= 0).all()  # no gaps
            sent.append(filled.sum())
            for row in range(sent[-1]):
                of, t = owner[mine, target, row], token[mine, target, row]
                # Rails take rows in turn, the first by the nodes.
                place = row * per_node + (rail - source - target) % per_node
                assert rows[place] == (source * per_node + of, t)
        assert sum(sent) == len(rows)
        assert max(sent) - min(sent) <= 1
    assert nodes == len(owner) // per_node


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def run_on_nodes(function, implementation, *operands, topology=TWO, sizes=None, **options):
    """`function(*operands, make_plan)` on every rank of 2 nodes of 2; operands lead with ranks."""
    mesh = make_mesh(sizes or {"node": 2, "expert": 2})
    make_plan = functools.partial(
        jf.make_plan,
        axis_name=topology.axis_name,
        topology=topology,
        implementation=implementation,
    )
    spec = P(topology.axis_name)

    def local(*operands):
        results = function(*(a[0] for a in operands), make_plan)
        return jax.tree.map(lambda a: a[None], results)

    return sharded(local, mesh, in_specs=spec, out_specs=spec, **options)(*operands)


@both
def test_arrays_of_all_kinds_travel_together(implementation, rng):
    ids = routings.distinct(rng, 4, 6, 2, 8)
    kinds = ["f4", "i1", "?", "c8", "u4", BF16, np.dtype(ml_dtypes.float8_e4m3fn)]
    shapes = [(3,), (), (2, 2), (3,), (1,), (5,), (4,)]
    payload = [
        (rng.standard_normal((4, 6, *shape)) * 9).astype(np.dtype(kind))
        for kind, shape in zip(kinds, shapes, strict=True)
    ]
    payload[0][:] = np.nan  # bits of a payload are nobody's numbers

    def move(ids, *rest):
        *payload, make_plan = rest
        return jf.dispatch(payload, make_plan(ids, num_experts=8))

    got = run_on_nodes(move, implementation, ids, *payload)
    plan = oracle.make_plan(ids, 8)
    for mine, x in zip(got, payload, strict=True):
        assert_same_bits(mine, oracle.dispatch(x, plan))


@both
@pytest.mark.parametrize(
    ("tokens", "k", "d", "capacity"),
    [(0, 2, 3, None), (3, 0, 3, 4), (3, 2, 0, None), (3, 2, 3, 0), (1, 1, 1, 1)],
)
def test_nothing_to_move(implementation, rng, tokens, k, d, capacity):
    ids = routings.distinct(rng, 4, tokens, k, 4)
    x, weights = np.ones((4, tokens, d), "f4"), np.ones((4, tokens, k), "f4")

    def move(ids, x, weights, make_plan):
        plan = make_plan(ids, num_experts=4, capacity=capacity)

        def layer(x, weights):
            return jf.combine(jf.dispatch(x, plan), weights, plan)

        out, pull = jax.vjp(layer, x, weights)
        return out, pull(out)

    out, grads = run_on_nodes(move, implementation, ids, x, weights)
    plan = oracle.make_plan(ids, 4, capacity)
    want = oracle.combine(oracle.dispatch(x, plan), weights, plan)
    assert_same_bits(out, want)
    assert jax.tree.map(np.shape, grads) == (x.shape, weights.shape)


@both
def test_in_a_scan_under_remat_as_without_a_topology(implementation, rng):
    """Whole numbers, so that the order of sums does not show."""
    ids = routings.distinct(rng, 4, 6, 3, 8)
    x = rng.integers(-4, 5, (4, 6, 5)).astype("f4")

    def losses(ids, x, make_plan, topology):
        plan = make_plan(ids, num_experts=8, topology=topology)
        policy = jax.checkpoint_policies.save_only_these_names(*jf.REMAT_SAVE_NAMES)

        @functools.partial(jax.checkpoint, policy=policy)
        def layer(x, scale):
            rows = jf.dispatch(x, plan) * scale
            return jf.combine(rows, None, plan) / 4, None

        def loss(x):
            return jax.lax.scan(layer, x, jnp.asarray([1.0, 2.0, 0.5]))[0].sum()

        return jax.value_and_grad(loss)(x)

    two = run_on_nodes(functools.partial(losses, topology=TWO), implementation, ids, x)
    flat = run_on_nodes(functools.partial(losses, topology=None), implementation, ids, x)
    jax.tree.map(np.testing.assert_array_equal, two, flat)


@both
@pytest.mark.parametrize("nodes", [2, 3])
def test_groups_of_a_mesh_cross_in_slices_of_their_own_number(implementation, nodes, rng):
    """One group stays on its nodes; the other sends every row to the next, in many slices."""
    sizes = {"data": 2, "node": nodes, "expert": 2}
    ranks, tokens = 2 * nodes, 5
    node = np.repeat(np.arange(nodes), 2)
    experts = np.stack([2 * node, 2 * (node + 1) % ranks])[:, :, None, None]
    ids = np.broadcast_to(experts, (2, ranks, tokens, 1)).astype(np.int32)
    x = rng.standard_normal((2, ranks, tokens, 3)).astype("f4")
    names = ("data", "node", "expert")

    def move(ids, x):
        plan = jf.make_plan(
            ids,
            axis_name=names[1:],
            num_experts=ranks,
            topology=two_axes(slice_rows=1),
            implementation=implementation,
        )
        rows = jf.dispatch(x, plan)
        return rows, jf.combine(rows, None, plan)

    run = sharded(move, make_mesh(sizes), in_specs=P(names), out_specs=P(names))
    rows, out = run(ids.reshape(-1, 1), x.reshape(-1, 3))
    for group in range(2):
        plan = oracle.make_plan(ids[group], ranks)
        want = oracle.dispatch(x[group], plan)
        assert_same_bits(rows.reshape(2, *want.shape)[group], want)
        assert_same_bits(out.reshape(x.shape)[group], oracle.combine(want, None, plan))


def test_several_shuffles_in_one_program_without_an_order(rng):
    ids = routings.distinct(rng, 4, 6, 3, 8)
    x = rng.standard_normal((4, 6, 5)).astype("f4")

    def move(ids, x, make_plan):
        plans = [make_plan((ids + shift) % 8, num_experts=8) for shift in range(4)]
        return [jf.combine(jf.dispatch(x, plan), None, plan) for plan in plans]

    got = run_on_nodes(move, "fused", ids, x)
    for shift, mine in enumerate(got):
        plan = oracle.make_plan((ids + shift) % 8, 8)
        rows = oracle.dispatch(x, plan)
        assert_same_bits(mine, oracle.combine_two_level(rows, None, plan, 2, F32))


@both
def test_layers_beside_each_other_with_gradients(implementation, rng):
    """XLA:CPU starts what no data orders as soon as a loop before it returns: a slice loop that
    returned before its last exchange had its exchanges taken for those of the other layer. It took
    shapes for which the loops share no memory."""
    tokens, k, experts, shape = 5, 2, 28, (1, 2, 3)
    topology = jf.Topology(None, "expert", ranks_per_node=2, slice_rows=3)

    def layer(x, ids, weights, scale):
        plan = jf.make_plan(
            ids,
            axis_name="expert",
            num_experts=experts,
            topology=topology,
            implementation=implementation,
        )
        rows = jf.dispatch(x, plan)
        past = jnp.arange(rows.shape[0])[:, None] >= jnp.cumsum(plan.group_sizes)
        scale = scale[jnp.minimum(past.sum(1), experts // 4 - 1)]
        return jf.combine(rows * scale, weights, plan)

    def gradients(ids, ct, *operands):
        def loss(*operands):
            out = [layer(x, i, *rest) for i, x, *rest in zip(ids, *operands, strict=True)]
            return (jnp.stack(out) * ct).sum()

        return jax.grad(loss, (0, 1, 2))(*operands)

    spec = P(None, "expert")
    run = sharded(gradients, make_mesh(4), in_specs=spec, out_specs=spec)
    ids = np.stack([routings.distinct(rng, 4, tokens, k, experts).reshape(-1, k) for _ in "ab"])
    weights = np.ones(ids.shape, "f4")
    scale = np.ones((2, experts, *shape), "f4")
    for _ in range(20):
        x = rng.integers(-3, 4, (2, 4 * tokens, *shape)).astype("f4")
        ct = rng.integers(1, 3, x.shape).astype("f4")
        dx, dw, _ = run(ids, ct, x, weights, scale)
        assert_same_bits(dx, k * ct)
        assert_same_bits(dw, np.broadcast_to((x * ct).sum((2, 3, 4))[..., None], weights.shape))


@both
def test_a_combine_of_another_dtype_and_undefined_padding(implementation, rng):
    ids = routings.distinct(rng, 4, 6, 3, 8)
    x = rng.standard_normal((4, 6, 5)).astype("f4").astype(BF16)
    weights = rng.standard_normal((4, 6, 3)).astype("f4").astype(BF16)

    def move(ids, x, weights, make_plan):
        plan = make_plan(ids, num_experts=8, capacity=30, alignment=4)
        rows = jf.dispatch(x, plan, padding="undefined")
        used = jnp.arange(30)[:, None] < plan.group_sizes.sum()
        rows = jnp.where(used, rows, jnp.nan)
        return jnp.where(used, rows, 0), jf.combine(rows, weights, plan, out_dtype=jnp.float32)

    rows, out = run_on_nodes(move, implementation, ids, x, weights)
    plan = oracle.make_plan(ids, 8, 30, 4)
    assert_same_bits(rows, oracle.dispatch(x, plan))
    want = oracle.combine_two_level(oracle.dispatch(x, plan), weights, plan, 2, BF16, F32)
    assert_same_bits(out, want)


def test_a_topology_that_is_one_node_is_the_flat_plan(rng):
    ids = routings.distinct(rng, 4, 6, 3, 8)

    def crossing(ids, make_plan):
        assert make_plan(ids, num_experts=8).crossing is None
        return ids

    run_on_nodes(crossing, None, ids, sizes={"node": 1, "expert": 4})
    run_on_nodes(crossing, None, ids, topology=one_axis(4), sizes={"expert": 4})


def test_few_rows_cross_in_few_slices(rng):
    """`most_rows`, of all ranks, is what the number of slices comes from."""
    ids = np.full((4, 32, 2), -1, np.int32)
    ids[3, :5] = [0, 1]  # five tokens of node 1 go to node 0, two or three on each rail

    def most(ids, make_plan):
        return make_plan(ids, num_experts=8).crossing.most_rows

    np.testing.assert_array_equal(run_on_nodes(most, "fused", ids), [3] * 4)


@pytest.mark.parametrize("routing", [routings.distinct, routings.masked, routings.one_rank])
def test_the_ledger_counts_what_crosses(routing, rng):
    ids = routing(rng, 8, 40, 3, 16)

    def count(ids, make_plan):
        crossing = make_plan(ids, num_experts=16, capacity=8 * 40 * 3).crossing
        return (crossing.pack_token >= 0).sum(1), crossing.most_rows

    sizes = {"node": 4, "expert": 2}
    sent, most = run_on_nodes(count, "fused", ids, sizes=sizes)
    ledger = jf.ledger(ids, (4, 2), num_experts=16, row_bytes=1, slice_rows=7)
    ours = ledger.ways["ours"]
    assert sent.sum() == ours.rows["wire"] == ledger.lower_bound
    assert most.max() == sent.max()
    slices = -(-int(most.max()) // 7)
    assert ours.wire == slices * 7 * 3 * 8  # of each of 8 rails to 3 nodes


def test_the_cost_model_of_slices():
    assert TWO.rows_of_slices(4096, 4096) == -(-4096 // 13)  # 3.4 ms on the wire, 50 us a slice
    assert TWO.rows_of_slices(64, 16) == 64
    assert TWO.rows_of_slices(1 << 20, 14336) == 1 << 16
    assert TWO.rows_of_slices(0, 16) == 1
    assert two_axes(slice_rows=100).rows_of_slices(64, 16) == 64
    assert two_axes(slice_rows=10).rows_of_slices(64, 16) == 10


def test_all_integers_have_32_bits(rng):
    ids = routings.distinct(rng, 4, 6, 3, 8)
    with jax.enable_x64(True):
        plan = run_on_nodes(lambda ids, make_plan: make_plan(ids, num_experts=8), "fused", ids)
    assert {leaf.dtype for leaf in jax.tree.leaves(plan)} == {np.dtype(np.int32)}


def test_more_rows_than_numbers_are_said():
    def plan(capacity):
        ids = jax.ShapeDtypeStruct((4, 3, 2), jnp.int32)
        mesh, spec = make_mesh({"node": 2, "expert": 2}), P(("node", "expert"))

        def local(ids):
            options = {"axis_name": ("node", "expert"), "num_experts": 4, "topology": TWO}
            return jf.make_plan(ids[0], capacity=capacity, **options).slot[None]

        jax.eval_shape(sharded(local, mesh, in_specs=spec, out_specs=spec), ids)

    plan(2**29)
    message = (
        r"^capacity: got 536870913 rows on each of 4 ranks, need fewer than 2\*\*31 in all \(each "
        r"factor rounded up to a power of two\) where rows cross nodes"
    )
    with pytest.raises(ValueError, match=message):
        plan(2**29 + 1)


def make_plans():
    mesh = make_mesh({"node": 2, "expert": 2})
    spec = P(("node", "expert"))

    def run(ids):
        options = {"axis_name": ("node", "expert"), "num_experts": 4, "implementation": "fused"}
        plan = jf.make_plan(ids, topology=TWO, **options)
        return plan.slot, plan.source

    return sharded(run, mesh, in_specs=spec, out_specs=spec)


def test_strict_names_the_rank_of_all_nodes_and_fails_on_all(monkeypatch):
    run = make_plans()
    ids = routings.distinct(np.random.default_rng(0), 4, 6, 2, 4).reshape(24, 2)
    broken = ids.copy()
    broken[3 * 6 + 5, 1] = 9
    want = run(ids)
    monkeypatch.setenv("JAX_FUSCO_STRICT", "1")
    message = r"expert_ids\[5, 1\] of rank 3 is 9, it must lie in \[-1, 4\)"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(run(broken))
    jax.tree.map(assert_same_bits, run(ids), want)


def test_a_plan_on_cpu_devices_takes_three_exchanges_and_one_call_a_step():
    text = make_plans().lower(np.zeros((24, 2), np.int32)).compile().as_text()
    assert text.count(" all-to-all(") == 3
    for name in ("count", "lay_out", "place", "deliver"):
        assert text.count(f'custom_call_target="jax_fusco_crossing_{name}"') == 1
    assert text.count('custom_call_target="jax_fusco_') == 4


@functools.cache
def both_plans(case):
    """A program that plans in the engine's calls, and from the movers as GPUs do."""
    sizes, topology, _, _, local, _, _, alignment, capacity = CASES[case]
    mesh = make_mesh(sizes)
    names = topology.axis_name
    spec = P(tuple(name for name in sizes if name not in names) or None, names)
    experts = local * ranks_of(sizes, topology)

    def run(ids):
        options = {
            "levels": Levels.of(topology),
            "num_experts": experts,
            "capacity": capacity or 40,
            "alignment": alignment,
        }
        found = (
            crossing.plan(ids[0, 0], **options),
            crossing_reference.plan("fused", ids[0, 0], **options),
        )
        return jax.tree.map(lambda a: a[None, None], found)

    return sharded(run, mesh, in_specs=spec, out_specs=spec)


@pytest.mark.parametrize("case", [1, 2, 3, 5, 8, 10])  # where plans differ; one node needs none
@given(data=st.data())
@hypothesis.settings(max_examples=12)
def test_plans_from_movers_are_those_of_the_engine(case, data):
    ids, _ = data.draw(routed(case))
    engine, movers = jax.device_get(both_plans(case)(ids))
    jax.tree.map(assert_same_bits, movers, engine)
