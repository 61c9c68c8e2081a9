"""The integers of a shuffle over several nodes: the flat plan, and how rows cross between nodes.

No rank sees the whole routing. Counts go to the ranks that own the experts, which answer with where
each cell begins; a third exchange tells each forwarder the slots of the rows that it will receive.
Between nodes all three are `all_to_all` over the node axis; inside a node the engine plans.

N nodes of L ranks; rank = node * L + local. A token crosses to a node once, on a rail: row i of
those from node s to node n, in the order of owner and token, takes rail `(i + s + n) % L` and is
row `i // L` there (`jax_fusco.rails.balanced`; FUSCO's balancer, arXiv 2512.22036, pairs ranks
instead). The rail of node n with the same local index receives it: the forwarder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jax_fusco import crossing, crossing_reference
from jax_fusco.ffi import may_run_on_gpu
from jax_fusco.mesh import Axis, checked_axes, unshard, vary, varying_axes
from jax_fusco.plan import Crossing, bits
from jax_fusco.topology import Levels, Topology

Array = jax.Array


def plan(
    implementation: str,
    expert_ids: Array,
    topology: Topology,
    *,
    axis: Axis,
    num_experts: int,
    capacity: int,
    alignment: int,
) -> tuple[tuple[Array, ...], Crossing]:
    """The integers of the flat plan, in the order of the fields of `Plan`, and the crossing."""
    levels, ids = Levels.of(topology), unshard(expert_ids)
    nodes, ranks = levels.node.size, levels.local.size
    if nodes << bits(capacity) + bits(ranks) > 2**31:
        raise ValueError(
            f"capacity: got {capacity} rows on each of {axis.size} ranks, need fewer than 2**31 "
            "in all (each factor rounded up to a power of two) where rows cross nodes"
        )
    if max(nodes, ranks) * ids.size >= 2**31:
        raise ValueError(
            f"expert_ids: got shape {ids.shape}, need fewer than 2**31 assignments where "
            f"{max(nodes, ranks)} times as many cross nodes"
        )
    found = _integers(
        implementation,
        ids,
        levels=levels,
        num_experts=num_experts,
        capacity=capacity,
        alignment=alignment,
    )
    integers, rest = vary(found, varying_axes(expert_ids) | checked_axes(axis))
    return integers, Crossing(*rest, topology=topology)


def _integers(implementation: str, ids: Array, **static: Any) -> Any:
    """By the engine of CPU devices in one call a step, or from the movers."""

    def composed(movers: str) -> Callable[[Array], Any]:
        return functools.partial(crossing_reference.plan, movers, **static)

    engine = functools.partial(crossing.plan, **static)
    if implementation == "platform":
        return lax.platform_dependent(ids, cpu=engine, default=composed("xla"))
    if implementation == "fused" and may_run_on_gpu():
        return lax.platform_dependent(ids, cpu=engine, default=composed("fused"))
    return (engine if implementation == "fused" else composed("xla"))(ids)
