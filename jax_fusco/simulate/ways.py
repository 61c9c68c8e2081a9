"""What each way to shuffle asks of the links: dispatch and combine, as phases of stages.

How often each pass touches a row follows the dispatchers that FUSCO's authors published beside
their results (github.com/infinigence/FUSCO, tests): NCCL and DeepEP inside Megatron's token
dispatchers, FUSCO as one exchange between nodes, then one inside them. "touches" are rows read plus
rows written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jax_fusco.simulate.cluster import Cluster
from jax_fusco.simulate.network import Chain, Stage, Transfer, duration
from jax_fusco.simulate.traffic import Traffic

Array = np.ndarray
Phases = list[list[Chain]]


class Links:
    """The links of a cluster with classes of nodes, and stages over them.

    Link classes: for each class of nodes a GPU's share of the NICs out, in, its NVLink and its
    memory; and the network's core.
    """

    def __init__(self, traffic: Traffic, cluster: Cluster, row_bytes: float) -> None:
        self.traffic, self.cluster, self.row_bytes = traffic, cluster, row_bytes
        self.classes = len(traffic.count)
        nic = cluster.nic * cluster.nics_per_node / cluster.gpus_per_node
        core = nic * cluster.gpus / cluster.oversubscription
        rates = np.repeat([nic, nic, cluster.nvlink, cluster.copy], self.classes)
        self.capacity = np.append(rates, core) * 1e9

    def _usage(self, **shares: tuple[int, float]) -> Array:
        usage = np.zeros(4 * self.classes + 1)
        for kind, (which, number) in shares.items():
            usage[("out", "in_", "nvlink", "memory").index(kind) * self.classes + which] = number
        return usage

    def _near(self, rows: Array) -> list[Transfer]:
        share = (self.cluster.gpus_per_node - 1) / self.cluster.gpus_per_node
        return [
            Transfer(self._usage(nvlink=(a, 1)), rows[a] * share * self.row_bytes)
            for a in range(self.classes)
        ]

    def _touch(self, touches: Array) -> list[Transfer]:
        return [
            Transfer(self._usage(memory=(a, 1)), touches[a] * self.row_bytes)
            for a in range(self.classes)
        ]

    def _far(self, matrix: Array, back: bool, size: float) -> list[Transfer]:
        matrix = matrix.T if back else matrix
        count, transfers = self.traffic.count, []
        for a in range(self.classes):
            for b in range(self.classes):
                others, sources = count[b] - (a == b), count[a] - (a == b)
                usage = self._usage(out=(a, others), in_=(b, sources))
                usage[-1] = count[a] * others * self.cluster.gpus_per_node
                if others and sources and matrix[a, b]:
                    transfers.append(Transfer(usage, matrix[a, b] * self.row_bytes * size))
        return transfers

    def wire(self, matrix: Array, back: bool = False, size: float = 1.0) -> Stage:
        """Rails send rows to the same rail of the other nodes, one message to each."""
        latency = (self.cluster.nodes - 1) * self.cluster.nic_latency
        return Stage("wire", tuple(self._far(matrix, back, size)), latency * 1e-6)

    def direct(self, matrix: Array, back: bool = False) -> Stage:
        """Every rank sends to every other, over NVLink to those of its node."""
        c = self.cluster
        latency = (c.nodes - 1) * c.gpus_per_node * c.nic_latency
        latency += (c.gpus_per_node - 1) * c.nvlink_latency
        near = self._near(np.diagonal(matrix))
        return Stage("direct", tuple(self._far(matrix, back, 1.0) + near), latency * 1e-6)

    def near(self, rows: Array, touches: Array | None = None) -> Stage:
        """Ranks of a node exchange `rows` each, and touch rows of their memory meanwhile."""
        latency = (self.cluster.gpus_per_node - 1) * self.cluster.nvlink_latency
        extra = self._touch(touches) if touches is not None else []
        return Stage("near", tuple(self._near(rows) + extra), latency * 1e-6)

    def copy(self, touches: Array) -> Stage:
        """A pass over a GPU's own memory."""
        return Stage("copy", tuple(self._touch(touches)))


def _in_turn(*stages: Stage) -> Phases:
    return [[Chain((stage,))] for stage in stages]


def nccl(links: Links) -> Phases:
    """One row an assignment; sort and pack, exchange, sort; back: sort, exchange, weight, sum."""
    t = links.traffic
    out, come = t.sent(t.rows), t.received(t.rows)
    return _in_turn(
        links.copy(2 * out),
        links.direct(t.rows),
        links.copy(2 * come),
        links.copy(2 * come),
        links.direct(t.rows, back=True),
        links.copy(6 * out),  # zeros, a permuted copy, products, sums
    )


def deepep(links: Links) -> Phases:
    """Once to each node, once to each rank; then a copy for each expert, summed in float32."""
    t = links.traffic
    come, pairs = t.received(t.rows), t.received(t.pairs)
    return _in_turn(
        links.wire(t.tokens),
        links.near(pairs),
        links.copy(2 * come),
        links.copy(9 * come + 5 * pairs),  # float32 products and atomic sums
        links.near(pairs),
        links.wire(t.tokens, back=True),
    )


def fusco(links: Links, strategy: str = "fusco", passes: bool = False) -> Phases:
    """Once to each node, then one row an assignment; the layout changes on the way.

    Args:
      links: the cluster and its traffic.
      strategy: how rails are paired; "fixed" is FUSCO without its balancer.
      passes: FUSCO without its engine: each exchange is bracketed by copies.
    """
    t = links.traffic
    tokens = t.tokens * t.spread.get(strategy, 1.0)
    come, forwarded, out = t.received(t.rows), t.received(t.tokens), t.sent(t.tokens)
    there = [links.wire(tokens), links.near(come)]
    back = [
        links.near(come),
        links.copy(3 * come + forwarded),  # products, sums over a node's experts
        links.wire(tokens, back=True),
        links.copy(out),
    ]
    if passes:
        there = [
            links.copy(2 * out),
            there[0],
            links.copy(2 * come),
            there[1],
            links.copy(2 * come),
        ]
        back = [links.copy(2 * come), back[0], links.copy(2 * come), *back[1:3]]
        back += [links.copy(2 * out), links.copy(out)]
    return _in_turn(*there, *back)


def no_engine(links: Links) -> Phases:
    """FUSCO with separate permutations."""
    return fusco(links, passes=True)


def no_planner(links: Links) -> Phases:
    """FUSCO's engine with one row an assignment straight to its rank."""
    t = links.traffic
    back = links.direct(t.rows, back=True)
    return _in_turn(links.direct(t.rows), back, links.copy(3 * t.sent(t.rows)))


def no_balancer(links: Links) -> Phases:
    """FUSCO with fixed rails."""
    return fusco(links, strategy="fixed")


def ours(links: Links, slices: int = 1, wire_size: float = 1.0) -> Phases:
    """Rails pull, slices cross while others are forwarded, each rank reads a token once.

    Args:
      links: the cluster and its traffic.
      slices: of the exchange; each pays every latency again.
      wire_size: bytes of a partial sum over bytes of a row.
    """
    t = links.traffic
    tokens = t.tokens * t.spread.get("balanced", 1.0)
    own_pairs, own_rows = np.diagonal(t.pairs), np.diagonal(t.rows)
    out, come = t.crossing(t.tokens), t.received(t.tokens) - np.diagonal(t.tokens)
    pairs, rows = t.received(t.pairs) - own_pairs, t.received(t.rows) - own_rows
    there = (
        links.near(out, 2 * out),
        links.wire(tokens),
        links.near(pairs, pairs + rows),
    )
    back = (
        links.near(rows, rows + come * wire_size),
        links.wire(tokens, back=True, size=wire_size),
        links.near(out * wire_size, 2 * out * wire_size),
    )
    at_home = [
        Chain((links.near(own_pairs, own_pairs + own_rows),)),
        Chain((links.near(own_rows, own_rows),)),
    ]
    if links.cluster.nodes == 1:
        return [[chain] for chain in at_home]
    return [[Chain(there, slices), at_home[0]], [Chain(back, slices), at_home[1]]]


SLICES = (1, 2, 4, 8, 16)


def best_slices(links: Links, wire_size: float = 1.0) -> tuple[int, float]:
    """(slices, seconds) of the number of slices that is fastest."""
    times = {s: duration(ours(links, s, wire_size), links.capacity) for s in SLICES}
    best = min(times, key=lambda s: times[s])
    return best, times[best]


WAYS: Mapping[str, Callable[[Links], Phases]] = {
    "NCCL": nccl,
    "DeepEP": deepep,
    "FUSCO": fusco,
    "no engine": no_engine,
    "no planner": no_planner,
    "no balancer": no_balancer,
}


def seconds(name: str, traffic: Traffic, cluster: Cluster, row_bytes: float) -> float:
    """Time of one dispatch and combine; "ours" with the best number of slices."""
    links = Links(traffic, cluster, row_bytes)
    if name == "ours":
        return best_slices(links)[1]
    if name == "ours, float32 back":
        return best_slices(links, 2.0)[1]
    return duration(WAYS[name](links), links.capacity)


def table(
    names: Sequence[str], traffic: Traffic, cluster: Cluster, row_bytes: float
) -> dict[str, float]:
    """Milliseconds by way."""
    return {name: 1e3 * seconds(name, traffic, cluster, row_bytes) for name in names}
