"""The ledger: rows and bytes that a routing moves over each class of link, for five ways to move.

Everything is counted for one dispatch, in NumPy; combine is its mirror image. N nodes of L ranks,
T tokens per rank, k experts per token; a row is one token's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_fusco import rails, replicas
from jax_fusco.placement import Placement
from jax_fusco.plan import experts_per_rank, whole
from jax_fusco.topology import Topology

Array = np.ndarray

LINKS = {"rank": "inside a rank", "node": "inside a node", "wire": "between nodes"}
WAYS = {
    "flat": "each token once to each rank that has an expert of it",
    "ring": "all-gather: every token to every rank",
    "padded": "all_to_all of one row an assignment, slices padded to the largest",
    "fusco": "each token once to each node (Algorithm 1), then one row an assignment",
    "ours": "each token once to each node on balanced rails, in slices; then once to each rank",
}


@dataclasses.dataclass(frozen=True)
class Way:
    """What one way to move the rows puts on the links.

    Attributes:
      rows: by class of link ("rank", "node", "wire"); those between nodes without padding.
      padding: rows that cross between nodes and hold nothing.
      egress, ingress: rows over each rank's link between nodes, padding included, `[R]`.
      received: rows that come to each rank from other ranks, padding included, `[R]`.
    """

    rows: Mapping[str, int]
    padding: int
    egress: Array
    ingress: Array
    received: Array

    @property
    def wire(self) -> int:
        """Rows between nodes, padding included."""
        return self.rows["wire"] + self.padding


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Rows of one dispatch; `row_bytes` turns them into bytes.

    Attributes:
      nodes, ranks_per_node, tokens, row_bytes, slice_rows: N, L, T, and as given.
      assignments: (token, expert) pairs with a valid expert.
      rank_rows: (token, rank) pairs that hold at least one of them.
      node_rows: (token, node) pairs that do.
      lower_bound: (token, node) pairs off the token's node: no way can cross less.
      num_invalid: ids outside [-1, num_experts).
      ways: by name, see `WAYS`.
    """

    nodes: int
    ranks_per_node: int
    tokens: int
    row_bytes: int
    slice_rows: int
    assignments: int
    rank_rows: int
    node_rows: int
    lower_bound: int
    num_invalid: int
    ways: Mapping[str, Way]


def ledger(
    expert_ids: Any,
    topology: Topology | tuple[int, int],
    *,
    num_experts: int,
    row_bytes: int,
    slice_rows: int | None = None,
    axis_sizes: Mapping[str, int] | None = None,
    placement: Placement | None = None,
) -> Ledger:
    """Counts what a routing moves over each class of link.

    Args:
      expert_ids: integer `[R, T, k]`, each rank's routing; -1 for none.
      topology: a `Topology` (of two axes, with `axis_sizes`; or of one axis), or `(N, L)`.
      num_experts: experts over all ranks, a multiple of R.
      row_bytes: bytes of one token's row.
      slice_rows: rows of each slice that a rail sends to each node; None: `ceil(T / 16)`.
      axis_sizes: `mesh.shape`.
      placement: where the experts lie, as for `make_plan`; of replicas it counts those that a plan
        chooses.

    Raises:
      TypeError, ValueError: an argument's type or value, named in the message.
    """
    ids = np.asarray(expert_ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"expert_ids: got dtype {ids.dtype}, need an integer dtype")
    if ids.ndim != 3 or not ids.shape[0]:
        raise ValueError(
            f"expert_ids: got shape {ids.shape}, need [ranks, tokens, experts per token]"
        )
    nodes, local = _shape(topology, ids.shape[0], axis_sizes)
    if nodes * local != ids.shape[0]:
        raise ValueError(
            f"expert_ids: got {ids.shape[0]} ranks, need {nodes * local} ({nodes} nodes of {local})"
        )
    num_experts = whole("num_experts", num_experts, 1)
    row_bytes = whole("row_bytes", row_bytes, 1)
    num_invalid = int(((ids < -1) | (ids >= num_experts)).sum())
    if placement is None:
        here = experts_per_rank(num_experts, nodes * local)
    else:
        replicas.check(placement, num_experts, nodes * local)
        here = placement.num_slots
        ids = np.stack(
            [replicas.slots_of_rank(placement, own, rank, local) for rank, own in enumerate(ids)]
        )
    if slice_rows is None:
        slice_rows = max(1, -(-ids.shape[1] // 16))
    slice_rows = whole("slice_rows", slice_rows, 1)
    count = Counts(ids, nodes, local, here)
    own = np.einsum("sls->", count.visits)
    return Ledger(
        nodes=nodes,
        ranks_per_node=local,
        tokens=ids.shape[1],
        row_bytes=row_bytes,
        slice_rows=slice_rows,
        assignments=int(count.assignments.sum()),
        rank_rows=int(count.pairs.sum()),
        node_rows=int(count.visits.sum()),
        lower_bound=int(count.visits.sum() - own),
        num_invalid=num_invalid,
        ways={
            "flat": _direct(count.pairs, nodes),
            "ring": _ring(nodes, local, ids.shape[1]),
            "padded": _padded(count.assignments, nodes),
            "fusco": _fusco(count),
            "ours": _ours(count, slice_rows),
        },
    )


def _shape(
    topology: Topology | tuple[int, int], ranks: int, sizes: Mapping[str, int] | None
) -> tuple[int, int]:
    if isinstance(topology, Topology):
        if sizes is not None:
            return topology.shape(sizes)
        local = topology.ranks_per_node
        if local is None:
            raise ValueError("axis_sizes: got None, need mesh.shape for a topology of two axes")
        if ranks % local:
            raise ValueError(
                f"expert_ids: got {ranks} ranks, need a multiple of the {local} ranks of a node"
            )
        return ranks // local, local
    if not isinstance(topology, tuple) or len(topology) != 2:
        raise TypeError(f"topology: got {topology!r}, need a Topology or (nodes, ranks of a node)")
    return whole("topology", topology[0], 1), whole("topology", topology[1], 1)


class Counts:
    """Who needs what of whom.

    Attributes:
      assignments, pairs: [R, R] rows from a source rank to a destination rank, for each assignment
        and once a token.
      visits: [N, L, N] rows from a source rank to a node, once a token.
      crossing: the same without a token's own node.
      forwards: [L, R] rows that rail l of any node, on balanced rails, hands on to each rank.
    """

    def __init__(self, ids: Array, nodes: int, local: int, here: int) -> None:
        ranks, tokens, _ = ids.shape
        self.nodes, self.local = nodes, local
        self.assignments = np.zeros((ranks, ranks), np.int64)
        self.pairs = np.zeros((ranks, ranks), np.int64)
        visits = np.zeros((ranks, nodes), np.int64)
        self.forwards = np.zeros((local, ranks), np.int64)
        seen = np.zeros((nodes, nodes), np.int64)  # rows so far from a node to a node
        for source in range(ranks):
            valid = (ids[source] >= 0) & (ids[source] < here * ranks)
            owner = np.where(valid, ids[source] // here, ranks)
            self.assignments[source] = np.bincount(owner.ravel(), minlength=ranks + 1)[:ranks]
            hit = np.zeros((tokens, ranks + 1), bool)
            np.put_along_axis(hit, owner, True, axis=1)
            hit = hit[:, :ranks]
            self.pairs[source] = hit.sum(0)
            by_node = hit.reshape(tokens, nodes, local)
            visit = by_node.any(2)
            visits[source] = visit.sum(0)
            home = source // local
            position = visit.cumsum(0) - 1 + seen[home]
            rail = rails.balanced_rail(position, home, np.arange(nodes), local)
            rail = np.where(visit & (np.arange(nodes) != home), rail, local)
            for index in range(local):
                through = (by_node & (rail == index)[:, :, None]).sum(0)
                self.forwards[index] += through.reshape(-1)
            seen[home] += visits[source]
        self.visits = visits.reshape(nodes, local, nodes)
        self.crossing = self.visits.copy()
        self.crossing[np.arange(nodes), :, np.arange(nodes)] = 0


def _same_node(nodes: int, ranks: int) -> Array:
    node = np.arange(ranks) // (ranks // nodes)
    return node[:, None] == node[None, :]


def _by_link(pairs: Array, nodes: int) -> dict[str, int]:
    inside = int(np.trace(pairs))
    near = int(pairs[_same_node(nodes, len(pairs))].sum())
    return {"rank": inside, "node": near - inside, "wire": int(pairs.sum()) - near}


def _direct(pairs: Array, nodes: int, real: Array | None = None) -> Way:
    """Rows straight from rank to rank; `real` are those of them that hold something."""
    real = pairs if real is None else real
    far = np.where(_same_node(nodes, len(pairs)), 0, pairs)
    rows = _by_link(real, nodes)
    received = pairs.sum(0) - pairs.diagonal()
    return Way(rows, int(far.sum()) - rows["wire"], far.sum(1), far.sum(0), received)


def _padded(assignments: Array, nodes: int) -> Way:
    return _direct(np.full_like(assignments, assignments.max()), nodes, assignments)


def _ring(nodes: int, local: int, tokens: int) -> Way:
    """Each rank hands R - 1 blocks of T rows to the next; the last rank of a node to another."""
    ranks = nodes * local
    hops = np.full(ranks, (ranks - 1) * tokens, np.int64)
    last = (np.arange(ranks) % local == local - 1) & (nodes > 1)
    egress = np.where(last, hops, 0)
    rows = {"rank": ranks * tokens, "node": int((hops - egress).sum()), "wire": int(egress.sum())}
    return Way(rows, 0, egress, np.roll(egress, 1), hops)


def _fusco(count: Counts) -> Way:
    """Owners send to the forwarder of their position, and forwarders one row an assignment."""
    nodes, local = count.nodes, count.local
    plan = rails.fusco(count.crossing)
    sent = count.assignments.reshape(nodes, local, nodes, local)
    handed = np.zeros((nodes, local, local), np.int64)  # node, forwarder, rank
    for source in range(nodes):
        for destination in range(nodes):
            forwarder = plan.forwarder[source, destination]
            if source == destination:
                forwarder = np.arange(local)
            np.add.at(handed[destination], forwarder, sent[source, :, destination])
    return _two_level(count, plan, handed, np.zeros((nodes, local), np.int64), 0)


def _ours(count: Counts, slice_rows: int) -> Way:
    """Rails pull, send in slices of one size for all pairs, and forwarders serve each rank once."""
    nodes, local = count.nodes, count.local
    plan = rails.balanced(count.crossing)
    handed = count.forwards.reshape(local, nodes, local).transpose(1, 0, 2).copy()
    near = count.pairs.reshape(nodes, local, nodes, local)
    for node in range(nodes):  # tokens of this node's own ranks
        handed[node] += near[node, :, node]
    slices = -(-int(plan.sent.max(initial=0)) // slice_rows)
    return _two_level(count, plan, handed, plan.pulled, slices * slice_rows)


def _two_level(count: Counts, plan: rails.Rails, handed: Array, pulled: Array, buffer: int) -> Way:
    """`buffer`: rows that each rail sends to each other node, or 0 for as many as there are."""
    nodes, local = count.nodes, count.local
    egress, ingress = plan.egress.reshape(-1), plan.ingress.reshape(-1)
    wire = int(egress.sum())
    if buffer:
        egress = ingress = np.full(nodes * local, (nodes - 1) * buffer, np.int64)
    stays = np.einsum("nll->nl", handed)
    moved_in = (handed.sum(1) - stays + pulled).reshape(-1)
    # FUSCO's engine sends rows from where they lie; a collective wants them packed, own ones too.
    packed = int(plan.egress.sum() - pulled.sum()) if buffer else 0
    rows = {
        "rank": int(stays.sum()) + packed,
        "node": int(moved_in.sum()),
        "wire": wire,
    }
    return Way(rows, int(egress.sum()) - wire, egress, ingress, moved_in + ingress)
