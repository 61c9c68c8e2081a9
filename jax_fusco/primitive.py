"""Differentiable movers: one custom_vjp for each operation, over one level or two, and over
whichever implementation was chosen.

The backward of a dispatch is an unweighted combine, that of a combine a weighted dispatch; both
reuse the forward's plan. Backwards are made of the differentiable movers, so that derivatives of
any order exist (rows travel as words, of which autodiff knows nothing).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jax_fusco import movers, two_level, two_level_plan
from jax_fusco.mesh import checked_axes, unshard, vary, varying_axes
from jax_fusco.movers import Call, is_summable, make_integers, run
from jax_fusco.plan import Crossing
from jax_fusco.topology import Topology

Indices: TypeAlias = movers.Indices | Crossing


def plan(
    call: Call, expert_ids: jax.Array, topology: Topology | None, **static: int
) -> tuple[tuple[jax.Array, ...], Crossing | None]:
    """The integers of a shuffle, in the order of the fields of `Plan`, and how rows cross nodes."""
    ids = unshard(expert_ids)
    if topology is None:
        integers = make_integers(call.implementation, ids, chained=True, axis=call.axis, **static)
        return integers, None
    return two_level_plan.plan(call.implementation, ids, topology, axis=call.axis, **static)


def _level(indices: Indices) -> Any:
    """The movers that these indices are for."""
    return two_level if isinstance(indices, Crossing) else movers


def _real_view(x: jax.Array) -> jax.Array:
    return jnp.stack([x.real, x.imag], -1)


def _sum_home(call: Call, ct: jax.Array, indices: Indices) -> jax.Array:
    """The unweighted sum over each token's rows: the cotangent of a dispatched array."""

    def reduce(y: jax.Array) -> jax.Array:
        return _combine(dataclasses.replace(call, out_dtype=y.dtype), y, None, indices)

    if jnp.issubdtype(ct.dtype, jnp.complexfloating):
        total = reduce(_real_view(ct))
        return lax.complex(total[..., 0], total[..., 1])
    wide = ct if is_summable(ct.dtype) else ct.astype(jnp.float32)
    return reduce(wide).astype(ct.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(call: Call, rows: tuple[jax.Array, ...], indices: Indices) -> tuple[jax.Array, ...]:
    return _level(indices).gather_rows(call, rows, indices)


def _dispatch_fwd(call: Call, rows: tuple[jax.Array, ...], indices: Indices) -> Any:
    return _dispatch(call, rows, indices), indices


def _dispatch_bwd(call: Call, indices: Indices, cts: tuple[jax.Array, ...]) -> Any:
    with jax.named_scope("jax_fusco.dispatch_backward"):
        grads = tuple(
            None if ct.dtype == jax.dtypes.float0 else _sum_home(call, ct, indices) for ct in cts
        )
    return grads, None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine(call: Call, y: jax.Array, weights: jax.Array | None, indices: Indices) -> jax.Array:
    return _level(indices).reduce_rows(call, y, weights, indices)


def _combine_fwd(call: Call, y: jax.Array, weights: jax.Array | None, indices: Indices) -> Any:
    return _combine(call, y, weights, indices), (y, weights, indices)


def _combine_bwd(call: Call, residuals: Any, g: jax.Array) -> Any:
    y, weights, indices = residuals
    with jax.named_scope("jax_fusco.combine_backward"):
        if weights is None:
            dy: Any = _dispatch(call, (g.astype(y.dtype),), indices)
            return *dy, None, None
        dy_dweights: Any = _dispatch_weighted(call, g, weights, y, indices)
        return *dy_dweights, None


_combine.defvjp(_combine_fwd, _combine_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch_weighted(
    call: Call, g: jax.Array, weights: jax.Array, y: jax.Array, indices: Indices
) -> tuple[jax.Array, jax.Array]:
    """Rows of `g` to their slots, times their weights; the products of those rows with `y`'s."""
    return _level(indices).gather_rows_weighted(call, g, weights, y, indices)


def _dispatch_weighted_fwd(call: Call, *operands: Any) -> Any:
    return _dispatch_weighted(call, *operands), operands


def _dispatch_weighted_bwd(call: Call, operands: Any, cts: tuple[jax.Array, jax.Array]) -> Any:
    g, weights, y, indices = operands
    ct_rows, ct_weights = cts
    summed = dataclasses.replace(call, out_dtype=g.dtype)
    dg: Any = _combine(summed, ct_rows, weights, indices)
    dg += _combine(summed, y, ct_weights, indices)
    # Both results are linear in both: the other two cotangents are the same call again.
    dy_dweights: Any = _dispatch_weighted(call, g, ct_weights, ct_rows, indices)
    dy, dweights = dy_dweights
    return dg, dweights, dy, None


_dispatch_weighted.defvjp(_dispatch_weighted_fwd, _dispatch_weighted_bwd)


def dispatch(call: Call, rows: tuple[jax.Array, ...], indices: Indices) -> tuple[jax.Array, ...]:
    """Rows to their slots, for several arrays at once. Differentiable in `rows`."""
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
    return run(call.implementation, "ragged_all_to_all", operand, output, *tables, axis=call.axis)


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
        d_operand = _ragged(call, g, zeros, back)
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
