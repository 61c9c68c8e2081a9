"""The integers of a shuffle over several nodes, by the plan and the row movers of one level.

As `jax_fusco.two_level_plan` describes them, for any implementation and platform.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_fusco import rails, reference
from jax_fusco.mesh import Axis
from jax_fusco.movers import make_integers, run
from jax_fusco.plan import bits
from jax_fusco.topology import Levels

Array = jax.Array


def plan(
    implementation: str,
    expert_ids: Array,
    *,
    levels: Levels,
    num_experts: int,
    capacity: int,
    alignment: int,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The integers in the order of the fields of `Plan`, and those of `Crossing`."""
    with jax.named_scope("slots"):
        cells = _cells(implementation, expert_ids, levels, num_experts, capacity, alignment)
        owner_node = jnp.where(cells.slot >= 0, cells.slot_rank // levels.local.size, -1)
    with jax.named_scope("rails"):
        packed = _rails(implementation, owner_node, levels)
    with jax.named_scope("forwarders"):
        deliver_rank, deliver_slot, *origin = _forwarders(
            implementation, cells, packed, levels, capacity
        )
        from_rank, from_assignment, source_rank, source, most_rows = origin
    integers = (
        cells.group_sizes,
        cells.expert_counts,
        cells.slot,
        cells.slot_rank,
        source_rank,
        source,
        cells.num_dropped,
        cells.num_invalid,
        jnp.zeros(0, jnp.int32),  # a chain is for plans of one level
    )
    crossing = (
        owner_node,
        packed.pack_rank,
        packed.pack_token,
        packed.rail,
        packed.rail_row,
        deliver_rank,
        deliver_slot,
        from_rank,
        from_assignment,
        most_rows,
    )
    return integers, crossing


def _of_each_rank(implementation: str, table: Array, levels: Levels) -> Array:
    """`[L, ...]`: what each rank of the node has for this one in its `table [L, ...]`.

    An `all_to_all` that the engine does, not the library that connects the nodes.
    """
    ranks = levels.local.size
    (found,) = run(
        implementation,
        "gather_rows",
        (table,),
        jnp.arange(ranks, dtype=jnp.int32),
        jnp.broadcast_to(levels.local.rank(), ranks),
        axis=levels.local,
        fanout=1,
        zero_tail=True,
    )
    return found


@dataclasses.dataclass(frozen=True)
class _Cells:
    """The flat plan's half that needs counts alone."""

    group_sizes: Array
    expert_counts: Array
    slot: Array
    slot_rank: Array
    num_dropped: Array
    num_invalid: Array


def _cells(
    implementation: str,
    ids: Array,
    levels: Levels,
    num_experts: int,
    capacity: int,
    alignment: int,
) -> _Cells:
    """Slots of the assignments: a cell's begin comes from its owner, the place in it from here."""
    nodes, ranks = levels.node.size, levels.local.size
    # The rank's own assignments by expert, which is a plan for one rank.
    alone = Axis((), 1)
    _, counts, place, _, _, _, _, num_invalid, _ = make_integers(
        implementation, ids, axis=alone, num_experts=num_experts, capacity=ids.size, alignment=1
    )
    expert = jnp.where(place >= 0, ids, 0)
    place_in_cell = place - (jnp.cumsum(counts, dtype=jnp.int32) - counts)[expert]

    table = _of_each_rank(implementation, counts.reshape(nodes, ranks, -1).swapaxes(0, 1), levels)
    table = levels.node.all_to_all(table.swapaxes(0, 1))
    wanted = table.reshape(nodes * ranks, -1).T  # [E_local, R]
    kept = reference.water_fill(wanted, capacity, alignment)
    begin, expert_counts, group_sizes = reference.lay_out(kept, alignment)

    answer = jnp.stack([begin, kept]).transpose(2, 0, 1).reshape(nodes, ranks, 2, -1)
    answer = levels.node.all_to_all(answer).swapaxes(0, 1)
    answer = _of_each_rank(implementation, answer, levels)
    begin, limit = answer.transpose(2, 1, 0, 3).reshape(2, num_experts)
    placed = (place >= 0) & (place_in_cell < limit[expert])
    owner = expert // (num_experts // (nodes * ranks))
    return _Cells(
        group_sizes,
        expert_counts,
        jnp.where(placed, begin[expert] + place_in_cell, -1),
        jnp.where(placed, owner, -1),
        jnp.sum(wanted - kept, dtype=jnp.int32),
        num_invalid,
    )


@dataclasses.dataclass(frozen=True)
class _Rails:
    """As in `Crossing`; `most_rows` of this node."""

    pack_rank: Array
    pack_token: Array
    rail: Array
    rail_row: Array
    most_rows: Array


def _rails(implementation: str, owner_node: Array, levels: Levels) -> _Rails:
    """Rows for other nodes, given to rails in turn."""
    nodes, ranks, tokens = levels.node.size, levels.local.size, owner_node.shape[0]
    node = jnp.arange(nodes, dtype=jnp.int32)[None]
    here, local = levels.node.rank(), levels.local.rank()
    visits = (owner_node[:, :, None] == node[None]).any(1) & (node != here)  # [T, N]
    counted = visits.astype(jnp.int32)
    mine = counted.sum(0, dtype=jnp.int32)
    of_owners = _of_each_rank(implementation, jnp.broadcast_to(mine, (ranks, nodes)), levels)
    earlier = jnp.arange(ranks)[:, None] < local
    position = jnp.where(earlier, of_owners, 0).sum(0, dtype=jnp.int32)
    position = position[None] + jnp.cumsum(counted, 0, dtype=jnp.int32) - counted
    rail = rails.balanced_rail(position, here, node, ranks)
    # Rows by rail, node, owner and token: what the engine plans where a rail's nodes are experts.
    sizes, _, _, _, source_rank, source, *_ = make_integers(
        implementation,
        jnp.where(visits, rail * nodes + node, -1),
        axis=levels.local,
        num_experts=ranks * nodes,
        capacity=(nodes - 1) * tokens,
        alignment=1,
    )
    row = jnp.arange(tokens, dtype=jnp.int32)[None]
    at = (jnp.cumsum(sizes, dtype=jnp.int32) - sizes)[:, None] + row
    filled = row < sizes[:, None]
    at = jnp.minimum(at, source.size - 1)
    return _Rails(
        jnp.where(filled, source_rank[at], -2),
        jnp.where(filled, source[at] // nodes, -2),
        jnp.where(visits, rail, -1),
        jnp.where(visits, position // ranks, -1),
        -(-of_owners.sum(0, dtype=jnp.int32).max() // ranks),
    )


def _forwarders(
    implementation: str, cells: _Cells, packed: _Rails, levels: Levels, capacity: int
) -> tuple[Array, ...]:
    """Tells forwarders the slots of the rows they get, and ranks where their rows lie.

    Returns:
      deliver_rank, deliver_slot, from_rank, from_assignment (as in `Crossing`), source_rank, source
      (as in `Plan`), most_rows (of all nodes).
    """
    (nodes, tokens), k = packed.pack_token.shape, cells.slot.shape[1]
    ranks, local, here = levels.local.size, levels.local.rank(), levels.node.rank()
    node = jnp.arange(nodes, dtype=jnp.int32)[:, None]
    mine = node == here
    owner = jnp.where(mine, local, packed.pack_rank).reshape(-1)
    token = jnp.where(mine, jnp.arange(tokens, dtype=jnp.int32)[None], packed.pack_token).reshape(
        -1
    )
    # Node, rank and slot of an assignment in the bits of one number: no division takes them apart.
    slot_bits, rank_bits = bits(capacity), bits(ranks)
    rank = cells.slot_rank // ranks << rank_bits | cells.slot_rank % ranks
    address = jnp.where(cells.slot >= 0, rank << slot_bits | cells.slot, -1)
    (address,) = run(
        implementation,
        "gather_rows",
        (address,),
        owner,
        token,
        axis=levels.local,
        fanout=1,
        zero_tail=True,
    )
    address = address.reshape(nodes, tokens, k)
    inside = slot_bits + rank_bits
    wanted = (token.reshape(nodes, tokens, 1) >= 0) & (address >> inside == node[:, :, None])
    target = jnp.where(wanted, address & ((1 << inside) - 1), -1)
    sender = jnp.where(token >= 0, owner * tokens + token, -1).reshape(nodes, tokens, 1)
    letters = jnp.concatenate([target, sender], 2)
    # One letter more in each block: the most rows that a rail here sends to another node.
    most_rows = jnp.broadcast_to(packed.most_rows, (nodes, 1, k + 1))
    letters = levels.node.all_to_all(jnp.concatenate([letters, most_rows], 1))
    letters, most_rows = letters[:, :-1], letters[:, -1].max()

    target = letters[:, :, :k]
    deliver_rank = target >> slot_bits  # arithmetic: -1 stays -1
    deliver_slot = jnp.where(target >= 0, target & ((1 << slot_bits) - 1), -1)
    # The assignments that come to me, in any order: a plan where each rank is one expert. Then each
    # to its slot.
    *_, from_rank, from_assignment, _, _, _ = make_integers(
        implementation,
        deliver_rank.reshape(-1, k),
        axis=levels.local,
        num_experts=ranks,
        capacity=capacity,
        alignment=1,
    )
    sender = jnp.broadcast_to(letters[:, :, k:], target.shape)
    (arrival,) = run(
        implementation,
        "gather_rows",
        (jnp.stack([deliver_slot.reshape(-1), sender.reshape(-1)], 1),),
        from_rank,
        from_assignment,
        axis=levels.local,
        fanout=1,
        zero_tail=True,
    )
    number = jnp.arange(capacity, dtype=jnp.int32)
    at = jnp.where(from_assignment >= 0, arrival[:, 0], capacity)
    number = jnp.full(capacity, -1, jnp.int32).at[at].set(number, mode="drop")
    filled = number >= 0
    number = jnp.maximum(number, 0)
    empty = jnp.where(jnp.arange(capacity) < cells.group_sizes.sum(), -1, -2)
    from_rank, from_assignment = from_rank[number], from_assignment[number]
    sender = arrival[:, 1][number]
    source_rank = from_assignment // (tokens * k) * ranks + sender // tokens
    source = sender % tokens * k + from_assignment % k
    results = (from_rank, from_assignment, source_rank, source)
    results = (jnp.where(filled, x, empty) for x in results)
    return deliver_rank, deliver_slot, *results, most_rows
