"""Differentiable movers: one custom_vjp for each operation, over whichever implementation was
chosen.

The backward of a dispatch is an unweighted combine, that of a combine a weighted dispatch; both
reuse the forward's plan.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fusco import ffi, reference
from jax_fusco.mesh import Axis, checked_axes, unshard, vary, varying_axes

IMPLEMENTATIONS = {"xla": reference, "fused": ffi}


def _run(implementation: str, name: str, *args: Any, **static: Any) -> Any:
    """Calls the mover `name` of an implementation; "platform" chooses while lowering."""
    if implementation != "platform":
        return getattr(IMPLEMENTATIONS[implementation], name)(*args, **static)
    branches = {key: functools.partial(getattr(module, name), **static)
                for key, module in IMPLEMENTATIONS.items()}  # fmt: skip
    return lax.platform_dependent(*args, cpu=branches["fused"], default=branches["xla"])


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about one call: where it runs, and the options of its movers."""

    implementation: str
    axis: Axis
    zero_tail: bool = True
    out_dtype: Any = None


def plan(call: Call, expert_ids: jax.Array, **static: int) -> tuple[jax.Array, ...]:
    """The integers of a shuffle, in the order of the fields of `Plan`."""
    chained = call.implementation == "fused" and ffi.may_run_on_gpu()
    static["chain_rows"] = static["capacity"] if chained else 0
    return _run(call.implementation, "plan", unshard(expert_ids), axis=call.axis, **static)


# Indices of one shuffle: (slot_rank, slot, source_rank, source, chain).
Indices = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def _real_view(x: jax.Array) -> jax.Array:
    return jnp.stack([x.real, x.imag], -1)


def _sum_home(call: Call, ct: jax.Array, indices: Indices) -> jax.Array:
    """The unweighted sum over each token's rows: the cotangent of a dispatched array."""
    slot_rank, slot, *_ = indices
    reduce = functools.partial(_run, call.implementation, "reduce_rows", axis=call.axis)
    if jnp.issubdtype(ct.dtype, jnp.complexfloating):
        parts = _real_view(ct)
        total = reduce(parts, None, slot_rank, slot, out_dtype=parts.dtype)
        return lax.complex(total[..., 0], total[..., 1])
    wide = ct if is_summable(ct.dtype) else ct.astype(jnp.float32)
    return reduce(wide, None, slot_rank, slot, out_dtype=wide.dtype).astype(ct.dtype)


def is_summable(dtype: Any) -> bool:
    """Whether the movers sum rows of this dtype as they are."""
    return dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(call: Call, rows: tuple[jax.Array, ...], indices: Indices) -> tuple[jax.Array, ...]:
    slot_rank, _, source_rank, source, chain = indices
    return _run(
        call.implementation,
        "gather_rows",
        rows,
        source_rank,
        source,
        chain,
        axis=call.axis,
        fanout=max(slot_rank.shape[1], 1),
        zero_tail=call.zero_tail,
    )


def _dispatch_fwd(call: Call, rows: tuple[jax.Array, ...], indices: Indices) -> Any:
    return _dispatch(call, rows, indices), indices


def _dispatch_bwd(call: Call, indices: Indices, cts: tuple[jax.Array, ...]) -> Any:
    with jax.named_scope("jax_fusco.dispatch_backward"):
        grads = tuple(
            None if ct.dtype == jax.dtypes.float0 else _sum_home(call, ct, indices) for ct in cts
        )
    return grads, (None,) * 5


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(call: Call, y: jax.Array, weights: jax.Array | None, indices: Indices) -> jax.Array:
    slot_rank, slot, *_ = indices
    return _run(
        call.implementation,
        "reduce_rows",
        y,
        weights,
        slot_rank,
        slot,
        axis=call.axis,
        out_dtype=call.out_dtype,
    )


def _combine_fwd(call: Call, y: jax.Array, weights: jax.Array | None, indices: Indices) -> Any:
    return _combine(call, y, weights, indices), (y, weights, indices)


def _combine_bwd(call: Call, residuals: Any, g: jax.Array) -> Any:
    y, weights, indices = residuals
    slot_rank, slot, source_rank, source, chain = indices
    run = functools.partial(_run, call.implementation)
    with jax.named_scope("jax_fusco.combine_backward"):
        if weights is None:
            (dy,) = run(
                "gather_rows",
                (g.astype(y.dtype),),
                source_rank,
                source,
                chain,
                axis=call.axis,
                fanout=max(slot.shape[1], 1),
                zero_tail=True,
            )
            return dy, None, (None,) * 5
        width = math.prod(y.shape[1:])
        dy, dots = run(
            "gather_rows_weighted",
            g.reshape(g.shape[0], width),
            weights,
            y.reshape(y.shape[0], width),
            source_rank,
            source,
            chain,
            axis=call.axis,
        )
        # Each dot product lies where its row lies; a gather of single numbers takes it home.
        (home,) = run(
            "gather_rows",
            (dots,),
            slot_rank.reshape(-1),
            slot.reshape(-1),
            axis=call.axis,
            fanout=1,
            zero_tail=True,
        )
        return dy.reshape(y.shape), home.reshape(weights.shape), (None,) * 5


_combine.defvjp(_combine_fwd, _combine_bwd)


def dispatch(call: Call, rows: tuple[jax.Array, ...], indices: Indices) -> tuple[jax.Array, ...]:
    """Rows to experts. Differentiable in every floating (or complex) array of `rows`."""
    rows, indices = _alike(call, (rows, indices))
    return _dispatch(call, rows, indices)


def combine(call: Call, y: jax.Array, weights: jax.Array | None, indices: Indices) -> jax.Array:
    """Rows back, weighted and summed per token. Differentiable in `y` and `weights`."""
    y, weights, indices = _alike(call, (y, weights, indices))
    return _combine(call, y, weights, indices)


def _alike(call: Call, operands: Any) -> Any:
    """Marks all operands as varying over the same axes, so that cotangents have their operands'
    types.

    It happens outside the custom_vjp: its transpose is the sum over the axes that were added.
    """
    operands = unshard(operands)
    return vary(operands, varying_axes(operands) | checked_axes(call.axis))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged(
    call: Call, operand: jax.Array, output: jax.Array, tables: tuple[jax.Array, ...]
) -> jax.Array:
    return _run(call.implementation, "ragged_all_to_all", operand, output, *tables, axis=call.axis)


def _ragged_fwd(call: Call, operand: jax.Array, output: jax.Array, tables: Any) -> Any:
    return _ragged(call, operand, output, tables), (operand, tables)


def _ragged_bwd(call: Call, residuals: Any, g: jax.Array) -> Any:
    operand, tables = residuals
    if g.dtype == jax.dtypes.float0:
        return None, None, (None,) * 4
    input_offsets, send_sizes, output_offsets, recv_sizes = tables

    def exchange(table: jax.Array) -> jax.Array:
        return call.axis.all_to_all(table.reshape(call.axis.size, -1)).reshape(-1)

    with jax.named_scope("jax_fusco.ragged_all_to_all_backward"):
        here, there = exchange(output_offsets), exchange(input_offsets)
        zeros = jnp.zeros_like(operand)
        back = (here, recv_sizes, there, send_sizes)
        d_operand = _run(call.implementation, "ragged_all_to_all", g, zeros, *back, axis=call.axis)
        row = jnp.arange(g.shape[0], dtype=here.dtype)[:, None]
        received = ((row >= here) & (row < here + recv_sizes)).any(1)
        received = received.reshape((-1,) + (1,) * (g.ndim - 1))
    return d_operand, jnp.where(received, 0, g), (None,) * 4


_ragged.defvjp(_ragged_fwd, _ragged_bwd)


def ragged_all_to_all(
    call: Call, operand: jax.Array, output: jax.Array, tables: tuple[jax.Array, ...]
) -> jax.Array:
    """The ragged exchange. Differentiable in `operand` and `output`."""
    operand, output, tables = _alike(call, (operand, output, tables))
    return _ragged(call, operand, output, tables)
