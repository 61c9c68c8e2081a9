"""The integers of a shuffle over several nodes, by the engine of CPU devices.

As `jax_fusco.two_level_plan` describes them. The ranks of a node plan together in one call for each
step, and a table crosses between nodes after each but the last.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_fusco import ffi
from jax_fusco.mesh import Axis
from jax_fusco.topology import Levels

Array = jax.Array


def plan(
    expert_ids: Array, *, levels: Levels, num_experts: int, capacity: int, alignment: int
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The integers in the order of the fields of `Plan`, and those of `Crossing`."""
    tokens, k = expert_ids.shape
    local, node = levels.local, levels.node
    nodes, ranks = node.size, local.size
    experts, here = num_experts // (nodes * ranks), node.rank()

    def call(name: str, axis: Axis, shapes: list[tuple[int, ...]], *operands: Array, **static: int):
        results = [(shape, jnp.int32) for shape in shapes]
        return ffi.call(f"crossing_{name}", axis, results, *operands, attributes=static)

    told = ranks * experts + 4  # counts, and what a node complains of
    num_invalid, wanted = call(
        "count", local, [(), (nodes, told)], here, expert_ids, num_experts=num_experts
    )
    group_sizes, expert_counts, num_dropped, granted = call(
        "lay_out",
        Axis((), 1),
        [(experts,), (experts,), (), (nodes, ranks, 2, experts)],
        node.all_to_all(wanted),
        capacity=capacity,
        alignment=alignment,
    )
    of_assignments, sent, of_tokens = (tokens, k), (nodes, tokens), (tokens, nodes)
    slot, slot_rank, owner_node, pack_rank, pack_token, rail, rail_row, letters = call(
        "place",
        local,
        [of_assignments] * 3 + [sent] * 2 + [of_tokens] * 2 + [(nodes, tokens + 1, k + 1)],
        here,
        expert_ids,
        node.all_to_all(granted),
        capacity=capacity,
    )
    deliver_rank, deliver_slot, from_rank, from_assignment, source_rank, source, most_rows = call(
        "deliver",
        local,
        [(nodes, tokens, k)] * 2 + [(capacity,)] * 4 + [()],
        node.all_to_all(letters),
        group_sizes,
    )
    integers = (group_sizes, expert_counts, slot, slot_rank, source_rank, source, num_dropped,
                num_invalid, jnp.zeros(0, jnp.int32))  # fmt: skip
    crossing = (owner_node, pack_rank, pack_token, rail, rail_row, deliver_rank, deliver_slot,
                from_rank, from_assignment, most_rows)  # fmt: skip
    return integers, crossing
