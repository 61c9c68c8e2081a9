"""Rails: which rank of a node sends which rows to which other node. NumPy; the plans' reference.

A token crosses to a destination node once, whatever its number of experts there. Of such rows,
`counts[s, l, n]` lie on rank l of node s and go to node n (`crossing_rows` counts them; s = n is
zero). A strategy gives each to a rail, the rank of s that sends it, and to a forwarder, the rank of
n that receives it. Arrays are int64; N nodes, L ranks per node.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Rails:
    """Rows by owner and rail, and where each rail's rows arrive.

    Attributes:
      moved: `[N source, N destination, L owner, L rail]`, rows that the rail sends for the owner.
      forwarder: `[N source, N destination, L rail]`, the local index at the destination.
    """

    moved: Array
    forwarder: Array

    @property
    def sent(self) -> Array:
        """[N source, N destination, L rail]: rows over the slow link."""
        return self.moved.sum(2)

    @property
    def egress(self) -> Array:
        """[N, L]: rows that each rank sends to other nodes."""
        return self.sent.sum(1)

    @property
    def ingress(self) -> Array:
        """[N, L]: rows that each rank receives from other nodes."""
        nodes, _, ranks = self.forwarder.shape
        arrived = np.zeros((nodes, ranks), np.int64)
        destination = np.broadcast_to(np.arange(nodes)[None, :, None], self.forwarder.shape)
        np.add.at(arrived, (destination, self.forwarder), self.sent)
        return arrived

    @property
    def pulled(self) -> Array:
        """[N, L]: rows that each rail takes from other ranks of its node before sending."""
        own = np.einsum("snll->sl", self.moved)
        return self.egress - own


def balanced_rail(position: Any, source: Any, destination: Any, ranks: int) -> Any:
    """The rail of a row, by its place among the rows of node `source` for node `destination`.

    NumPy or JAX, integers or arrays.

    Rows are counted in the order of owner, then token. On its rail the row is number
    `position // ranks`.
    """
    return (position + source + destination) % ranks


def balanced(counts: Array) -> Rails:
    """Row i from node s to node n takes rail (i + s + n) % L, whoever owns it.

    Each rail of a node sends the same number of rows to each destination, up to one; the remainders
    start at another rail for each pair of nodes.
    """
    nodes, ranks, _ = counts.shape
    stops = np.cumsum(counts, axis=1).transpose(0, 2, 1)[..., None]  # [s, n, owner, 1]
    starts = stops - counts.transpose(0, 2, 1)[..., None]
    node, rail = np.arange(nodes), np.arange(ranks)
    first = (rail - node[:, None, None] - node[None, :, None]) % ranks  # row that a rail gets first

    def before(row: Array) -> Array:
        """Rows of each rail among the first `row` ones."""
        return np.maximum(0, (row - first[:, :, None, :] + ranks - 1) // ranks)

    return Rails(before(stops) - before(starts), _same_index(nodes, ranks))


def fixed(counts: Array) -> Rails:
    """Every owner sends its rows itself, to its own local index."""
    nodes, ranks, _ = counts.shape
    return Rails(_by_owner(counts), _same_index(nodes, ranks))


def fusco(counts: Array) -> Rails:
    """FUSCO's Algorithm 1 (arXiv 2512.22036): owners send, forwarders are paired by load.

    A node's ranks are sorted by what they send to other nodes, descending, ties by local index, and
    the order is shifted cyclically by the node's index. Position i sends to position i of every
    other node.
    """
    nodes, ranks, _ = counts.shape
    order = np.argsort(-counts.sum(2), axis=1, kind="stable")
    shifted = (np.arange(ranks) - np.arange(nodes)[:, None]) % ranks
    holder = np.take_along_axis(order, shifted, 1)  # [node, position] -> local index
    position = np.argsort(holder, axis=1)
    forwarder = holder[np.arange(nodes)[None, :, None], position[:, None, :]]
    return Rails(_by_owner(counts), forwarder)


def lpt(counts: Array) -> Rails:
    """Longest processing time first (Graham, 1969): an owner's rows for a node are one piece.

    Pieces go, the largest first, to the rail whose busier end, sender or receiver, has least so
    far.
    """
    nodes, ranks, _ = counts.shape
    moved = np.zeros((nodes, nodes, ranks, ranks), np.int64)
    egress, ingress = np.zeros((2, nodes, ranks), np.int64)
    for flat in np.argsort(-counts, axis=None, kind="stable"):
        source, owner, destination = np.unravel_index(flat, counts.shape)
        rows = counts[source, owner, destination]
        if not rows:
            break
        busier = np.maximum(egress[source], ingress[destination])
        rail = int(np.lexsort((egress[source] + ingress[destination], busier))[0])
        moved[source, destination, owner, rail] = rows
        egress[source, rail] += rows
        ingress[destination, rail] += rows
    return Rails(moved, _same_index(nodes, ranks))


STRATEGIES: dict[str, Callable[[Array], Rails]] = {
    "balanced": balanced,
    "fixed": fixed,
    "fusco": fusco,
    "lpt": lpt,
}


def assign(counts: Array, strategy: str = "balanced") -> Rails:
    """Gives the rows that cross between nodes to rails.

    Args:
      counts: integer `[N, L, N]`, rows by source node, owner and destination node, zero where both
        nodes are the same.
      strategy: "balanced", "fixed", "fusco" or "lpt".

    Raises:
      TypeError, ValueError: an argument's type or value, named in the message.
    """
    counts = np.asarray(counts)
    if not np.issubdtype(counts.dtype, np.integer):
        raise TypeError(f"counts: got dtype {counts.dtype}, need an integer dtype")
    if counts.ndim != 3 or counts.shape[0] != counts.shape[2]:
        raise ValueError(f"counts: got shape {counts.shape}, need [nodes, ranks of a node, nodes]")
    if (counts < 0).any() or np.einsum("sls->sl", counts).any():
        raise ValueError(
            "counts: got negative rows, or rows to their own node, need rows that cross nodes"
        )
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}, need one of {', '.join(STRATEGIES)}")
    return STRATEGIES[strategy](counts.astype(np.int64))


def spread(load: Array) -> float:
    """The worst node's max/mean of a load [N, L] over its ranks; 1 where nothing moves.

    Rails cannot even out what differs between nodes, so nodes are judged one by one.
    """
    mean = load.mean(1)
    busy = mean > 0
    return float((load.max(1)[busy] / mean[busy]).max()) if busy.any() else 1.0


def _same_index(nodes: int, ranks: int) -> Array:
    return np.broadcast_to(np.arange(ranks), (nodes, nodes, ranks))


def _by_owner(counts: Array) -> Array:
    """[s, n, owner, rail] where each owner is its own rail."""
    return counts.transpose(0, 2, 1)[..., None] * np.eye(counts.shape[1], dtype=np.int64)
