"""What a placement changes: ranks and nodes a token touches, bytes by link, load of the ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

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
      links: bytes a token by class of link ("rank", "node", "wire"): once to each node on balanced
        rails, then once to each rank, as `jax_fusco.ledger`'s "ours" without padding.
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
            _line("distinct ranks a token", today.ranks_per_token, after.ranks_per_token),
            _line("distinct nodes a token", today.nodes_per_token, after.nodes_per_token),
            _line("load, max/mean", today.load_max_over_mean, after.load_max_over_mean),
        ]
        unit = "rows" if self.row_bytes == 1 else "bytes"
        for link, number in today.bytes_per_token.items():
            lines.append(
                _line(f"{unit} a token {LINKS[link]}", number, after.bytes_per_token[link])
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
        todays.append(_traffic(identity, layer))
        afters.append(_traffic(here, layer))
        moves += int((here.rank_of_expert != identity.rank_of_expert).sum())
    today, after = (_stack(each, stats.num_layers, row_bytes) for each in (todays, afters))
    gain = 1.0 - after.ranks_per_token / max(today.ranks_per_token, 1e-30)
    return Prediction(today, after, gain, moves, row_bytes)


def _traffic(placement: Placement, stats: RoutingStats) -> tuple[float, float, float, Placement]:
    """(ranks, nodes, load) of one layer, and its placement."""
    sets, weight = held_out(stats)
    by_rank = shares(placement, 1)
    ranks = float(weight @ touched(sets, by_rank))
    nodes = float(weight @ touched(sets, shares(placement, placement.ranks_per_node)))
    load = stats.load @ by_rank
    return ranks, nodes, float(load.max() / max(load.mean(), 1e-30)), placement


def _stack(found: list[tuple], layers: int | None, row_bytes: int) -> Traffic:
    placement = found[0][3]
    local = placement.ranks_per_node
    count = placement.num_ranks // local
    ranks, nodes, load = (np.array(each) for each in zip(*(one[:3] for one in found), strict=True))
    crossing = nodes * (count - 1) / count
    # The token's own rank is any with the same probability, and so is the rail it comes in by;
    # what crosses is first pulled to its rail.
    near = ranks + crossing
    links = {"rank": near / local, "node": near * (local - 1) / local, "wire": crossing}
    shape = () if layers is None else (layers,)
    return Traffic(
        ranks.reshape(shape),
        nodes.reshape(shape),
        {link: (row_bytes * number).reshape(shape) for link, number in links.items()},
        load.reshape(shape),
    )
