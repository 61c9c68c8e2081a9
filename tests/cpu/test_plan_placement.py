"""make_plan(placement=) against literal loops, and training with replicas as without."""

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
from helpers import IMPLEMENTATIONS, P, assert_same_bits, both, make_mesh, per_rank, place, sharded
from hypothesis import given
from jax.sharding import AxisType

import jax_fusco as jf

Placement = jf.Placement
TWO = jf.Topology("node", "expert")
# Mesh sizes by axis, topology, T, k, E, S, alignment, capacity.
CASES = (
    ({"expert": 4}, None, 7, 3, 8, 2, 1, None),
    ({"expert": 4}, None, 6, 3, 8, 3, 2, None),
    ({"expert": 4}, None, 9, 2, 4, 4, 1, 7),
    ({"data": 2, "expert": 3}, None, 5, 2, 6, 3, 1, None),
    ({"node": 2, "expert": 4}, TWO, 6, 3, 8, 2, 1, None),
    ({"expert": 6}, jf.Topology(None, "expert", 2, slice_rows=2), 5, 4, 6, 3, 4, None),
    ({"node": 3, "expert": 2}, jf.Topology("node", "expert", slice_rows=2), 7, 2, 6, 2, 1, 8),
)


def draw_slots(rng: np.random.Generator, experts: int, slots: int) -> np.ndarray:
    """Every expert once, the rest as it comes: two replicas may even share a rank."""
    extra = rng.integers(0, rng.integers(1, experts + 1), slots - experts)
    return rng.permutation(np.concatenate([np.arange(experts), extra])).astype(np.int32)


def ranks_of(sizes, topology):
    names = ("expert",) if topology is None else topology.axis_name
    return names, int(np.prod([sizes[name] for name in names]))


@functools.cache
def program(case: int, implementation: str):
    sizes, topology, _, _, experts, _, alignment, capacity = CASES[case]
    names, _ = ranks_of(sizes, topology)
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(sizes, order=np.random.default_rng(case).permutation(count).tolist())
    spec = P(tuple(name for name in sizes if name not in names) or None, names)

    def run(placement, ids, x, weights):
        ids, x, weights = ids[0, 0], x[0, 0], weights[0, 0]
        plan = jf.make_plan(
            ids,
            axis_name=names,
            num_experts=experts,
            capacity=capacity,
            alignment=alignment,
            topology=topology,
            placement=placement,
            implementation=implementation,
        )
        rows = jf.dispatch(x, plan)
        results = {
            "integers": (
                plan.group_sizes,
                plan.expert_counts,
                plan.slot,
                plan.slot_rank,
                plan.num_dropped,
                plan.num_invalid,
            ),
            "rows": rows,
            "out": jf.combine(rows, weights, plan),
        }
        return jax.tree.map(lambda a: a[None, None], results)

    return sharded(run, mesh, in_specs=(P(), spec, spec, spec), out_specs=spec)


@st.composite
def routed(draw, case):
    """Expert of each slot, and ids `[groups, R, T, k]`: crowded, absent and bad ones too."""
    sizes, topology, tokens, k, experts, local, *_ = CASES[case]
    _, ranks = ranks_of(sizes, topology)
    groups = int(np.prod(list(sizes.values()))) // ranks
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    width = draw(st.integers(1, experts))
    ids = rng.integers(0, width, (groups, ranks, tokens, k)).astype(np.int32)
    absent, bad = draw(st.sampled_from([0, 0.1, 0.6])), draw(st.sampled_from([0, 0, 0.2]))
    ids[rng.random(ids.shape) < absent] = -1
    ids[rng.random(ids.shape) < bad] = draw(
        st.sampled_from([-2, experts, local * ranks, 2**31 - 1, -(2**31)])
    )
    return draw_slots(rng, experts, local * ranks), ids, rng


@pytest.mark.parametrize(
    ("implementation", "case"),
    [*(("fused", case) for case in range(len(CASES))), ("xla", 1), ("xla", 6)],
)
@given(data=st.data())
@hypothesis.settings(max_examples=12)
def test_drawn_placements(implementation, case, data):
    sizes, topology, tokens, k, experts, _, alignment, capacity = CASES[case]
    slots, ids, rng = data.draw(routed(case))
    groups, ranks = ids.shape[:2]
    per_node = None if topology is None else topology.shape(sizes)[1]
    placement = Placement.of_slots(slots, num_experts=experts, num_ranks=ranks)
    # Whole numbers: sums over nodes are the flat ones.
    x = rng.integers(-9, 9, (groups, ranks, tokens, 3)).astype("f4")
    weights = rng.integers(-3, 4, (groups, ranks, tokens, k)).astype("f4")
    got = jax.device_get(program(case, implementation)(placement, ids, x, weights))
    for g in range(groups):
        mine = jax.tree.map(lambda a: a[g], got)  # noqa: B023
        wanted = oracle.place(ids[g], slots, experts, per_node)
        plan = oracle.make_plan(wanted, len(slots), capacity, alignment)
        integers = plan.group_sizes, plan.expert_counts, plan.slot, plan.owner
        integers += plan.num_dropped, plan.num_invalid
        jax.tree.map(assert_same_bits, mine["integers"], integers)
        rows = oracle.dispatch(x[g], plan)
        assert_same_bits(mine["rows"], rows, "rows")
        assert_same_bits(mine["out"], oracle.combine(rows, weights[g], plan), "out")
        if capacity is None and routings_are_distinct(ids[g]):
            assert not plan.num_dropped.any()


def routings_are_distinct(ids):
    return all(len(set(t[t >= 0])) == (t >= 0).sum() for t in ids.reshape(-1, ids.shape[-1]))


@pytest.mark.parametrize("case", [1, 4])
def test_one_program_for_all_placements_of_the_same_sizes(case):
    run = program(case, "fused")
    run.clear_cache()
    sizes, topology, tokens, k, experts, local, *_ = CASES[case]
    _, ranks = ranks_of(sizes, topology)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        ids = routings.distinct(rng, ranks, tokens, k, experts)[None]
        placement = Placement.of_slots(
            draw_slots(rng, experts, local * ranks), num_experts=experts, num_ranks=ranks
        )
        run(placement, ids, np.zeros((1, ranks, tokens, 3), "f4"), np.ones(ids.shape, "f4"))
    assert run._cache_size() == 1


@both
def test_shares_are_even_and_remainders_do_not_pile_up(implementation):
    """Three replicas of expert 0, far from all but their own ranks."""
    slots = [0, 1, 0, 2, 0, 3, 4, 5, 6, 7, 8, 9, 10, 11, 10, 11]
    placement = Placement.of_slots(slots, num_experts=16 - 4, num_ranks=4)

    @functools.partial(per_rank, mesh=4)
    def owners(ids):
        options = {"axis_name": "expert", "num_experts": 12, "implementation": implementation}
        plan = jf.make_plan(ids, placement=placement, **options)
        return plan.slot_rank

    # Of 12 experts in 16 slots of 4 ranks: 0 lies on ranks 0 (twice) and 1.
    ids = np.zeros((4, 7, 1), np.int32)
    got = np.asarray(owners(ids))
    assert (got[0] == 0).all()
    assert (got[1] == 1).all()
    for rank in (2, 3):
        to_first, to_second = (got[rank] == 0).sum(), (got[rank] == 1).sum()
        assert to_first + to_second == 7
        assert to_second in (2, 3)


def sent(slot_rank, ranks, local):
    """Literal counts of what plans send, a token: ranks, nodes, rows by class of link."""
    found = dict.fromkeys(("ranks", "nodes", "rank", "node", "wire"), 0)
    for source, tokens in enumerate(slot_rank.tolist()):
        for token in tokens:
            there = set(token)
            nodes = {rank // local for rank in there}
            found["ranks"] += len(there)
            found["nodes"] += len(nodes)
            wire = len(nodes - {source // local})
            found["wire"] += wire
            found["rank"] += source in there
            found["node"] += sum(
                rank != source and rank // local == source // local for rank in there
            )
            by_rail = wire + sum(rank // local != source // local for rank in there)
            found["rank"] += by_rail / local
            found["node"] += by_rail * (local - 1) / local
    tokens = slot_rank.shape[0] * slot_rank.shape[1]
    return {name: count / tokens for name, count in found.items()}


@pytest.mark.parametrize("local", [4, 8])
def test_predictions_are_what_plans_do(local):
    """Popular experts, some of them in pairs that always come together, and several copies."""
    ranks, tokens, experts, k, slots = 8, 500, 16, 3, 3
    rng = np.random.default_rng(0)
    score = rng.gumbel(size=(ranks, tokens, experts)) - 1.5 * np.log(np.arange(experts) + 1)
    score[..., 1] = score[..., 0] - 1e-6
    ids = np.argsort(-score, axis=-1)[..., :k].astype(np.int32)
    stats = jf.RoutingStats.zeros(experts, num_samples=2 * ranks * tokens).update(ids)
    copies = [0, 1, 0, 1, 2, 3, 0, 1]
    placement = Placement.of_slots(
        rng.permutation([*range(experts), *copies]),
        num_experts=experts,
        num_ranks=ranks,
        ranks_per_node=local,
    )

    def run(placement, ids):
        plan = jf.make_plan(
            ids[0],
            axis_name="expert",
            num_experts=experts,
            placement=placement,
            topology=jf.Topology(None, "expert", local) if local < ranks else None,
        )
        return plan.slot_rank[None], plan.expert_counts.sum()[None]

    mesh = make_mesh(ranks)
    slot_rank, load = sharded(run, mesh, in_specs=(P(), P("expert")))(placement, ids)
    want = sent(np.asarray(slot_rank), ranks, local)
    found = placement.predict(stats).after
    got = {"ranks": found.ranks, "nodes": found.nodes, **found.links}
    assert placement.num_slots == slots
    for name, number in want.items():
        assert got[name] == pytest.approx(number, rel=0.02, abs=1e-9), name
    assert found.load == pytest.approx(float(load.max() / load.mean()), rel=0.02)


@both
def test_one_rank_without_a_mesh(implementation):
    slots = np.array([2, 0, 1, 1, 0, 1], np.int32)
    placement = Placement.of_slots(slots, num_experts=3, num_ranks=1)
    ids = np.array([[0, 1], [1, -1], [1, 2], [0, 1], [3, 0]], np.int32)

    @jax.jit
    def run(ids):
        options = {"axis_name": None, "num_experts": 3, "implementation": implementation}
        return jf.make_plan(ids, placement=placement, **options)

    plan = run(ids)
    want = oracle.make_plan(oracle.place(ids[None], slots, 3), 6)
    assert_same_bits(plan.slot, want.slot[0])
    assert_same_bits(plan.group_sizes, want.group_sizes[0])
    assert (plan.num_experts, int(plan.num_invalid)) == (6, 1)


@both
@pytest.mark.parametrize(("tokens", "k"), [(0, 2), (3, 0)])
@pytest.mark.parametrize("slots", [2, 3])
def test_nothing_to_move(implementation, tokens, k, slots):
    spare = np.zeros(4 * slots - 8, np.int32)
    placement = Placement.of_slots(np.append(np.arange(8), spare), num_experts=8, num_ranks=4)

    @functools.partial(per_rank, mesh=4)
    def run(x, ids, zero):
        options = {"axis_name": "expert", "num_experts": 8, "implementation": implementation}
        plan = jf.make_plan(ids, placement=placement, **options)
        # XLA refuses programs whose results need none of their operands.
        return plan.group_sizes + zero, jf.combine(jf.dispatch(x, plan), None, plan) + zero

    zero, ids = np.zeros(4, np.int32), np.zeros((4, tokens, k), np.int32)
    sizes, out = run(np.ones((4, tokens, 3), "f4"), ids, zero)
    assert_same_bits(sizes, np.zeros((4, slots), np.int32))
    assert_same_bits(out, np.zeros((4, tokens, 3), "f4"))


def test_an_id_that_is_a_slot_but_no_expert_is_an_error_in_strict_mode(monkeypatch):
    monkeypatch.setenv("JAX_FUSCO_STRICT", "1")
    slots = np.append(np.arange(4), [0, 0])
    placement = Placement.of_slots(slots, num_experts=4, num_ranks=2)

    @functools.partial(per_rank, mesh=2)
    def run(ids):
        options = {"axis_name": "expert", "num_experts": 4, "implementation": "fused"}
        return jf.make_plan(ids, placement=placement, **options).num_invalid

    ids = np.array([[[0], [3]], [[1], [4]]], np.int32)
    message = r"expert_ids\[1, 0\] of rank 1 is 6, it must lie in \[-1, 6\)"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(run(ids))


LAYERS, E, K, D = 3, 8, 2, 4


def layers_of(rng, slots):
    rows = np.stack([draw_slots(rng, E, slots) for _ in range(LAYERS)])
    return Placement.of_slots(rows, num_experts=E, num_ranks=4)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("implementation", "topology", "slots"),
    [("fused", None, 8), ("fused", None, 12), ("fused", TWO, 12), ("xla", None, 12)],
)
def test_in_a_scan_under_remat_as_without_a_placement(implementation, check_vma, topology, slots):
    """A layer's experts lie by its own placement; whole numbers, so that sums are exact."""
    rng = np.random.default_rng(3)
    ids = np.stack([routings.distinct(rng, 4, 6, K, E) for _ in range(LAYERS)])
    x = rng.integers(-4, 5, (4, 6, D)).astype("f4")
    scales = rng.integers(1, 4, (LAYERS, E)).astype("f4")
    names = TWO.axis_name
    mesh = make_mesh({"node": 2, "expert": 2})
    policy = jax.checkpoint_policies.save_only_these_names(*jf.REMAT_SAVE_NAMES)

    def losses(placement, scales, ids, x, topology):
        @functools.partial(jax.checkpoint, policy=policy)
        def layer(x, inputs):
            placement, scale, ids = inputs
            plan = jf.make_plan(
                ids,
                axis_name=names,
                num_experts=E,
                topology=topology,
                placement=placement,
                implementation=implementation,
            )
            sizes = plan.group_sizes
            group = jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=plan.capacity)
            rows = jf.dispatch(x, plan) * scale[group][:, None]
            return jf.combine(rows, None, plan) / 4, None

        def loss(scales, x):
            out, _ = jax.lax.scan(layer, x, (placement, scales, ids[:, 0]))
            return (out**2).sum()

        value, grads = jax.value_and_grad(loss, (0, 1))(scales, x[0])
        return value[None], grads[0], grads[1][None]

    def run(placement, scales, topology):
        specs = P(), P(None, names), P(None, names), P(names)
        program = sharded(
            functools.partial(losses, topology=topology),
            mesh,
            in_specs=specs,
            out_specs=(P(names), P(None, names), P(names)),
            check_vma=check_vma,
        )
        return jax.device_get(program(placement, scales, ids, x))

    want, want_scales, want_dx = run(None, scales, None)
    placement = layers_of(rng, slots)
    by_slot = np.take_along_axis(scales, placement.expert_of_slot, 1)
    value, d_scales, dx = run(placement, by_slot, topology)
    np.testing.assert_array_equal(value.sum(), want.sum())
    np.testing.assert_array_equal(dx, want_dx)
    summed = jax.vmap(Placement.sum_replicas)(placement, d_scales)
    want_scales = np.take_along_axis(want_scales, placement.expert_of_slot, 1)
    np.testing.assert_array_equal(summed, want_scales)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_partly_manual_mesh(implementation, axis_type):
    rng = np.random.default_rng(5)
    mesh = make_mesh({"data": 2, "expert": 3}, axis_type=axis_type)
    slots = draw_slots(rng, 6, 9)
    placement = Placement.of_slots(slots, num_experts=6, num_ranks=3)
    ids = routings.distinct(rng, 3, 5, 2, 6)

    def run(ids):
        options = {"axis_name": "expert", "num_experts": 6, "implementation": implementation}
        return jf.make_plan(ids[0], placement=placement, **options).slot[None]

    program = sharded(run, mesh, axis_names={"expert"}, in_specs=P("expert"), out_specs=P("expert"))
    with jax.set_mesh(mesh):
        got = program(*place(mesh, P("expert"), ids))
    assert_same_bits(got, oracle.make_plan(oracle.place(ids, slots, 6), 9).slot)


def test_one_row_for_each_token_and_rank():
    rng = np.random.default_rng(9)
    slots = draw_slots(rng, 8, 12)
    placement = Placement.of_slots(slots, num_experts=8, num_ranks=4)
    ids = routings.out_of_range(rng, 4, 7, 3, 8)

    def run(ids, slot_ids):
        options = {"axis_name": "expert", "rows": "token", "implementation": "fused"}
        placed = jf.make_plan(ids, num_experts=8, placement=placement, **options)
        return placed, jf.make_plan(slot_ids, num_experts=12, **options)

    got, want = per_rank(run, 4)(ids, oracle.place(ids, slots, 8))
    jax.tree.map(assert_same_bits, got, want)


def test_under_vmap_with_an_axis_name():
    rng = np.random.default_rng(6)
    slots = draw_slots(rng, 6, 9)
    placement = Placement.of_slots(slots, num_experts=6, num_ranks=3)
    ids = routings.distinct(rng, 3, 5, 2, 6)

    def run(ids):
        return jf.make_plan(ids, axis_name="expert", num_experts=6, placement=placement).slot

    got = jax.jit(jax.vmap(run, axis_name="expert"))(ids)
    assert_same_bits(got, oracle.make_plan(oracle.place(ids, slots, 6), 9).slot)


def tree_of(rng, *lead):
    """Gradients of several kinds, one of them with no rows of its own."""
    kinds = [("f4", (3, 2)), (ml_dtypes.bfloat16, (5,)), ("c8", ()), ("i4", (2,)), ("f4", (0, 2))]
    return [rng.integers(-9, 9, (*lead, *shape)).astype(kind) for kind, shape in kinds]


def summed(tree, slots):
    """By loops over pairs of slots."""
    out = jax.tree.map(np.zeros_like, tree)
    for leaf, total in zip(tree, out, strict=True):
        for s, expert in enumerate(slots):
            for other, same in enumerate(slots):
                if expert == same:
                    total[s] += leaf[other]
    return out


@pytest.mark.parametrize("slots_of_rank", [2, 3, 7])
@pytest.mark.parametrize("how", ["eager", "auto", "explicit", "inside", "inside_unchecked"])
def test_sums_over_replicas(slots_of_rank, how):
    rng = np.random.default_rng(slots_of_rank)
    slots = draw_slots(rng, 8, 4 * slots_of_rank)
    placement = Placement.of_slots(slots, num_experts=8, num_ranks=4)
    tree = tree_of(rng, len(slots))
    axis_type = AxisType.Explicit if how == "explicit" else AxisType.Auto
    mesh = make_mesh({"expert": 4, "model": 2}, axis_type=axis_type)
    on_mesh = place(mesh, P("expert"), *tree)
    if how == "eager":
        got = placement.sum_replicas(tree)
    elif how.startswith("inside"):

        def run(placement, *tree):
            return placement.sum_replicas(tree, axis_name="expert")

        got = sharded(
            run,
            mesh,
            in_specs=(P(), *(P("expert") for _ in tree)),
            out_specs=P("expert"),
            check_vma=how == "inside",
        )(placement, *on_mesh)
    else:
        with jax.set_mesh(mesh):
            got = jax.jit(Placement.sum_replicas)(placement, on_mesh)
            if how == "explicit":
                for leaf, result in zip(on_mesh, got, strict=True):
                    assert result.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    for mine, want in zip(got, summed(tree, slots), strict=True):
        assert_same_bits(mine, want)


def test_what_is_not_a_number_stays_with_its_expert():
    placement = Placement.of_slots([0, 1, 2, 3, 0, 1], num_experts=4, num_ranks=2)
    gradients = np.array([np.nan, 1, np.inf, 3, 1, 2], "f4")
    np.testing.assert_array_equal(
        placement.sum_replicas(gradients), [np.nan, 3, np.inf, 3, np.nan, 3]
    )


def test_narrow_gradients_are_summed_in_float32():
    placement = Placement.of_slots([0, 0, 0, 1, 0, 0], num_experts=2, num_ranks=2)
    gradients = np.array([1, 2**-8, 2**-8, 1, 2**-8, 2**-8], ml_dtypes.bfloat16)
    got = placement.sum_replicas(gradients)
    assert_same_bits(got[:3], np.full(3, 1 + 2**-6, ml_dtypes.bfloat16))


def test_errors_of_sum_replicas():
    placement = Placement.of_slots([0, 1, 2, 3, 0, 1], num_experts=4, num_ranks=2)
    layers = Placement.identity(4, 2, num_layers=3)
    cases: list[tuple[Any, str]] = [
        (
            lambda: placement.sum_replicas({"w": np.zeros((4, 2))}),
            "gradients: got shape (4, 2), need 6 slots in its first dimension",
        ),
        (
            lambda: placement.sum_replicas(np.float32(1)),
            "gradients: got shape (), need 6 slots in its first dimension",
        ),
        (
            lambda: layers.sum_replicas(np.zeros((3, 4))),
            "placement: got one for 3 layers, need that of one layer",
        ),
        (
            lambda: per_rank(lambda x: placement.sum_replicas(x, axis_name="expert"), 4)(
                np.zeros((4, 6))
            ),
            "axis_name: got 4 ranks, need the 2 of the placement",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match="need") as info:
            call()
        assert str(info.value).partition("\n")[0] == message


STEPS, RATE = 3, 0.3


def moe(params, x, placement, implementation):
    """A router that speaks of experts, experts in the order of slots; on every rank."""
    logits = x @ params["router"]
    weights, ids = jax.lax.top_k(jax.nn.softmax(logits), K)
    plan = jf.make_plan(
        ids,
        axis_name="expert",
        num_experts=E,
        placement=placement,
        implementation=implementation,
    )
    rows = jf.dispatch(x, plan)
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, params["experts"]["wi"], plan.group_sizes))
    out = jax.lax.ragged_dot(hidden, params["experts"]["wo"], plan.group_sizes)
    return x + jf.combine(out, weights, plan)


@pytest.mark.parametrize(
    ("implementation", "inside"), [("fused", False), ("fused", True), ("xla", True)]
)
def test_training_with_replicas_is_training_without(implementation, inside):
    rng = np.random.default_rng(8)
    mesh = make_mesh(4)
    x, target = (rng.standard_normal((4 * 16, D)).astype("f4") for _ in range(2))
    start = {
        "router": rng.standard_normal((D, E)).astype("f4"),
        "experts": {
            "wi": rng.standard_normal((E, D, 6)).astype("f4"),
            "wo": rng.standard_normal((E, 6, D)).astype("f4"),
        },
    }
    specs = {"router": P(), "experts": {"wi": P("expert"), "wo": P("expert")}}

    def local_loss(params, x, target, placement):
        out = moe(params, x, placement, implementation)
        return ((out - target) ** 2).sum() / target.size / 4

    def global_loss(params, x, target, placement):
        def total(params, x, target, placement):
            return jax.lax.psum(local_loss(params, x, target, placement), "expert")

        run = jax.shard_map(
            total, mesh=mesh, in_specs=(specs, P("expert"), P("expert"), P()), out_specs=P()
        )
        return run(params, x, target, placement)

    def update(params, grads):
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads)

    def step_outside(params, x, target, placement):
        grads = jax.grad(global_loss)(params, x, target, placement)
        if placement is not None:
            grads["experts"] = placement.sum_replicas(grads["experts"])
        return update(params, grads)

    def step_inside(params, x, target, placement):
        # Under check_vma the router's gradient is already the sum over ranks.
        grads = jax.grad(local_loss)(params, x, target, placement)
        if placement is not None:
            grads["experts"] = placement.sum_replicas(grads["experts"], axis_name="expert")
        return update(params, grads)

    mapped = jax.shard_map(
        step_inside, mesh=mesh, in_specs=(specs, P("expert"), P("expert"), P()), out_specs=specs
    )
    step = jax.jit(mapped if inside else step_outside)

    def train(params, placement):
        for _ in range(STEPS):
            params = step(params, x, target, placement)
        return jax.device_get(params)

    want = train(start, None)
    assert not np.allclose(want["experts"]["wi"], start["experts"]["wi"], atol=1e-3)
    for slots in (8, 12):
        order = draw_slots(rng, E, slots)
        placement = Placement.of_slots(order, num_experts=E, num_ranks=4)
        experts = jax.tree.map(lambda p: p[order], start["experts"])  # noqa: B023
        got = train({"router": start["router"], "experts": experts}, placement)
        np.testing.assert_allclose(got["router"], want["router"], rtol=1e-5, atol=1e-6)
        for name, leaf in got["experts"].items():
            np.testing.assert_allclose(leaf, want["experts"][name][order], rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(leaf, leaf[placement.slot_of_expert][order])
