"""What a placement changes: ranks and nodes a token touches, bytes by link, load of the ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from jax_fusco import replicas
from jax_fusco.ledger import LINKS
from jax_fusco.placement import Placement
from jax_fusco.plan import whole
from jax_fusco.routing_stats import RoutingStats

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One dispatch, for each layer (arrays `[*layers]`) or, by the properties, on average.

    Attributes:
      ranks: mean distinct ranks of a token (Occult's C_T).
      nodes: mean distinct nodes of a token.
      links: bytes per token by class of link ("rank", "node", "wire"): once to each node on
        balanced rails, then once to each rank, as `jax_fusco.ledger`'s "ours" without padding.
      load: the fullest rank's assignments over the mean.
    """

    ranks: Array
    nodes: Array
    links: Mapping[str, Array]
    load: Array

    @property
    def ranks_per_token(self) -> float:
        return float(self.ranks.mean())

    @property
    def nodes_per_token(self) -> float:
        return float(self.nodes.mean())

    @property
    def bytes_per_token(self) -> dict[str, float]:
        return {link: float(number.mean()) for link, number in self.links.items()}

    @property
    def load_max_over_mean(self) -> float:
        return float(self.load.mean())


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Traffic with the experts where they are, and after the move.

    Attributes:
      today, after: before and after.
      gain: the share of distinct ranks saved, averaged over the layers; negative if there are more.
      moves: experts that change their rank, over all layers.
      row_bytes: of a token's row.
    """

    today: Traffic
    after: Traffic
    gain: float
    moves: int
    row_bytes: int

    def __str__(self) -> str:
        today, after = self.today, self.after
        lines = [
            _line("distinct ranks per token", today.ranks_per_token, after.ranks_per_token),
            _line("distinct nodes per token", today.nodes_per_token, after.nodes_per_token),
            _line("load, max/mean", today.load_max_over_mean, after.load_max_over_mean),
        ]
        unit = "rows" if self.row_bytes == 1 else "bytes"
        for link, number in today.bytes_per_token.items():
            lines.append(
                _line(f"{unit} per token {LINKS[link]}", number, after.bytes_per_token[link])
            )
        if self.moves:
            lines.append(f"{self.moves} experts change their rank")
        else:
            lines.append("nothing to gain: no expert changes its rank")
        return "\n".join(lines)


def _line(what: str, today: float, after: float) -> str:
    change = f" ({100 * (after / today - 1):+.1f} %)" if today else ""
    digits = ".4g" if max(today, after) < 1000 else ".0f"
    return f"{what}: {today:{digits}} -> {after:{digits}}{change}"


def held_out(stats: RoutingStats) -> tuple[Array, Array]:
    """(sets [S/2, E] float32, weights that sum to one) of the samples that no search looks at."""
    return _samples(stats, 1)


def fitted(stats: RoutingStats) -> tuple[Array, Array]:
    """The same of those that searches look at."""
    return _samples(stats, 0)


def _samples(stats: RoutingStats, first: int) -> tuple[Array, Array]:
    weight = np.asarray(stats.sample_weight, np.float64)[first::2]
    there = weight > 0
    weight = weight[there]
    return stats.sets[first::2][there].astype(np.float32), weight / max(weight.sum(), 1e-30)


def shares(placement: Placement, group_size: int) -> Array:
    """The share of each expert's slots in each group of that many ranks: one layer's [E, R/g]."""
    slots = np.asarray(placement.expert_of_slot)
    group = np.arange(len(slots)) // (placement.num_slots * group_size)
    found = np.zeros((placement.num_experts, placement.num_ranks // group_size))
    np.add.at(found, (slots, group), 1)
    return found / found.sum(1, keepdims=True)


def touched(sets: Array, share: Array) -> Array:
    """Expected distinct groups of each token: `sets` [S, E], `share` [E, groups] -> [S]."""
    missed = np.log(np.maximum(1.0 - share, 1e-30))
    return (1.0 - np.exp(sets @ missed)).sum(1)


def check_stats(stats: object) -> RoutingStats:
    if not isinstance(stats, RoutingStats):
        raise TypeError(f"stats: got {type(stats).__name__}, need RoutingStats")
    if not stats.tokens.any():
        raise ValueError("stats: got no tokens, need some")
    return stats


def predict(placement: Placement, stats: RoutingStats, row_bytes: int) -> Prediction:
    """See `Placement.predict`."""
    stats = check_stats(stats)
    row_bytes = whole("row_bytes", row_bytes, 1)
    if stats.num_experts != placement.num_experts:
        raise ValueError(
            f"stats: got {stats.num_experts} experts, need the placement's {placement.num_experts}"
        )
    if placement.num_layers not in (None, stats.num_layers):
        raise ValueError(
            f"stats: got {stats.num_layers or 'no'} layers, need the placement's "
            f"{placement.num_layers}"
        )
    identity = Placement.identity(
        placement.num_experts, placement.num_ranks, ranks_per_node=placement.ranks_per_node
    )
    todays, afters, moves = [], [], 0
    for index in range(stats.num_layers or 1):
        layer = stats if stats.num_layers is None else stats.layer(index)
        here = placement if placement.num_layers is None else placement.layer(index)
        if not len(held_out(layer)[0]):
            raise ValueError(f"stats: got {int(layer.tokens)} tokens, need more to predict from")
        todays.append(_traffic(identity, layer))
        afters.append(_traffic(here, layer))
        moves += int((here.rank_of_expert != identity.rank_of_expert).sum())
    today, after = (_stack(each, stats.num_layers, row_bytes) for each in (todays, afters))
    gain = 1.0 - after.ranks_per_token / today.ranks_per_token
    return Prediction(today, after, gain, moves, row_bytes)


def _sources(placement: Placement, sets: Array) -> Iterator[tuple[Array, Array]]:
    """What a plan does with tokens that lie on rank 0, on rank 1, ... (there, share).

    there: bool [S, R], whether each of `sets` [S, E] goes to each rank; replicas take turns over
    the tokens. share: [E, R], of each expert's assignments those that go to each rank.
    """
    slots, experts = np.asarray(placement.expert_of_slot), placement.num_experts
    ranks, local = placement.num_ranks, placement.ranks_per_node
    token, expert = np.nonzero(sets)
    turn = (np.cumsum(sets, axis=0) - sets)[token, expert].astype(np.int64)
    there, share = np.zeros((len(sets), ranks), bool), np.zeros((experts, ranks))
    for source in range(ranks):
        if placement.has_replicas or not source:
            order, begin, copies = replicas.nearest_slots(placement, source, local)
            near = order[: copies.sum()]
            share = np.zeros_like(share)
            np.add.at(share, (slots[near], near // placement.num_slots), 1 / copies[slots[near]])
            slot = order[begin[expert] + (turn + source) % copies[expert]]
            there = np.zeros_like(there)
            there[token, slot // placement.num_slots] = True
        yield there, share


def _traffic(placement: Placement, stats: RoutingStats) -> dict[str, float]:
    """Fields of `Traffic`, and rows by class of link, of one layer."""
    sets, weight = held_out(stats)
    ranks, local = placement.num_ranks, placement.ranks_per_node
    count = ranks // local
    by_rank, by_node = np.zeros((ranks, ranks)), np.zeros((ranks, count))
    load = np.zeros(ranks)
    for source, (there, share) in enumerate(_sources(placement, sets)):
        by_rank[source] = weight @ there
        by_node[source] = weight @ there.reshape(-1, count, local).any(-1)
        load += stats.load @ share
    node = np.arange(ranks) // local
    same = node[:, None] == node
    total, own = by_rank.sum() / ranks, np.trace(by_rank) / ranks
    near = by_rank[same].sum() / ranks - own
    wire = by_node[node[:, None] != np.arange(count)].sum() / ranks
    # The rail by which a row comes is any with the same probability; what crosses is first pulled
    # to its rail.
    by_rail = total - own - near + wire
    return {
        "ranks": total,
        "nodes": by_node.sum() / ranks,
        "load": load.max() / max(load.mean(), 1e-30),
        "rank": own + by_rail / local,
        "node": near + by_rail * (local - 1) / local,
        "wire": wire,
    }


def _stack(found: list[dict[str, float]], layers: int | None, row_bytes: int) -> Traffic:
    by_name = {name: np.array([one[name] for one in found]) for name in found[0]}
    if layers is None:
        by_name = {name: each[0] for name, each in by_name.items()}
    links = {link: row_bytes * by_name[link] for link in LINKS}
    return Traffic(by_name["ranks"], by_name["nodes"], links, by_name["load"])
