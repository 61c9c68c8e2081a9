"""Shuffles of one row per (token, rank): the experts of a rank share a token's row.

`make_plan(..., rows="token")`. The plan of the rows is a shuffle in which each rank is one expert;
the plan of the assignments is local, over the rows that came. Occult's index matrices (arXiv
2505.13345) link the same three states of a token.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from jax_fusco import checks, movers, primitive
from jax_fusco.mesh import Axis, checked_axes, unshard, vary, varying_axes
from jax_fusco.plan import PLAN_NAME, Plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TokenPlan:
    """Where a token's row goes, once to each rank with an expert of it. A pytree, per rank, int32.

    C rows in the receive buffer, A assignments on this rank.

    Attributes:
      rows: the plan of the rows; each rank is its one group.
      group_sizes: assignments of each local expert, padded to the alignment.
      expert_counts: without padding.
      source: the row of each assignment in expert-major order, negative where there is none.
      choice: its j, the place among the token's experts.
      num_dropped: assignments to this rank's experts that found no room, their row's included.
      num_experts: static, as given; with a placement the number of its slots.
    """

    rows: Plan
    group_sizes: Int32[Array, " E_local"]
    expert_counts: Int32[Array, " E_local"]
    source: Int32[Array, " A"]
    choice: Int32[Array, " A"]
    num_dropped: Int32[Array, ""]
    num_experts: int = dataclasses.field(metadata={"static": True})

    @property
    def num_invalid(self) -> Int32[Array, ""]:
        """Ids outside [-1, num_experts) in this rank's own `expert_ids`."""
        return self.rows.num_invalid

    @property
    def capacity(self) -> int:
        """Rows of the receive buffer, C."""
        return self.rows.capacity

    def local_weights(self, weights: Float[Array, "T k"]) -> Float[Array, " A"]:
        """The weight of each assignment here, zero where there is none. Differentiable.

        Raises:
          TypeError, ValueError: `weights` is no floating array of the shape of the `expert_ids`.
        """
        from jax_fusco import api

        weights = checks.weights(weights, self.rows.slot.shape)
        return self.weights_of(api.dispatch(weights, self.rows))

    def weights_of(self, dispatched: Float[Array, "C k"]) -> Float[Array, " A"]:
        """`local_weights`, of weights that were dispatched together with the rows."""
        row, choice = jnp.maximum(self.source, 0), jnp.maximum(self.choice, 0)
        return jnp.where(self.source >= 0, dispatched[row, choice], 0)


def owners(expert_ids: Array, axis: Axis, num_experts: int) -> Array:
    """`[T, k]`: the rank of each assignment, -1 where an earlier j of the token goes there too.

    Invalid ids stay as they are.
    """
    k = expert_ids.shape[1]
    valid = (expert_ids >= 0) & (expert_ids < num_experts)
    owner = jnp.where(valid, expert_ids // (num_experts // axis.size), -1)
    same = owner[:, :, None] == owner[:, None, :]  # [T, j, i]
    again = (same & jnp.tri(k, k=-1, dtype=bool)[None]).any(2)
    return jnp.where(valid, jnp.where(again, -1, owner), expert_ids)


def make_token_plan(
    expert_ids: Array, rows: Plan, axis: Axis, num_experts: int, assignments: int, alignment: int
) -> TokenPlan:
    """The plan of the assignments, given that of the rows (for `owners`)."""
    ids = unshard(expert_ids)
    rank, local = axis.rank(), num_experts // axis.size
    call = movers.Call(rows.implementation, axis)
    indices = (rows.slot_rank, rows.slot, rows.source_rank, rows.source, rows.chain)
    (here,) = primitive.dispatch(call, (ids,), rows.crossing or indices)  # [C, k]
    valid = (ids >= 0) & (ids < num_experts)
    owner = jnp.where(valid, ids // local, -1)
    filled = (rows.source >= 0)[:, None]
    mine = filled & (here >= 0) & (here < num_experts) & (here // local == rank)
    local_ids = jnp.where(mine, here - rank * local, -1)
    sizes, counts, _, _, _, source, dropped, _, _ = movers.make_integers(
        rows.implementation,
        local_ids,
        axis=Axis((), 1),
        num_experts=local,
        capacity=assignments,
        alignment=alignment,
    )
    k = max(ids.shape[1], 1)
    # Rows that found no room lose all their assignments: their senders know how many.
    arrived = (rows.slot_rank[:, None, :] == owner[:, :, None]).any(2)  # [T, k]
    lost = jnp.where(valid & ~arrived, owner, axis.size)
    table = jnp.bincount(lost.reshape(-1), length=axis.size + 1)[:-1].astype(jnp.int32)
    lost_here = axis.all_to_all(table[:, None]).sum(dtype=jnp.int32)
    found = (
        sizes,
        counts,
        jnp.where(source >= 0, source // k, source),
        jnp.where(source >= 0, source % k, source),
        dropped + lost_here,
    )
    found = vary(found, varying_axes(expert_ids) | checked_axes(axis))
    found = [checkpoint_name(each, PLAN_NAME) for each in found]
    return TokenPlan(rows, *found, num_experts=num_experts)
