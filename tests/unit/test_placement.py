"""Placements: the type, the search on planted and on no structure, predictions, the command."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_fusco as jf
from jax_fusco import placement_search as search
from jax_fusco.placement_optimize import METHODS

Placement = jf.Placement


def planted(seed, tokens, k, experts, ranks, inside=0.9):
    """(ids, the placement that is best): experts of one rank's set mostly go together."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(experts)
    local = experts // ranks
    home = rng.integers(0, ranks, (tokens, 1))
    bonus = np.where(np.arange(experts) // local == home, math.log(inside / (1 - inside)) + 3, 0.0)
    order = np.argsort(-(bonus + rng.gumbel(size=(tokens, experts))), axis=1)[:, :k]
    return names[order], names


def unstructured(seed, tokens, k, experts):
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((tokens, experts)), axis=1)[:, :k]


def count(ids, placement):
    """Mean distinct ranks and nodes of a token, token by token."""
    rank = placement.rank_of_expert
    ranks = [{int(rank[e]) for e in token if e >= 0} for token in ids]
    nodes = [{r // placement.ranks_per_node for r in touched} for touched in ranks]
    return [float(np.mean([len(each) for each in all_])) for all_ in (ranks, nodes)]


def stats_of(ids, experts, **options):
    return jf.RoutingStats.zeros(experts, **options).update(ids)


@pytest.mark.parametrize(("ranks", "local"), [(4, None), (8, None), (8, 4)])
@pytest.mark.parametrize("method", ["search", "occult"])
def test_planted_structure_is_recovered(ranks, local, method):
    ids, names = planted(0, 12000, 4, 32, ranks)
    fresh, _ = planted(0, 12000, 4, 32, ranks)
    best = Placement.of_slots(names, num_experts=32, num_ranks=ranks, ranks_per_node=local)
    stats = stats_of(ids, 32)
    found = jf.optimize_placement(stats, ranks, ranks_per_node=local, method=method)
    optimum = count(fresh, best)
    got = count(fresh, found)
    assert got[0] <= 1.05 * optimum[0]
    assert got[1] <= 1.05 * optimum[1]
    prediction = found.predict(stats)
    np.testing.assert_allclose(prediction.after.ranks_per_token, got[0], rtol=0.03)
    np.testing.assert_allclose(prediction.after.nodes_per_token, got[1], rtol=0.03)
    assert prediction.gain > 0.1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("tokens", [300, 8000])
def test_without_structure_nothing_moves(seed, method, tokens):
    stats = stats_of(unstructured(seed, tokens, 4, 32), 32)
    for weight in (0.0, 1.0):
        found = jf.optimize_placement(stats, 8, method=method, load_weight=weight)
        assert found.is_identity
    prediction = found.predict(stats)
    assert (prediction.gain, prediction.moves) == (0.0, 0)
    assert str(prediction).endswith("nothing to gain: no expert changes its rank")


def test_a_good_placement_is_kept():
    ids, names = planted(0, 8000, 4, 32, 8)
    physical = np.argsort(names)[ids]
    assert jf.optimize_placement(stats_of(physical, 32), 8).is_identity


def test_load_and_communication_are_weighed():
    """Two sets of hot experts that go together: apart for the load, together for the rows."""
    rng = np.random.default_rng(0)
    hot = np.array([3, 8, 13, 18])
    ids = np.where(rng.random((6000, 1)) < 0.5, hot, unstructured(1, 6000, 4, 20))
    stats = stats_of(ids, 20)
    loads, ranks = [], []
    for weight in (0.0, 20.0):
        prediction = jf.optimize_placement(stats, 5, load_weight=weight).predict(stats)
        loads.append(prediction.after.load_max_over_mean)
        ranks.append(prediction.after.ranks_per_token)
    assert loads[1] < loads[0] - 1
    assert ranks[0] < ranks[1] - 0.5
    balanced = jf.optimize_placement(stats, 5, method="balance").predict(stats)
    assert balanced.after.load_max_over_mean < 1.2


def test_groups_of_the_router_stay_together():
    ids, _ = planted(0, 8000, 4, 32, 8)
    found = jf.optimize_placement(stats_of(ids, 32), 8, num_groups=2)
    assert not found.is_identity
    slots = found.expert_of_slot
    assert set(slots[:16].tolist()) == set(range(16))


def test_layers_are_placed_one_by_one():
    ids, _ = planted(0, 6000, 4, 32, 4)
    stats = jf.RoutingStats.zeros(32, 2).update(np.stack([ids, unstructured(0, 6000, 4, 32)]))
    found = jf.optimize_placement(stats, 4)
    assert found.num_layers == 2
    assert found.rank_of_expert.shape == (2, 32)
    assert [found.layer(i).is_identity for i in range(2)] == [False, True]
    prediction = found.predict(stats)
    assert prediction.after.ranks.shape == (2,)
    assert prediction.after.ranks[1] == prediction.today.ranks[1]
    single = jf.optimize_placement(stats.layer(0), 4)
    np.testing.assert_array_equal(found.layer(0).expert_of_slot, single.expert_of_slot)


def test_the_same_seed_gives_the_same_placement():
    stats = stats_of(planted(0, 4000, 4, 32, 8, inside=0.3)[0], 32)
    first, second = (jf.optimize_placement(stats, 8, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.expert_of_slot, second.expert_of_slot)


def test_a_layer_without_tokens_stays():
    ids, _ = planted(0, 4000, 4, 32, 4)
    stats = jf.RoutingStats.zeros(32, 2).update(ids, 0)
    found = jf.optimize_placement(stats, 4)
    assert found.layer(1).is_identity
    assert jf.optimize_placement(stats, 4, num_slots=9).expert_of_slot.shape == (2, 36)


def test_tokens_of_one_expert_have_no_pairs():
    stats = stats_of(np.arange(4000)[:, None] % 16, 16)
    for method in METHODS:
        assert jf.optimize_placement(stats, 8, method=method).is_identity


def partitions(experts, ranks):
    """Every balanced partition, once."""
    size = experts // ranks

    def extend(rank, left):
        if not left:
            yield tuple(rank)
            return
        first, *rest = left
        number = len(set(rank)) - (-1 in rank)
        for others in itertools.combinations(rest, size - 1):
            filled = list(rank)
            for item in (first, *others):
                filled[item] = number
            yield from extend(filled, [item for item in rest if item not in others])

    yield from extend([-1] * experts, list(range(experts)))


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_search_reaches_the_optimum_of_small_problems(seed):
    rng = np.random.default_rng(seed)
    experts, ranks = 8, 4
    topics = rng.normal(size=(4, experts)) * 3
    chosen = topics[rng.integers(0, 4, 400)] + rng.gumbel(size=(400, experts))
    sets = np.zeros((400, experts), np.float32)
    np.put_along_axis(sets, np.argsort(-chosen, axis=1)[:, :3], 1.0, axis=1)
    pairs = sets.T @ sets / 400
    np.fill_diagonal(pairs, 0)
    problem = search.Problem.of(
        load=sets.sum(0),
        pairs=pairs,
        sets=sets,
        weight=np.full(400, 1 / 400),
        kin=np.arange(experts),
        family=np.zeros(experts, int),
        ranks=ranks,
        ranks_per_node=ranks,
        comm_weight=1.0,
        load_weight=0.0,
        today=1.0,
    )
    found = search.search(problem, [np.arange(experts) // 2], seed=0)
    costs = [search.cost(problem, np.array(each)) for each in partitions(experts, ranks)]
    assert len(costs) == 105
    assert search.cost(problem, found) <= 1.01 * min(costs)
    literal = np.mean([len({int(found[e]) for e in np.flatnonzero(one)}) for one in sets])
    np.testing.assert_allclose(search.cost(problem, found), literal, rtol=1e-5)


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]), st.booleans())
def test_prices_of_swaps_are_what_swaps_cost(seed, local, replicas):
    rng = np.random.default_rng(seed)
    items, ranks = 12, 4
    kin = np.sort(rng.integers(0, 8, items)) if replicas else np.arange(items)
    sets = (rng.random((50, items)) < 0.25).astype(np.float32)
    weight = rng.random(50)
    problem = search.Problem.of(
        load=rng.random(items) * 9,
        pairs=np.zeros((items, items)),
        sets=sets,
        weight=weight / weight.sum(),
        kin=kin,
        family=np.arange(items) % 2,
        ranks=ranks,
        ranks_per_node=local,
        comm_weight=1.0,
        load_weight=0.7,
        today=1.0,
    )
    rank = rng.permutation(items) % ranks
    deltas = search._set_deltas(problem, rank) + search._load_deltas(problem, rank)
    before = search.cost(problem, rank)
    for i, j in itertools.combinations(range(items), 2):
        if rank[i] == rank[j]:
            continue
        swapped = rank.copy()
        swapped[[i, j]] = rank[[j, i]]
        np.testing.assert_allclose(deltas[i, j], search.cost(problem, swapped) - before, atol=2e-5)
    allowed = np.isfinite(search._forbid(problem, rank, deltas))
    for i, j in itertools.combinations(range(items), 2):
        sibling = any(
            kin[other] == kin[mine] and rank[other] == rank[theirs] and other not in (i, j)
            for mine, theirs in ((i, j), (j, i))
            for other in range(items)
        )
        same = rank[i] == rank[j] or kin[i] == kin[j] or i % 2 != j % 2
        assert allowed[i, j] == (not sibling and not same)


def test_replicas():
    rng = np.random.default_rng(0)
    popular = -np.log(1.0 + rng.permutation(32))
    ids = np.argsort(-(popular + rng.gumbel(size=(8000, 32))), axis=1)[:, :4]
    stats = stats_of(ids, 32)
    plain = jf.optimize_placement(stats, 8)
    found = jf.optimize_placement(stats, 8, num_slots=6)
    assert (found.num_slots, found.has_replicas, found.expert_of_slot.shape) == (6, True, (48,))
    copies = np.bincount(found.expert_of_slot, minlength=32)
    assert copies.min() == 1
    assert copies[stats.load.argmax()] == copies.max() > 1
    for slots in found.expert_of_slot.reshape(8, 6):
        assert len(set(slots.tolist())) == 6
    for expert in range(32):
        first = found.expert_of_slot.tolist().index(expert)
        assert found.rank_of_expert[expert] == first // 6
    after = found.predict(stats).after
    assert after.load_max_over_mean < plain.predict(stats).after.load_max_over_mean - 0.02


def test_nothing_is_predicted_from_nothing():
    stats = jf.RoutingStats.zeros(4, num_samples=1).update(np.array([[0, 1], [2, 3]]))
    with pytest.raises(ValueError, match=r"^stats: got 2 tokens, need more to predict from$"):
        jf.Placement.identity(4, 2).predict(stats)


def test_predicted_replicas_are_the_nearest_and_take_turns():
    """Tokens of experts 2 and 3, which lie on ranks 2, 3 and on ranks 1, 2, 3."""
    slots = [0, 1, 3, 0, 2, 3, 2, 3]
    placement = Placement.of_slots(slots, num_experts=4, num_ranks=4)
    after = placement.predict(stats_of(np.tile([2, 3], (2400, 1)), 4)).after
    # From rank 0 they meet in two turns of six, from rank 1 never, from ranks 2 and 3 always.
    np.testing.assert_allclose(after.ranks, (2 - 1 / 3 + 2 + 1 + 1) / 4, rtol=1e-3)
    # Rank 0 sends 1/2 and 1/3 of its tokens' assignments to each, rank 1 keeps one of its two.
    load = np.array([0, 1 / 3 + 1, 1 / 2 + 1 / 3 + 1 / 2 + 2, 1 / 2 + 1 / 3 + 1 / 2 + 2])
    np.testing.assert_allclose(after.load, load.max() / load.mean(), rtol=1e-6)


def test_bytes_by_link_as_the_ledger_counts_them():
    ids = unstructured(0, 8 * 3000, 3, 16)
    placement = Placement.identity(16, 8, ranks_per_node=4)
    found = placement.predict(stats_of(ids, 16, num_samples=2 * len(ids)), row_bytes=10).today
    counted = jf.ledger(ids.reshape(8, 3000, 3), (2, 4), num_experts=16, row_bytes=10)
    assert counted.tokens * 8 == len(ids)
    np.testing.assert_allclose(found.ranks_per_token, counted.rank_rows / len(ids), rtol=0.01)
    np.testing.assert_allclose(found.nodes_per_token, counted.node_rows / len(ids), rtol=0.01)
    for link, number in found.bytes_per_token.items():
        want = 10 * counted.ways["ours"].rows[link] / len(ids)
        np.testing.assert_allclose(number, want, rtol=0.02)


def test_a_placement_is_a_pytree_that_jit_takes():
    placement = Placement.of_slots([2, 0, 1, 3, 1, 2], num_experts=4, num_ranks=2)
    assert placement.rank_of_expert.tolist() == [0, 0, 0, 1]
    traces = []

    @jax.jit
    def rank_of(placement):
        traces.append(placement.num_ranks)
        return placement.rank_of_expert

    assert rank_of(placement).tolist() == [0, 0, 0, 1]
    other = Placement.of_slots([0, 1, 1, 3, 2, 0], num_experts=4, num_ranks=2)
    assert rank_of(other).tolist() == [0, 0, 1, 1]
    assert traces == [2]
    layers = Placement.identity(4, 2, num_layers=3)
    _, ranks = jax.lax.scan(lambda _, one: (None, one.rank_of_expert), None, layers)
    assert ranks.tolist() == [[0, 0, 1, 1]] * 3


def test_files(tmp_path: pathlib.Path):
    path = tmp_path / "placement.json"
    for slots in ([3, 2, 1, 0, 2, 1], [[0, 1, 2, 3], [3, 2, 1, 0]]):
        placement = Placement.of_slots(slots, num_experts=4, num_ranks=2, ranks_per_node=1)
        placement.save(path)
        again = Placement.from_file(path)
        assert jax.tree.structure(again) == jax.tree.structure(placement)
        np.testing.assert_array_equal(again.expert_of_slot, slots)
    good = json.loads(path.read_text())
    need = "need a JSON file that Placement.save wrote"
    cases = [
        ("{", None),
        ("[1]", f"got no format 'jax_fusco placement 1', {need}"),
        ({**good, "format": "2"}, f"got no format 'jax_fusco placement 1', {need}"),
        ({k: v for k, v in good.items() if k != "num_ranks"}, f"got no num_ranks, {need}"),
        (
            {**good, "num_ranks": 3},
            "num_experts: got 4, need a multiple of the number of ranks (3)",
        ),
        (
            {**good, "expert_of_slot": [0, 1, 2, 2]},
            "expert_of_slot: got no slot of expert 3, need every expert",
        ),
        ({**good, "expert_of_slot": [0, 1, 2, "3"]}, None),
        ({**good, "expert_of_slot": [[0, 1], [2]]}, None),
        ({**good, "expert_of_slot": [0, 1, 2, 10**30]}, None),
    ]
    for document, message in cases:
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        with pytest.raises(ValueError, match=r"placement\.json: ") as info:
            Placement.from_file(path)
        if message:
            assert str(info.value) == f"{path}: {message}"
    with pytest.raises(ValueError, match=r"need a JSON file that Placement\.save wrote$"):
        Placement.from_file(tmp_path / "missing.json")


def test_errors():
    stats = stats_of(unstructured(0, 50, 2, 8), 8)
    layered = jf.RoutingStats.zeros(8, 2).update(unstructured(0, 50, 2, 8), 0)
    placement = Placement.identity(8, 4)
    optimize = jf.optimize_placement

    def slots(*values, **changes):
        return Placement.of_slots(values, **{"num_experts": 4, "num_ranks": 2, **changes})

    cases = [
        (TypeError, lambda: optimize(3, 4), "stats: got int, need RoutingStats"),
        (
            ValueError,
            lambda: optimize(jf.RoutingStats.zeros(8), 4),
            "stats: got no tokens, need some",
        ),
        (ValueError, lambda: optimize(stats, 0), "num_ranks: got 0, need an integer of at least 1"),
        (
            ValueError,
            lambda: optimize(stats, 3),
            "num_experts: got 8, need a multiple of the number of ranks (3)",
        ),
        (
            ValueError,
            lambda: optimize(stats, 4, ranks_per_node=3),
            "ranks_per_node: got 3, need a divisor of the 4 ranks",
        ),
        (
            ValueError,
            lambda: optimize(stats, 4, num_slots=1),
            "num_slots: got 1, need at least 2 for 8 experts on 4 ranks",
        ),
        (
            ValueError,
            lambda: optimize(stats, 4, num_slots=3, method="occult"),
            "num_slots: got 3, need no replicas with method 'occult'",
        ),
        (
            ValueError,
            lambda: optimize(stats, 4, num_groups=3),
            "num_groups: got 3, need a divisor of num_experts (8)",
        ),
        (
            ValueError,
            lambda: optimize(stats, 4, num_groups=2, method="balance"),
            "num_groups: got 2, need 1 with method 'balance'",
        ),
        (
            ValueError,
            lambda: optimize(stats, 4, method="best"),
            "method: got 'best', need one of search, occult, balance",
        ),
        (
            ValueError,
            lambda: optimize(stats, 4, load_weight=-1),
            "load_weight: got -1, need a number of at least 0",
        ),
        (
            TypeError,
            lambda: optimize(stats, 4, load_weight=True),
            "load_weight: got True, need a number of at least 0",
        ),
        (
            ValueError,
            lambda: optimize(stats, 4, seed=-1),
            "seed: got -1, need an integer of at least 0",
        ),
        (
            TypeError,
            lambda: optimize(stats, 4, seed=1.5),
            "seed: got 1.5, need an integer of at least 0",
        ),
        (
            TypeError,
            lambda: slots(0.5, 1),
            "expert_of_slot: got dtype float64, need an integer dtype",
        ),
        (
            ValueError,
            lambda: slots(0, 1, 2),
            "expert_of_slot: got shape (3,), need [slots], a multiple of the 2 ranks, or that "
            "for each layer",
        ),
        (
            ValueError,
            lambda: slots(0, 1),
            "expert_of_slot: got 2 slots, need one for each of 4 experts",
        ),
        (ValueError, lambda: slots(0, 1, 2, 4), "expert_of_slot: got expert 4, need 0 to 3"),
        (ValueError, lambda: slots(0, 1, 2, -1), "expert_of_slot: got expert -1, need 0 to 3"),
        (
            ValueError,
            lambda: slots(0, 1, 2, 2),
            "expert_of_slot: got no slot of expert 3, need every expert",
        ),
        (ValueError, lambda: placement.layer(0), "index: got 0, need one of no layers"),
        (TypeError, lambda: placement.predict(3), "stats: got int, need RoutingStats"),
        (
            ValueError,
            lambda: placement.predict(stats_of(np.zeros((1, 1), int), 4)),
            "stats: got 4 experts, need the placement's 8",
        ),
        (
            ValueError,
            lambda: Placement.identity(8, 4, num_layers=3).predict(layered),
            "stats: got 2 layers, need the placement's 3",
        ),
        (
            ValueError,
            lambda: Placement.identity(8, 4, num_layers=3).predict(stats),
            "stats: got no layers, need the placement's 3",
        ),
        (
            ValueError,
            lambda: placement.predict(stats, row_bytes=0),
            "row_bytes: got 0, need an integer of at least 1",
        ),
    ]
    for kind, call, message in cases:
        with pytest.raises(kind) as info:
            call()
        assert str(info.value) == message
    with pytest.raises(dataclasses.FrozenInstanceError):
        placement.num_ranks = 2  # type: ignore[misc]
