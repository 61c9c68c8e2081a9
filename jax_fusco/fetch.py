"""Rows from the ranks that own them, by `jax.lax` collectives alone: how `"xla"` moves rows.

Few bytes, or rows that most ranks want, are all-gathered. Else each rank asks for the rows that it
wants and gets those: in slices of a fixed number of rows for each pair of ranks, as many slices as
the fullest pair needs, so that what travels follows the real counts.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from jax_fusco.mesh import Axis, checked_axes, vary, varying_axes

Array = jax.Array
Arrays = tuple[Array, ...]

_SMALL = 1 << 20  # bytes that take no longer than any exchange
_SLICE = 1 << 22  # bytes of a slice that hide what any exchange takes
_SLICES = 4  # of balanced requests; half of the last is padding


def _gathers_all(axis: Axis, number: int, row_bytes: int, expected: int) -> bool:
    """Whether to move all `number` rows of each rank to every rank."""
    asked = (1 + 1 / _SLICES) * expected * (row_bytes + 4)
    return axis.size == 1 or axis.size * number * row_bytes <= max(_SMALL, asked)


def _rows_of_slices(axis: Axis, row_bytes: int, expected: int, requests: int) -> int:
    """Rows of a slice, for each pair of ranks."""

    def of_bytes(size: int) -> int:
        return size // (axis.size * max(row_bytes, 1))

    balanced = -(-expected // axis.size)
    rows = max(-(-balanced // _SLICES), min(of_bytes(_SLICE), math.ceil(1.5 * balanced)))
    return min(max(rows, of_bytes(_SMALL), 1), requests)


def fetch(arrays: Arrays, owner: Array, row: Array, *, axis: Axis, expected: int) -> Arrays:
    """`out[m] = array@owner[m][row[m]]` of each array, zero where `row[m]` is negative.

    Args:
      arrays: unsigned words `[N, ...]`, of one N.
      owner, row: int32 `[M]`.
      expected: requests of a rank that are not negative, roughly: it shapes the slices.
    """
    axes = varying_axes(arrays, owner, row) | checked_axes(axis)
    owner, row = vary((owner, row), axes)
    number, requests = arrays[0].shape[0], row.shape[0]
    if not number or not requests:
        empty = tuple(jnp.zeros((requests, *x.shape[1:]), x.dtype) for x in arrays)
        return vary(empty, axes)
    row_bytes = sum(x.nbytes // number for x in arrays)
    if _gathers_all(axis, number, row_bytes, expected):
        at = jnp.maximum(owner, 0), jnp.maximum(row, 0)
        return tuple(mask(row >= 0, axis.all_gather(x)[at]) for x in arrays)
    rows = _rows_of_slices(axis, row_bytes, expected, requests)
    return _fetch_in_slices(arrays, owner, row, axis, rows, axes)


def _fetch_in_slices(
    arrays: Arrays, owner: Array, row: Array, axis: Axis, rows: int, axes: frozenset[str]
) -> Arrays:
    requests = row.shape[0]
    owner = jnp.where(row >= 0, owner, axis.size)
    order = jnp.argsort(owner, stable=True).astype(jnp.int32)
    counts = jnp.bincount(owner, length=axis.size + 1)[: axis.size].astype(jnp.int32)
    first = jnp.cumsum(counts, dtype=jnp.int32) - counts
    slices = -(-axis.all_gather(counts.max()).max() // rows)
    place = jnp.arange(rows, dtype=jnp.int32)
    nowhere = requests + jnp.arange(axis.size * rows, dtype=jnp.int32)  # distinct, past the end

    def exchange(i: Array, found: Arrays) -> Arrays:
        at = i * rows + place
        asks = at < counts[:, None]  # [R, rows]
        request = order[jnp.minimum(first[:, None] + at, requests - 1)]
        asked = axis.all_to_all(jnp.where(asks, row[request], 0))
        target = jnp.where(asks.reshape(-1), request.reshape(-1), nowhere)

        def one(words: Array, out: Array) -> Array:
            received = axis.all_to_all(words[asked]).reshape(target.shape + words.shape[1:])
            return out.at[target].set(received, mode="drop", unique_indices=True)

        return vary(tuple(map(one, arrays, found)), axes)

    found = tuple(jnp.zeros((requests, *x.shape[1:]), x.dtype) for x in arrays)
    return lax.fori_loop(0, slices, exchange, vary(found, axes))


def over_rows(flags: Array, x: Array) -> Array:
    """`flags`, one for each row of `x`, in a shape that broadcasts over the rows."""
    return flags.reshape(flags.shape + (1,) * (x.ndim - flags.ndim))


def mask(keep: Array, x: Array) -> Array:
    """Zero in the rows of `x` that `keep` does not name."""
    return jnp.where(over_rows(keep, x), x, jnp.zeros((), x.dtype))
