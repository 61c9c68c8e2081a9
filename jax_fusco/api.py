"""The public functions: check arguments, pick an implementation, name what remat may save."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32, PyTree, Shaped

from jax_fusco import checks, movers, primitive, replicas
from jax_fusco.choice import Implementation, choose
from jax_fusco.mesh import Axis, AxisName, expert_axis
from jax_fusco.placement import Placement
from jax_fusco.plan import PLAN_NAME, Plan, dropless_capacity, experts_per_rank, whole
from jax_fusco.reference import accumulation_dtype
from jax_fusco.token_plan import TokenPlan, make_token_plan, owners
from jax_fusco.topology import Levels, Topology

_ROWS_NAME = "jax_fusco_rows"
REMAT_SAVE_NAMES: tuple[str, ...] = (PLAN_NAME, _ROWS_NAME)
"""Names of a plan's integers and of dispatched rows, for `jax.checkpoint_policies`."""


@overload
def make_plan(
    expert_ids: Int32[Array, "T k"],
    *,
    axis_name: AxisName,
    num_experts: int,
    capacity: int | None = None,
    alignment: int = 1,
    topology: Topology | None = None,
    placement: Placement | None = None,
    rows: Literal["assignment"] = "assignment",
    implementation: Implementation = None,
) -> Plan: ...


@overload
def make_plan(
    expert_ids: Int32[Array, "T k"],
    *,
    axis_name: AxisName,
    num_experts: int,
    capacity: int | None = None,
    alignment: int = 1,
    topology: Topology | None = None,
    placement: Placement | None = None,
    rows: Literal["token"],
    implementation: Implementation = None,
) -> TokenPlan: ...


def make_plan(
    expert_ids: Int32[Array, "T k"],
    *,
    axis_name: AxisName,
    num_experts: int,
    capacity: int | None = None,
    alignment: int = 1,
    topology: Topology | None = None,
    placement: Placement | None = None,
    rows: str = "assignment",
    implementation: Implementation = None,
) -> Plan | TokenPlan:
    """Plans the shuffle of T tokens per rank to their k experts each, and back.

    Call it inside `jax.shard_map`, on every rank. Expert `e` lives on rank `e // (num_experts //
    R)`. A receive buffer is expert-major: by local expert, then source rank, then token, then j.

    Where a rank would receive more rows than `capacity`, the cuts come from the fullest (expert,
    source rank) cells: each keeps `min(count, L)` rows for the highest L that fits, padding
    included, then cells in buffer order get one row more wherever that still fits; a cell loses its
    last assignments.

    Args:
      expert_ids: global expert of each assignment, -1 for none. The same expert may appear twice in
        a row. Ids outside [-1, num_experts) move nothing and are counted in `num_invalid` (and
        raise from the CPU engine when the environment has JAX_FUSCO_STRICT=1).
      axis_name: the mesh axis of the experts, or a tuple whose row-major index is the rank. None:
        one rank, no `shard_map` needed.
      num_experts: experts over all ranks, a multiple of the number of ranks R.
      capacity: rows C of a rank's receive buffer. None: dropless for routings to distinct experts,
        `R * T * min(k, E_local) + E_local * (alignment - 1)`. See `jax_fusco.capacity`.
      alignment: every group starts at, and is padded to, a multiple of it.
      topology: which ranks form a node, where rows should cross between nodes once a token (see
        `Topology`); `axis_name` must be its `axis_name`. Slots are those without a topology;
        `combine` then adds in another order.
      placement: where experts lie, for a router that speaks of experts: `placement.expert_of_slot`,
        S slots per rank, one layer's. Slots then take the place of experts: `group_sizes` is `[S]`,
        rows lie in the order of slots, `capacity` and `Plan.num_experts` are those of R * S
        experts. Of an expert's replicas those on the token's rank are taken, else those on its node
        (with a topology), else all, in turn. None: expert `e` in slot `e`.
      rows: "assignment": a row of the buffer for each assignment. "token": one for each token and
        rank, in the order of source rank and token, for consumers that read rows through an index
        (`grouped_matmul(source=, merge=)`); the plan is a `TokenPlan` with room for `capacity`
        assignments, and for as many rows but at most R * T.
      implementation: "xla" (plain `jax.lax`), "fused" (the engine), a sequence of them tried in
        order, or None: the engine where it is known to reach, else "xla".

    Returns:
      The plan of this rank.

    Raises:
      TypeError, ValueError: an argument's type or value, named in the message.
    """
    ids = checks.array("expert_ids", expert_ids)
    if ids.dtype != jnp.int32:
        raise TypeError(f"expert_ids: got dtype {ids.dtype}, need int32")
    if ids.ndim != 2:
        raise ValueError(f"expert_ids: got shape {ids.shape}, need [tokens, experts per token]")
    axis = expert_axis(axis_name)
    local = axis if topology is None else _local_axis(topology, axis)
    num_experts = whole("num_experts", num_experts, 1)
    alignment = whole("alignment", alignment, 1)
    if alignment >= 2**31:
        raise ValueError(f"alignment: got {alignment}, need fewer than 2**31 rows")
    experts_per_rank(num_experts, axis.size)
    if placement is not None:
        replicas.check(placement, num_experts, axis.size)
        num_experts = placement.num_slots * axis.size
    tokens, k = ids.shape
    if capacity is None:
        size = dropless_capacity(tokens, k, num_experts, axis.size, alignment)
    else:
        size = whole("capacity", capacity, 0)
    if max(size, tokens * k) >= 2**31:
        raise ValueError(
            f"capacity: got {size} rows, need fewer than 2**31; pass a smaller capacity"
        )
    chosen = choose(implementation, local, reached=topology is not None)
    if placement is not None:
        ids = replicas.slots_of(chosen, ids, placement, axis, local.size)
    if rows == "token":
        plan_of_rows = make_plan(
            owners(ids, axis, num_experts),
            axis_name=axis_name,
            num_experts=axis.size,
            capacity=min(size, axis.size * tokens),
            topology=topology,
            implementation=implementation,
        )
        return make_token_plan(ids, plan_of_rows, axis, num_experts, size, alignment)
    if rows != "assignment":
        raise ValueError(f"rows: got {rows!r}, need 'assignment' or 'token'")
    if local.size == axis.size:
        topology = None
    elif not ids.size:
        # Nothing crosses, and plain XLA serves ranks that do not reach each other.
        topology, chosen = None, "xla"
    with jax.named_scope("jax_fusco.make_plan"):
        (*integers, chain), crossing = primitive.plan(
            movers.Call(chosen, axis),
            jax.lax.stop_gradient(ids),
            topology,
            num_experts=num_experts,
            capacity=size,
            alignment=alignment,
        )
        name = functools.partial(checkpoint_name, name=PLAN_NAME)
        return Plan(
            *map(name, integers),
            chain=name(chain) if chain.size else None,
            crossing=jax.tree.map(name, crossing),
            axis_name=axis.names or None,
            num_experts=num_experts,
            num_ranks=axis.size,
            alignment=alignment,
            implementation=chosen,
        )


def dispatch(
    x: PyTree[Shaped[Array, "T ..."]], plan: Plan | TokenPlan, *, padding: str = "zero"
) -> PyTree[Shaped[Array, "C ..."]]:
    """Moves each token's row to the buffer rows of its experts.

    Args:
      x: an array `[T, ...]`, or a pytree of them that travel together (hidden states, scales, ids),
        of any dtype of 1, 2, 4 or 8 bytes.
      plan: the plan of this rank.
      padding: what rows past the last group hold: "zero", or "undefined" for consumers that never
        read them (a dense product over all rows does, and NaN there spreads). Rows that pad a group
        are zero.

    Returns:
      Arrays `[C, ...]` in expert-major order. Differentiable in floating and complex arrays: the
      cotangent of a token's row is the sum over its rows, in float32 (float64), j ascending,
      rounded once (with a topology: as `combine` says).

    Raises:
      TypeError, ValueError: an argument's type or value, named in the message.
    """
    plan, axis = _plan_of_rows(plan)
    if padding not in ("zero", "undefined"):
        raise ValueError(f"padding: got {padding!r}, need 'zero' or 'undefined'")
    leaves, tree = jax.tree.flatten(x)
    rows = tuple(checks.array("x", leaf) for leaf in leaves)
    for leaf in rows:
        checks.payload("x", leaf, "token of expert_ids", plan.slot.shape[0])
    if not rows:
        return x
    call = movers.Call(plan.implementation, axis, zero_tail=padding == "zero")
    with jax.named_scope("jax_fusco.dispatch"):
        moved = primitive.dispatch(call, rows, _indices(plan))
        return tree.unflatten([checkpoint_name(leaf, _ROWS_NAME) for leaf in moved])


def combine(
    y: Float[Array, "C ..."],
    weights: Float[Array, "T k"] | None,
    plan: Plan | TokenPlan,
    *,
    out_dtype: Any = None,
) -> Float[Array, "T ..."]:
    """Brings the experts' rows back: `out[t] = sum_j weights[t, j] * y@owner(t, j)[slot[t, j]]`.

    The sum is one fused multiply-add per assignment that has a slot, j ascending from +0, in
    float32 (float64 if `y` is float64), rounded once. Assignments without a slot add nothing;
    buffer rows outside the groups are never read. Implementations give the same bits, but for
    subnormal numbers: the engine keeps them, XLA on CPU devices flushes them to zero.

    With a topology each node sums its own rows so. Sums of other nodes are rounded to the
    topology's `wire_dtype` to cross, and are added, nodes ascending; the token's own node comes
    last. Where a token's experts lie on one node, and the wire is `out_dtype` or the precision of
    the sum, the bits are those of the flat sum (but that -0 becomes +0). Else the two differ by at
    most `(k + N) * eps * sum |w * y|` in the precision of the sum, half a unit of the wire's last
    place for each other node's part, and a unit of that of `out_dtype`. A part that float16 cannot
    hold is infinite where the whole sum might not be: let float16 cross as "float32".

    Args:
      y: rows `[C, ...]` of a floating dtype, where `dispatch` put them.
      weights: floating `[T, k]`, used in the precision of the sum; None means ones. Must be None
        with a `TokenPlan`, whose `local_weights` belong to the products before.
      plan: the plan of this rank.
      out_dtype: a floating dtype, by default that of `y`.

    Returns:
      `[T, ...]`. Differentiable in `y` and `weights`; the gradient of `weights[t, j]` is a dot
      product in the precision of the sum, whose order over d differs between implementations: they
      agree within `d * eps * sum |g * y|`.

    Raises:
      TypeError, ValueError: an argument's type or value, named in the message.
    """
    if isinstance(plan, TokenPlan) and weights is not None:
        raise ValueError(
            "weights: got an array, need None with a TokenPlan, whose plan.local_weights(weights) "
            "are the merge_weights of grouped_matmul"
        )
    plan, axis = _plan_of_rows(plan)
    y = checks.array("y", y)
    checks.floating("y", y.dtype)
    checks.payload("y", y, "row that dispatch gave", plan.capacity)
    out_dtype = checks.dtype_of("out_dtype", y.dtype if out_dtype is None else out_dtype)
    checks.floating("out_dtype", out_dtype)
    # Narrower formats are summed, like all others, in float32.
    wide = y if movers.is_summable(y.dtype) else y.astype(jnp.float32)
    wide_out = out_dtype if movers.is_summable(out_dtype) else jnp.dtype(jnp.float32)
    if weights is not None:
        weights = checks.weights(weights, plan.slot.shape)
        weights = weights.astype(accumulation_dtype(wide.dtype))
    call = movers.Call(plan.implementation, axis, out_dtype=wide_out)
    with jax.named_scope("jax_fusco.combine"):
        return primitive.combine(call, wide, weights, _indices(plan)).astype(out_dtype)


def ragged_all_to_all(
    operand: Shaped[Array, "N ..."],
    output: Shaped[Array, "M ..."],
    input_offsets: Int32[Array, " K"],
    send_sizes: Int32[Array, " K"],
    output_offsets: Int32[Array, " K"],
    recv_sizes: Int32[Array, " K"],
    *,
    axis_name: AxisName,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    implementation: Implementation = None,
) -> Shaped[Array, "M ..."]:
    """`jax.lax.ragged_all_to_all`, with the same meaning, on CPU devices too.

    K is a multiple of the number of ranks R, and slice i goes to rank `i // (K // R)`: rows
    `operand[input_offsets[i] : + send_sizes[i]]` to row `output_offsets[i]` of that rank's result.
    The rest of the result is `output`. Slices must not overlap in a result nor, for gradients, in
    `operand` (as for `jax.lax`, the cotangent of a row that is sent twice is that of one copy).

    Args:
      operand: rows to send.
      output: what the result holds where nothing arrives; same dtype and row shape as `operand`.
      input_offsets: integer, where each slice begins in `operand`.
      send_sizes: integer, rows of each slice.
      output_offsets: integer, where each slice begins in its receiver's result.
      recv_sizes: integer, rows of each slice that comes here.
      axis_name: the mesh axis of the ranks, or a tuple whose row-major index is the rank.
      axis_index_groups: equally long lists of axis indices that exchange among themselves.
      implementation: as in `make_plan`.

    Returns:
      `output` with the received slices written. Differentiable in `operand` and `output`.

    Raises:
      TypeError, ValueError: an argument's type or value, named in the message.
    """
    axis = expert_axis(tuple(axis_name) if isinstance(axis_name, list) else axis_name)
    if axis_index_groups is not None:
        subgroups = checks.subgroups(axis_index_groups, axis.size)
        axis = Axis(axis.names, len(subgroups[0]), subgroups)
    operand, output = checks.array("operand", operand), checks.array("output", output)
    checks.payload("operand", operand, None, None)
    if output.dtype != operand.dtype or output.shape[1:] != operand.shape[1:] or not output.ndim:
        raise ValueError(
            f"output: got {output.dtype}{list(output.shape)}, need rows like operand's "
            f"({operand.dtype}{list(operand.shape)})"
        )
    named = {
        "input_offsets": input_offsets,
        "send_sizes": send_sizes,
        "output_offsets": output_offsets,
        "recv_sizes": recv_sizes,
    }
    tables = tuple(checks.table(name, table, axis.size) for name, table in named.items())
    for name, table in zip(named, tables, strict=True):
        if table.shape != tables[0].shape:
            raise ValueError(f"{name}: got shape {table.shape}, need {tables[0].shape}")
    chosen = choose(implementation, axis)
    with jax.named_scope("jax_fusco.ragged_all_to_all"):
        return primitive.ragged_all_to_all(movers.Call(chosen, axis), operand, output, tables)


def _local_axis(topology: Topology, axis: Axis) -> Axis:
    """The ranks of a node; ValueError where the topology is not one of `axis`."""
    if not isinstance(topology, Topology):
        raise TypeError(f"topology: got {type(topology).__name__}, need a jax_fusco.Topology")
    if topology.axis_name != axis.names:
        raise ValueError(
            f"axis_name: got {axis.names or None}, need {topology.axis_name} for this topology"
        )
    return Levels.of(topology).local


def _indices(plan: Plan) -> primitive.Indices:
    if plan.crossing is not None:
        return plan.crossing
    return plan.slot_rank, plan.slot, plan.source_rank, plan.source, plan.chain


def _plan_of_rows(plan: Plan | TokenPlan) -> tuple[Plan, Axis]:
    if isinstance(plan, TokenPlan):
        plan = plan.rows
    if not isinstance(plan, Plan):
        got = "an array" if isinstance(plan, jax.Array) else type(plan).__name__
        raise TypeError(f"plan: got {got}, need the jax_fusco.Plan that make_plan returned")
    axis = expert_axis(plan.axis_name)
    if axis.size != plan.num_ranks:
        raise ValueError(
            f"plan: got one for {plan.num_ranks} ranks, need one for the {axis.size} ranks here"
        )
    return plan, axis
