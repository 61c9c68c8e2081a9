"""Which experts share a rank: balanced partitions, found in NumPy.

The items of a problem are experts, or replicas of experts; each rank takes the same number of them.
A token's cost is the number of distinct ranks it touches, plus `NODE_WEIGHT` times that of nodes:
the connectivity of a hypergraph whose edges are tokens. The searches swap pairs of items, and every
step prices all pairs at once by two matrix products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray

NODE_WEIGHT = 10.0
"""A row between nodes over a row inside one: NVLink at 480 GB/s, a NIC at 50 GB/s."""
_KICKS = 4
_CONTROL = 0.25
"""Of the pairs of all tokens as a control variate of the sampled tokens' cost: between 0 (overfits
the sample) and 1 (the noise of pairs), by trial."""
_LEAST = 1e-6  # of today's cost: above the noise of float32 sums
_NEVER = np.inf


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a placement is judged by.

    Attributes:
      load: assignments of each item, [I].
      pairs: tokens that go to both items, a share of all tokens, [I, I]; zero on the diagonal.
      excess: `_CONTROL` times what the pairs of all tokens have over those of `sets`, [I, I].
      sets: sampled tokens, [S, I] of 0 and 1, float32.
      weight: how much each counts; they sum to one, [S].
      kin: the expert of each item, [I]: two replicas of one expert never share a rank.
      family: items swap only within one, [I].
      ranks, ranks_per_node: R and L.
      comm_weight, load_weight: of communication and load, both relative to today's.
      today: mean cost of a token's communication today.
    """

    load: Array
    pairs: Array
    excess: Array
    sets: Array
    weight: Array
    kin: Array
    family: Array
    ranks: int
    ranks_per_node: int
    comm_weight: float
    load_weight: float
    today: float

    @classmethod
    def of(cls, *, pairs: Array, sets: Array, weight: Array, **rest: Any) -> Problem:
        """A problem with its `excess`."""
        seen = (sets * weight[:, None]).T @ sets
        np.fill_diagonal(seen, 0.0)
        excess = _CONTROL * (pairs - seen)
        return cls(pairs=pairs, excess=excess, sets=sets, weight=weight, **rest)

    @property
    def levels(self) -> list[tuple[Array, float]]:
        """(group of each rank, weight of a distinct group)."""
        rank = np.arange(self.ranks)
        levels = [(rank, 1.0)]
        if self.ranks_per_node < self.ranks:
            levels.append((rank // self.ranks_per_node, NODE_WEIGHT))
        return levels


def distinct(sets: Array, group: Array) -> Array:
    """How many distinct groups each token touches: `sets` [S, I], `group` [I] -> [S]."""
    touched = np.zeros((len(sets), int(group.max()) + 1), np.float32)
    for index in range(touched.shape[1]):
        touched[:, index] = sets[:, group == index].any(1)
    return touched.sum(1)


def cost(problem: Problem, rank: Array) -> float:
    """The whole objective over the sampled tokens, `rank` [I]."""
    total = load_cost(problem, rank)
    if problem.comm_weight:
        for group, weight in problem.levels:
            mine = group[rank]
            mean = float(problem.weight @ distinct(problem.sets, mine))
            mean -= problem.excess[mine[:, None] == mine[None, :]].sum() / 2
            total += problem.comm_weight * weight * mean / problem.today
    return total


def load_cost(problem: Problem, rank: Array) -> float:
    if not problem.load_weight:
        return 0.0
    load = np.bincount(rank, problem.load, problem.ranks)
    return float(problem.load_weight * _norm(_relative(load)))


def _relative(load: Array) -> Array:
    return load / max(load.mean(), 1e-30)


def _power(relative: Array) -> Array:
    """To the eighth: its mean's root is near the maximum, and yet every rank counts."""
    square = relative * relative
    square = square * square
    return square * square


def _norm(relative: Array) -> float:
    return float(_power(relative).mean() ** 0.125)


def _load_deltas(problem: Problem, rank: Array) -> Array | float:
    if not problem.load_weight:
        return 0.0
    mean = max(problem.load.sum() / problem.ranks, 1e-30)
    item = problem.load / mean
    load = np.bincount(rank, item, problem.ranks)
    powers = _power(load)
    moved = item[:, None] - item[None, :]
    mine = load[rank][:, None] - moved
    total = powers.sum() - powers[rank][:, None] - powers[rank][None, :]
    total = total + _power(mine) + _power(mine.T)
    norm = (np.maximum(total, 0.0) / problem.ranks) ** 0.125
    return problem.load_weight * (norm - _norm(load))


def _pair_deltas(problem: Problem, rank: Array, pairs: Array | None = None) -> Array:
    """Change of the cost for each swap [I, I] if each pair that shares a rank saved a row."""
    pairs = problem.pairs if pairs is None else pairs
    total = np.zeros_like(pairs)
    for group, weight in problem.levels:
        mine = group[rank]
        to = pairs @ np.eye(int(group.max()) + 1)[mine]  # item to group
        gain = to[:, mine] - np.take_along_axis(to, mine[:, None], 1)
        gain = gain + gain.T - 2 * pairs
        total -= np.where(mine[:, None] == mine[None, :], 0.0, weight * gain)
    return problem.comm_weight * total / problem.today


def _set_deltas(problem: Problem, rank: Array) -> Array:
    """Change of the cost for each swap of two items [I, I]: exact over the sampled tokens."""
    sets = problem.sets
    total = np.zeros_like(problem.pairs)
    for group, weight in problem.levels:
        mine = group[rank]
        count = sets @ np.eye(int(group.max()) + 1, dtype=np.float32)[mine]
        alone = sets * (count[:, mine] == 1) * problem.weight[:, None].astype(np.float32)
        empty = (count == 0) * problem.weight[:, None].astype(np.float32)
        # Leaving saves a group where the item was alone, unless the other item is in the token
        # too; coming costs one where nobody was there.
        change = (sets.T @ empty)[:, mine] - alone.sum(0)[:, None] + alone.T @ sets
        inside = mine[:, None] == mine[None, :]
        total += np.where(inside, 0.0, weight * (change + change.T))
    total *= problem.comm_weight / problem.today
    return total + _pair_deltas(problem, rank, problem.excess)


def _forbid(problem: Problem, rank: Array, deltas: Array) -> Array:
    """`deltas` with infinity where a swap changes nothing or is not allowed; upper half only."""
    banned = (rank[:, None] == rank[None, :]) | (problem.family[:, None] != problem.family[None, :])
    if len(np.unique(problem.kin)) < len(problem.kin):
        kin = problem.kin[:, None] == problem.kin[None, :]
        there = (kin.astype(np.float32) @ np.eye(problem.ranks, dtype=np.float32)[rank]) > 0
        clash = there[:, rank] & ~kin  # a sibling waits on the other item's rank
        banned |= clash | clash.T | kin
    deltas = np.where(banned, _NEVER, deltas)
    deltas[np.tril_indices(len(rank))] = _NEVER
    return deltas


def descend(
    problem: Problem,
    rank: Array,
    deltas_of: Callable[[Problem, Array], Array],
) -> Array:
    """Swaps pairs until no swap helps. Each round applies the best swaps of disjoint nodes.

    Communication changes by the sum over such swaps; the load's part is asked for again.
    """
    rank = rank.copy()
    node = np.arange(problem.ranks) // problem.ranks_per_node
    for _ in range(8 * len(rank)):
        comm, load = deltas_of(problem, rank), _load_deltas(problem, rank)
        deltas = _forbid(problem, rank, comm + load).ravel()
        promising = np.flatnonzero(deltas < -_LEAST)
        used = np.zeros(problem.ranks, bool)
        before = load_cost(problem, rank)
        for index in promising[np.argsort(deltas[promising], kind="stable")]:
            pair = np.array(divmod(int(index), len(rank)))
            ranks = rank[pair]
            if used[ranks].any():
                continue
            rank[pair] = ranks[::-1]
            after = load_cost(problem, rank)
            if comm.flat[index] + after - before > -_LEAST:
                rank[pair] = ranks
                continue
            before = after
            used[ranks] = True
            if node[ranks[0]] != node[ranks[1]]:
                used[np.isin(node, node[ranks])] = True
            if used.all():
                break
        if not used.any():
            break
    return rank


def occult(pairs: Array, ranks: int) -> Array:
    """Occult's greedy placement: rank of each item, [I].

    Rank 0 is seeded with an item of the pair that collaborates most; each next rank with the item
    of lowest mean collaboration with all that are placed; each rank is filled with the items of
    highest mean collaboration with its members. Source: Occult (arXiv 2505.13345), section 4.
    """
    pairs = pairs / max(pairs.max(), 1e-30)
    size = len(pairs) // ranks
    rank = np.full(len(pairs), -1)
    for index in range(ranks):
        placed, free = np.flatnonzero(rank >= 0), np.flatnonzero(rank < 0)
        if index == 0:
            best = int((pairs - np.eye(len(pairs))).argmax())  # never an item with itself
            members = list(divmod(best, len(pairs)))[:size]
        else:
            members = [int(free[pairs[free][:, placed].mean(1).argmin()])]
        rank[members] = index
        while len(members) < size:
            free = np.flatnonzero(rank < 0)
            members.append(int(free[pairs[free][:, members].mean(1).argmax()]))
            rank[members] = index
    return rank


def balance(load: Array, kin: Array, ranks: int) -> Array:
    """The heaviest item first, to the lightest rank with room and no sibling: rank of each, [I].

    Source: the balanced packing of DeepSeek's EPLB (github.com/deepseek-ai/EPLB).
    """
    size = len(load) // ranks
    rank, sums, room = np.full(len(load), -1), np.zeros(ranks), np.full(ranks, size)
    for item in np.argsort(-load, kind="stable"):
        siblings = np.isin(np.arange(ranks), rank[(kin == kin[item]) & (rank >= 0)])
        # With more replicas than there is room apart, two share a rank.
        keys = np.lexsort((sums, siblings, room == 0))
        rank[item] = keys[0]
        sums[keys[0]] += load[item]
        room[keys[0]] -= 1
    return rank


def _kick(rank: Array, problem: Problem, rng: np.random.Generator) -> Array:
    """A few random swaps that are allowed."""
    rank = rank.copy()
    for _ in range(max(2, len(rank) // 16)):
        allowed = np.argwhere(np.isfinite(_forbid(problem, rank, np.zeros((len(rank),) * 2))))
        if not len(allowed):
            break
        pair = allowed[rng.integers(len(allowed))]
        rank[pair] = rank[pair[::-1]]
    return rank


def search(problem: Problem, starts: list[Array], seed: int) -> Array:
    """The best of several descents: by pairs (all tokens, little noise), then by sampled tokens.

    The best goes on from a few random kicks (iterated local search).
    """
    rng = np.random.default_rng(seed)
    found = []
    best_start = min(starts, key=lambda rank: cost(problem, rank))
    for rank in [best_start, *(descend(problem, start, _pair_deltas) for start in starts)]:
        rank = descend(problem, rank, _set_deltas) if problem.comm_weight else rank
        found.append((cost(problem, rank), rank))
    best = min(found, key=lambda pair: pair[0])
    for _ in range(_KICKS):
        rank = descend(problem, _kick(best[1], problem, rng), _pair_deltas)
        rank = descend(problem, rank, _set_deltas) if problem.comm_weight else rank
        value = cost(problem, rank)
        if value < best[0] - 1e-9:
            best = value, rank
    return best[1]
