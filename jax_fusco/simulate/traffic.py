"""Traffic: the rows that a routing moves, as expectations or counted from a routing.

Nodes that behave alike form a class, so that a cluster of thousands of nodes has a handful of
numbers. Within a node ranks are alike, but for the spread that a strategy leaves between rails.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from jax_fusco import rails
from jax_fusco.ledger import Counts

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Rows between classes of nodes, A of them.

    Attributes:
      count: `[A]`, nodes of each class.
      tokens, pairs, rows: `[A, A]`, what one rank of a node of the first class sends to one node of
        the second: rows once to the node, once to each rank of it, once for each assignment.
      spread: max/mean over the rails of a node, by strategy (1 where missing).
    """

    count: Array
    tokens: Array
    pairs: Array
    rows: Array
    spread: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def sent(self, what: Array) -> Array:
        """[A]: rows that one rank of each class sends, to its own node too."""
        return what @ self.count

    def received(self, what: Array) -> Array:
        """[A]: rows that one rank of each class receives, from its own node too."""
        return self.count @ what

    def crossing(self, what: Array) -> Array:
        """[A]: rows that one rank of each class sends to other nodes."""
        return self.sent(what) - np.diagonal(what)


def chosen(
    nodes: int, ranks: int, experts: int, k: int, groups: int | None = None
) -> tuple[float, float]:
    """Distinct nodes and distinct ranks that a token's k distinct experts lie on, expected.

    Experts are drawn uniformly from `groups` nodes, these drawn uniformly from all (None: all).
    """
    groups = nodes if groups is None else min(groups, nodes)
    here = experts // (nodes * ranks)
    pool = groups * ranks * here

    def hit(size: int) -> float:
        """Probability that some of the k lie among `size` of the pool's experts."""
        return 1 - math.prod(max(0, pool - size - i) / (pool - i) for i in range(k))

    return groups * hit(ranks * here), groups * ranks * hit(here)


def expected(
    nodes: int,
    ranks: int,
    tokens: int,
    experts: int,
    k: int,
    groups: int | None = None,
    skew: float = 1.0,
) -> Traffic:
    """Traffic of T tokens per rank whose experts lie on `groups` nodes; one node may be hot.

    Args:
      nodes, ranks, tokens, experts, k: N, L, T, E, k.
      groups: nodes that a token's experts are drawn from; None: all.
      skew: what the hot node receives, relative to the mean over nodes; 1: none is hot.
    """
    visited, distinct = chosen(nodes, ranks, experts, k, groups)
    parts = np.array([visited, distinct, k]) * tokens / nodes  # to an average node
    if skew == 1 or nodes == 1:
        one = parts[:, None, None]
        return Traffic(np.array([nodes]), *one)
    popular = np.array([skew, (nodes - skew) / (nodes - 1)])  # hot, cold
    matrices = parts[:, None, None] * np.broadcast_to(popular, (2, 2))
    return Traffic(np.array([1, nodes - 1]), *matrices)


def from_routing(ids: Array, nodes: int, ranks: int, experts: int, classes: int = 4) -> Traffic:
    """Traffic of a routing `[R, T, k]`.

    Nodes form classes by what they receive, the busiest alone; numbers are means over a class.
    """
    count = Counts(np.asarray(ids), nodes, ranks, experts // (nodes * ranks))
    received = count.visits.sum((0, 1))
    order = np.argsort(-received, kind="stable")
    parts = min(classes, nodes) - 1
    groups = [order[:1], *(np.array_split(order[1:], parts) if parts else [])]

    def mean(between: Array) -> Array:
        """[A, A] from rows between nodes [N, N]."""
        return np.array([[between[np.ix_(a, b)].mean() for b in groups] for a in groups]) / ranks

    def by_node(pairs: Array) -> Array:
        return pairs.reshape(nodes, ranks, nodes, ranks).sum((1, 3))

    spread = {}
    for name in ("balanced", "fixed", "fusco"):
        plan = rails.assign(count.crossing, name)
        spread[name] = max(rails.spread(plan.egress), rails.spread(plan.ingress))
    return Traffic(
        np.array([len(group) for group in groups]),
        mean(count.visits.sum(1)),
        mean(by_node(count.pairs)),
        mean(by_node(count.assignments)),
        spread,
    )
