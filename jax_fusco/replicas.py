"""Experts that lie where a placement says: ids to slots, and sums over the copies of an expert."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fusco.mesh import Axis, AxisName, checked_axes, expert_axis, unshard, vary
from jax_fusco.movers import make_integers
from jax_fusco.placement import Placement
from jax_fusco.reference import accumulation_dtype

Array = jax.Array


def check(placement: Placement, num_experts: int, ranks: int) -> None:
    """Whether `placement` is one layer's, for so many experts on so many ranks.

    Raises:
      TypeError, ValueError: it is not.
    """
    if not isinstance(placement, Placement):
        raise TypeError(
            f"placement: got {type(placement).__name__}, need a jax_fusco.Placement or None"
        )
    _check_layer(placement)
    if placement.num_ranks != ranks:
        raise ValueError(
            f"placement: got one for {placement.num_ranks} ranks, need one for the {ranks} "
            "ranks here"
        )
    if placement.num_experts != num_experts:
        raise ValueError(
            f"num_experts: got {num_experts}, need {placement.num_experts}, the experts of the "
            "placement"
        )
    slots = placement.expert_of_slot.shape[0]
    if slots < num_experts or slots % ranks:
        raise ValueError(
            f"placement: got {slots} slots, need those of all {ranks} ranks (into shard_map by "
            "PartitionSpec())"
        )


def _check_layer(placement: Placement) -> None:
    if placement.expert_of_slot.ndim != 1:
        raise ValueError(
            f"placement: got one for {placement.num_layers} layers, need that of one layer"
        )


@jax.named_scope("jax_fusco.make_plan.placement")
def slots_of(
    implementation: str, expert_ids: Array, placement: Placement, axis: Axis, ranks_per_node: int
) -> Array:
    """The slot in [0, R * S) of each assignment, int32 `[T, k]`; -1 for -1.

    Ids outside [-1, E) become some outside [-1, R * S). Of an expert's replicas those on this rank
    are taken, else those on this node, else all; the i-th assignment of the expert here goes to the
    (i + rank)-th of them in the order of slots, modulo their number.
    """
    ids = unshard(lax.stop_gradient(expert_ids))
    slots = unshard(lax.stop_gradient(jnp.asarray(placement.expert_of_slot)))
    experts, number = placement.num_experts, slots.shape[0]
    known = (ids >= 0) & (ids < experts)
    expert = jnp.where(known, ids, 0)
    if not ids.size:
        slot = ids
    elif number == experts:
        slot = jnp.zeros(experts, jnp.int32).at[slots].set(jnp.arange(number, dtype=jnp.int32))
        slot = slot[expert]
    else:
        rank = axis.rank()
        order, begin, copies = nearest(slots, experts, rank, axis.size, ranks_per_node)
        turn = _turns(implementation, jnp.where(known, ids, -1), expert, experts) + rank
        slot = order[begin[expert] + turn % jnp.maximum(copies, 1)[expert]]
    return jnp.where(known, slot, jnp.where(ids >= experts, jnp.maximum(ids, number), ids))


def nearest(
    slots: Array, experts: int, rank: Array, ranks: int, ranks_per_node: int
) -> tuple[Array, Array, Array]:
    """The nearest slots of every expert: `order[begin[e] : begin[e] + copies[e]]`, ascending."""
    owner = jnp.arange(slots.shape[0], dtype=jnp.int32) // (slots.shape[0] // ranks)
    far = (owner != rank).astype(jnp.int32)
    far += (owner // ranks_per_node != rank // ranks_per_node).astype(jnp.int32)
    # All three are tables of a few hundred numbers.
    least = jnp.full(experts, 2, jnp.int32).at[slots].min(far)
    expert = jnp.where(far == least[slots], slots, experts)
    order = jnp.argsort(expert, stable=True).astype(jnp.int32)
    copies = jnp.zeros(experts, jnp.int32).at[expert].add(1, mode="drop")
    return order, jnp.cumsum(copies, dtype=jnp.int32) - copies, copies


def slots_of_rank(
    placement: Placement, ids: np.ndarray, rank: int, ranks_per_node: int
) -> np.ndarray:
    """`slots_of` in NumPy, for the assignments `[T, k]` of one rank; -1 for ids outside [0, E)."""
    found = np.full(ids.shape, -1, np.int32)
    known = (ids >= 0) & (ids < placement.num_experts)
    expert = ids[known]
    by_expert = np.argsort(expert, kind="stable")
    number = np.bincount(expert, minlength=placement.num_experts)
    turn = np.empty(expert.size, np.int64)
    turn[by_expert] = np.arange(expert.size) - np.repeat(np.cumsum(number) - number, number)
    order, begin, copies = nearest_slots(placement, rank, ranks_per_node)
    found[known] = order[begin[expert] + (turn + rank) % copies[expert]]
    return found


def nearest_slots(placement: Placement, rank: int, ranks_per_node: int) -> tuple[np.ndarray, ...]:
    """`nearest` in NumPy."""
    slots, experts = np.asarray(placement.expert_of_slot), placement.num_experts
    owner = np.arange(len(slots)) // placement.num_slots
    far = (owner != rank) + 1 * (owner // ranks_per_node != rank // ranks_per_node)
    least = np.full(experts, 2)
    np.minimum.at(least, slots, far)
    near = np.flatnonzero(far == least[slots])
    copies = np.bincount(slots[near], minlength=experts)
    return near[np.argsort(slots[near], kind="stable")], np.cumsum(copies) - copies, copies


def _turns(implementation: str, ids: Array, expert: Array, experts: int) -> Array:
    """How many earlier assignments here have the same expert: the place in a plan for one rank.

    On CPU devices the engine counts them twice as fast as a running sum over eight replicated
    experts, and ten times as fast as a sort.
    """
    sizes, _, place, *_ = make_integers(
        implementation,
        ids,
        axis=Axis((), 1),
        num_experts=experts,
        capacity=ids.size,
        alignment=1,
    )
    return jnp.maximum(place - (jnp.cumsum(sizes, dtype=jnp.int32) - sizes)[expert], 0)


def sum_replicas(placement: Placement, gradients: Any, axis_name: AxisName) -> Any:
    """See `Placement.sum_replicas`."""
    _check_layer(placement)
    axis = expert_axis(axis_name)
    if axis.names and axis.size != placement.num_ranks:
        raise ValueError(
            f"axis_name: got {axis.size} ranks, need the {placement.num_ranks} of the placement"
        )
    here = placement.num_slots if axis.names else placement.num_slots * placement.num_ranks
    leaves, tree = jax.tree.flatten(gradients)
    leaves = list(map(jnp.asarray, leaves))
    for leaf in leaves:
        if not leaf.ndim or leaf.shape[0] != here:
            raise ValueError(
                f"gradients: got shape {leaf.shape}, need {here} slots in its first dimension"
            )
    if not placement.has_replicas or not leaves:
        return gradients
    group, number = _groups(placement)
    if not axis.names:
        return tree.unflatten([_sum_sharded(leaf, group, number) for leaf in leaves])
    group = lax.dynamic_slice_in_dim(group, axis.rank() * here, here)
    leaves = vary(leaves, checked_axes(axis))
    sums = lax.psum([_sum(leaf, group, number) for leaf in leaves], axis.names)
    return tree.unflatten(
        [_spread(leaf, total, group) for leaf, total in zip(leaves, sums, strict=True)]
    )


def _groups(placement: Placement) -> tuple[Array, int]:
    """A number for each expert that has copies, by slot `[R * S]`, and how many there may be.

    Slots of other experts have that number too: it is past the last.
    """
    slots, experts = jnp.asarray(placement.expert_of_slot), placement.num_experts
    most = min(slots.shape[0] - experts, experts)
    several = jnp.zeros(experts, jnp.int32).at[slots].add(1) > 1
    index = jnp.where(several, jnp.cumsum(several, dtype=jnp.int32) - 1, most)
    return index[slots], most


def _sum(gradient: Array, group: Array, number: int) -> Array:
    """`[number, ...]`: the sums over the slots of each group, in float32 or wider."""
    wide = accumulation_dtype(gradient.dtype)
    sums = jnp.zeros((number, *gradient.shape[1:]), wide)
    return sums.at[group].add(gradient.astype(wide), mode="drop")


def _spread(gradient: Array, sums: Array, group: Array) -> Array:
    """`gradient` with the sum of its group in each slot that has one."""
    several = (group < sums.shape[0]).reshape((-1,) + (1,) * (gradient.ndim - 1))
    total = sums[jnp.minimum(group, sums.shape[0] - 1)].astype(gradient.dtype)
    return jnp.where(several, total, gradient)


def _sum_sharded(gradient: Array, group: Array, number: int) -> Array:
    """All slots of one array, sharded or not."""

    def run(gradient: Array, group: Array) -> Array:
        return _spread(gradient, _sum(gradient, group, number), group)

    sharding = jax.typeof(gradient).sharding
    if all(part is None for part in sharding.spec):
        return run(gradient, group)
    # Explicit axes refuse to add and gather along a sharded axis; the same axes under Auto do not.
    under_auto: Any = jax.sharding.auto_axes(run, out_sharding=sharding)
    return under_auto(gradient, group)
