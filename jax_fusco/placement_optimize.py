"""optimize_placement: from routing statistics to a placement that is worth the move."""

from __future__ import annotations

import math

import numpy as np

from jax_fusco import placement_search
from jax_fusco.placement import Placement, check_node
from jax_fusco.placement_predict import check_stats, fitted, held_out, shares, touched
from jax_fusco.placement_search import NODE_WEIGHT, Problem
from jax_fusco.plan import experts_per_rank, whole
from jax_fusco.routing_stats import RoutingStats

Array = np.ndarray

METHODS = {
    "search": "swaps on all pairs, then on sampled tokens; communication and load together",
    "occult": "Occult's greedy placement; communication alone",
    "balance": "heaviest expert to the lightest rank (EPLB); load alone",
}
WORTH_MOVING = 0.01
"""The predicted gain below which experts stay where they are."""


def optimize_placement(
    stats: RoutingStats,
    num_ranks: int,
    *,
    ranks_per_node: int | None = None,
    num_slots: int | None = None,
    num_groups: int = 1,
    method: str = "search",
    load_weight: float = 1.0,
    seed: int = 0,
) -> Placement:
    """Finds which experts should share a rank, for each layer of the statistics.

    It minimises the distinct ranks a token touches (and, with nodes, `NODE_WEIGHT` times the
    distinct nodes) over today's, plus `load_weight` times the load of the fullest rank over the
    mean. Every rank gets equally many experts. A layer stays as it is where less than 1 % of that
    sum is to be gained, counted on tokens the search did not see, and beyond what chance explains.

    Args:
      stats: what the router did, in its own ids; a few thousand tokens a layer or more.
      num_ranks: R, a divisor of the experts.
      ranks_per_node: consecutive ranks that form a node; None: one node.
      num_slots: S, slots of a rank, for replicas of the hottest experts in those beyond E; None:
        E / R, no replicas. With replicas the best found is returned, whatever the gain.
      num_groups: experts swap only within so many groups of consecutive ids: needed where the
        router chooses groups first (`SigmoidRouter.num_groups`).
      method: one of `METHODS`: "search", "occult" (load_weight is unread), "balance".
      load_weight: the time of the experts over that of today's communication.
      seed: of the random kicks of "search", and of the replicas its sampled tokens go to.

    Returns:
      The placement; `placement.predict(stats)` says what it changes.

    Raises:
      TypeError, ValueError: an argument's type or value, named in the message.
    """
    stats = check_stats(stats)
    ranks = whole("num_ranks", num_ranks, 1)
    experts_per_rank(stats.num_experts, ranks)
    local = check_node(ranks_per_node, ranks)
    groups = whole("num_groups", num_groups, 1)
    slots = stats.num_experts // ranks
    if num_slots is not None:
        slots = whole("num_slots", num_slots, 1)
    if slots * ranks < stats.num_experts:
        raise ValueError(
            f"num_slots: got {slots}, need at least {stats.num_experts // ranks} for "
            f"{stats.num_experts} experts on {ranks} ranks"
        )
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, need one of {', '.join(METHODS)}")
    if stats.num_experts % groups:
        raise ValueError(
            f"num_groups: got {groups}, need a divisor of num_experts ({stats.num_experts})"
        )
    replicated = slots * ranks > stats.num_experts
    if method != "search" and groups > 1:
        raise ValueError(f"num_groups: got {groups}, need 1 with method {method!r}")
    if replicated and method == "occult":
        raise ValueError(f"num_slots: got {slots}, need no replicas with method 'occult'")
    if isinstance(load_weight, bool) or not isinstance(load_weight, int | float):
        raise TypeError(f"load_weight: got {load_weight!r}, need a number of at least 0")
    if not 0 <= load_weight < math.inf:
        raise ValueError(f"load_weight: got {load_weight!r}, need a number of at least 0")
    seed = whole("seed", seed, 0)
    layers = [stats] if stats.num_layers is None else map(stats.layer, range(stats.num_layers))
    weights = {"search": (1.0, float(load_weight)), "occult": (1.0, 0.0), "balance": (0.0, 1.0)}
    rows = [
        _optimize(layer, ranks, local, slots, groups, method, weights[method], seed)
        for layer in layers
    ]
    return Placement.of_slots(
        np.stack(rows) if stats.num_layers is not None else rows[0],
        num_experts=stats.num_experts,
        num_ranks=ranks,
        ranks_per_node=local,
    )


def _optimize(
    stats: RoutingStats,
    ranks: int,
    local: int,
    slots: int,
    groups: int,
    method: str,
    weights: tuple[float, float],
    seed: int,
) -> Array:
    """The expert of each slot, for one layer."""
    experts = stats.num_experts
    items = _replicate(stats.load, ranks, slots)
    problem = _problem(stats, items, ranks, local, groups, weights, seed)
    replicated = len(items) > experts
    identity = np.arange(experts) * ranks // experts
    if problem is None:
        if not replicated:
            return np.arange(experts)
        return _slots(placement_search.balance(np.ones(len(items)), items, ranks), items, ranks)
    balanced = placement_search.balance(problem.load, items, ranks)
    if method == "balance":
        rank = balanced
    elif method == "occult":
        rank = placement_search.occult(problem.pairs, ranks)
    else:
        starts = [balanced]
        if not replicated:
            starts = [identity]
            if groups == 1:
                starts += [balanced, placement_search.occult(problem.pairs, ranks)]
        rank = placement_search.search(problem, starts, seed)
    if groups == 1:
        rank = _relabel(rank, items * ranks // experts, ranks, local)
    found = _slots(rank, items, ranks)
    if replicated or _worth_moving(stats, found, ranks, local, weights):
        return found
    return np.arange(experts)


def _replicate(load: Array, ranks: int, slots: int) -> Array:
    """The expert of each item: each once, the rest replicas of where a copy bears most load.

    Source: the replication of DeepSeek's EPLB (github.com/deepseek-ai/EPLB).
    """
    copies = np.ones(len(load))
    for _ in range(ranks * slots - len(load)):
        more = np.where(copies < ranks, load / copies, -1.0)
        copies[(more if (more >= 0).any() else -copies).argmax()] += 1
    return np.repeat(np.arange(len(load)), copies.astype(int))


def _problem(
    stats: RoutingStats,
    items: Array,
    ranks: int,
    local: int,
    groups: int,
    weights: tuple[float, float],
    seed: int,
) -> Problem | None:
    """What the search sees: all counts but those of the tokens held out. None: no tokens."""
    sets, weight = fitted(stats)
    held, _ = held_out(stats)
    tokens = float(stats.tokens) - len(held)
    if not len(sets) or tokens <= 0:
        return None
    experts = stats.num_experts
    copies = np.bincount(items, minlength=experts)
    share = 1.0 / copies[items]
    pairs = (stats.coactivation - held.T @ held) / tokens
    np.fill_diagonal(pairs, 0.0)
    rng = np.random.default_rng(seed)
    # Each sampled token goes to one replica of each of its experts.
    first = np.concatenate([[0], np.cumsum(copies)[:-1]])
    chosen = rng.integers(0, copies, size=sets.shape) + first
    by_item = np.zeros((len(sets), len(items)), np.float32)
    np.put_along_axis(by_item, chosen, sets, axis=1)
    identity = Placement.identity(experts, ranks, ranks_per_node=local)
    today = float(weight @ touched(sets, shares(identity, 1)))
    if local < ranks:
        today += NODE_WEIGHT * float(weight @ touched(sets, shares(identity, local)))
    return Problem.of(
        load=stats.load[items] * share,
        pairs=pairs[np.ix_(items, items)] * share[:, None] * share[None, :],
        sets=by_item,
        weight=weight,
        kin=items,
        family=items * groups // experts,
        ranks=ranks,
        ranks_per_node=local,
        comm_weight=weights[0],
        load_weight=weights[1],
        today=today,
    )


def _relabel(rank: Array, home: Array, ranks: int, local: int) -> Array:
    """The same partition under the names that leave most items at home; nodes first."""
    node = _names(rank // local, home // local, ranks // local)[rank // local]
    named = np.empty_like(rank)
    for index in range(ranks // local):
        here = node == index
        inside, known = rank[here] % local, home[here] // local == index
        name = _names(inside[known], home[here][known] % local, local)
        named[here] = index * local + name[inside]
    return named


def _names(label: Array, home: Array, count: int) -> Array:
    """A new name for each of `count` labels, those first that most items call home."""
    overlap = np.zeros((count, count))
    np.add.at(overlap, (label, home), 1)
    name = np.full(count, -1)
    for flat in np.argsort(-overlap, axis=None, kind="stable"):
        old, new = divmod(int(flat), count)
        if name[old] < 0 and new not in name:
            name[old] = new
    return name


def _slots(rank: Array, items: Array, ranks: int) -> Array:
    """The expert of each slot: of each rank's in ascending order."""
    return items[np.lexsort((items, rank))]


def _worth_moving(
    stats: RoutingStats, found: Array, ranks: int, local: int, weights: tuple[float, float]
) -> bool:
    """Whether the gain, on tokens held out and beyond chance, is at least 1 %.

    Communication: three standard errors of the mean of the tokens' own differences. Load: a rank's
    fullness below what equal experts show by chance counts for nothing.
    """
    sizes = {"num_experts": stats.num_experts, "num_ranks": ranks, "ranks_per_node": local}
    new = Placement.of_slots(found, **sizes)
    old = Placement.identity(**sizes)
    sets, weight = held_out(stats)
    if not len(sets):
        return False
    costs = []
    for placement in (old, new):
        each = touched(sets, shares(placement, 1))
        if local < ranks:
            each = each + NODE_WEIGHT * touched(sets, shares(placement, local))
        costs.append(each)
    today = max(float(weight @ costs[0]), 1e-30)
    saved = (costs[0] - costs[1]) / today
    mean = float(weight @ saved)
    error = float(np.sqrt((weight**2) @ (saved - mean) ** 2))
    loads = [stats.load @ shares(placement, 1) for placement in (old, new)]
    before, after = (float(load.max() / max(load.mean(), 1e-30)) for load in loads)
    chance = math.sqrt(2 * math.log(max(ranks, 2)) * ranks / max(float(stats.load.sum()), 1.0))
    after = max(after, min(before, 1 + chance))
    comm, load = weights
    whole_cost = comm + load * before
    gain = (comm * mean + load * (before - after)) / whole_cost
    return gain >= WORTH_MOVING and gain * whole_cost > 3 * comm * error
