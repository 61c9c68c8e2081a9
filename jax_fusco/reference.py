"""The plan and the row movers from `jax.lax` alone: `implementation="xla"`.

Any platform, any number of processes; what the fused engine is checked against. Rows travel as
unsigned words, so that no arithmetic touches a payload (NaN bits survive).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fusco.fetch import fetch, mask, over_rows
from jax_fusco.mesh import Axis, checked_axes, vary, varying_axes

# The framework's own function, bound at import: callers may replace the public name by ours.
_jax_ragged_all_to_all = lax.ragged_all_to_all


def _round_up(n: jax.Array, multiple: int) -> jax.Array:
    return -(-n // multiple) * multiple


def water_fill(counts: jax.Array, capacity: int, alignment: int) -> jax.Array:
    """Rows kept of each cell, int32 [E_local, R], from the rows each cell wants, int32 [E_local,
    R].

    The highest level L at which groups of `min(count, L)` rows, padded to `alignment`, fit in
    `capacity`; then one row more for each cut cell, in buffer order, wherever that still fits.
    """

    def padded(level: jax.Array) -> jax.Array:
        return _round_up(jnp.minimum(counts, level).sum(1), alignment)

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # `low` fits; nothing above `high` is needed
        middle = low + (high - low + 1) // 2
        fits = padded(middle).sum() <= capacity
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

    highest = counts.max(initial=0)
    low = jnp.where(padded(highest).sum() <= capacity, highest, 0)  # most often nothing is cut
    level, _ = lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, (low, highest))
    kept = jnp.minimum(counts, level)
    # One row more: first into the padding that a group has anyway, then into blocks of `alignment`
    # rows as long as there are any, groups in order.
    cut = counts > level
    wanted = cut.sum(1)
    free = padded(level) - kept.sum(1)
    blocks_wanted = -(-jnp.maximum(wanted - free, 0) // alignment)
    blocks_left = (capacity - padded(level).sum()) // alignment
    blocks_before = jnp.cumsum(blocks_wanted) - blocks_wanted
    blocks = jnp.clip(blocks_left - blocks_before, 0, blocks_wanted)
    extra = jnp.minimum(wanted, free + blocks * alignment)
    more = cut & (jnp.cumsum(cut, 1) <= extra[:, None])
    return (kept + more.astype(kept.dtype)).astype(jnp.int32)


def lay_out(kept: jax.Array, alignment: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where a rank's cells `[E_local, R]` begin, and each group's rows without and with padding."""
    expert_counts = kept.sum(1, dtype=jnp.int32)
    group_sizes = _round_up(expert_counts, alignment)
    group_start = jnp.cumsum(group_sizes, dtype=jnp.int32) - group_sizes
    begin = group_start[:, None] + jnp.cumsum(kept, 1, dtype=jnp.int32) - kept
    return begin, expert_counts, group_sizes


def plan(
    expert_ids: jax.Array,
    *,
    axis: Axis,
    num_experts: int,
    capacity: int,
    alignment: int,
    chain_rows: int,
) -> tuple[jax.Array, ...]:
    """The integers of a shuffle, in the order of the fields of `Plan`."""
    tokens, k = expert_ids.shape
    ranks, local_experts, assignments = axis.size, num_experts // axis.size, tokens * k
    rank = axis.rank()
    flat = expert_ids.reshape(-1)
    valid = (flat >= 0) & (flat < num_experts)
    num_invalid = jnp.sum(~valid & (flat != -1), dtype=jnp.int32)

    # Each rank's assignments sorted by expert: a cell is a run of `order`.
    ids = jnp.where(valid, flat, num_experts)
    order = jnp.argsort(ids, stable=True).astype(jnp.int32)
    counts = jnp.bincount(ids, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    counts = axis.all_gather(counts)
    run_start = jnp.cumsum(counts, 1, dtype=jnp.int32) - counts  # [R, E]

    # The buffers of all ranks: rows kept of each cell, and where they begin, [owner, E_local,
    # source].
    wanted = counts.T.reshape(ranks, local_experts, ranks)
    fill = functools.partial(water_fill, capacity=capacity, alignment=alignment)
    kept = jax.vmap(fill)(wanted)
    begin, expert_counts, group_sizes = jax.vmap(lambda cells: lay_out(cells, alignment))(kept)

    # Where my assignments go.
    expert = jnp.where(valid, flat, 0)
    owner, local = expert // local_experts, expert % local_experts
    sorted_position = jnp.zeros(assignments, jnp.int32)
    sorted_position = sorted_position.at[order].set(jnp.arange(assignments, dtype=jnp.int32))
    in_cell = sorted_position - run_start[rank, expert]
    placed = valid & (in_cell < kept[owner, local, rank])
    slot = jnp.where(placed, begin[owner, local, rank] + in_cell, -1).reshape(tokens, k)
    slot_rank = jnp.where(placed, owner, -1).reshape(tokens, k)

    # Where my buffer's rows come from: the cell that holds row c is the last that begins at or
    # before c.
    row = jnp.arange(capacity, dtype=jnp.int32)
    begins = jnp.zeros(capacity, jnp.int32).at[begin[rank].reshape(-1)].add(1, mode="drop")
    cell = jnp.cumsum(begins, dtype=jnp.int32) - 1
    local, source_rank = cell // ranks, cell % ranks
    in_cell = row - begin[rank].reshape(-1)[cell]
    filled = in_cell < kept[rank].reshape(-1)[cell]
    run = run_start[source_rank, rank * local_experts + local]
    place = jnp.where(filled, run + in_cell, -1)
    few = min(capacity, assignments)
    (source,) = fetch((order.astype(jnp.uint32),), source_rank, place, axis=axis, expected=few)
    source = source.astype(jnp.int32)
    empty = jnp.where(row < group_sizes[rank].sum(), -1, -2)
    source = jnp.where(filled, source, empty)
    source_rank = jnp.where(filled, source_rank, empty)

    num_dropped = jnp.sum(wanted[rank] - kept[rank], dtype=jnp.int32)
    found = (
        group_sizes[rank],
        expert_counts[rank],
        slot,
        slot_rank,
        source_rank,
        source,
        num_dropped,
        num_invalid,
        jnp.zeros(chain_rows, jnp.int32),  # nothing here follows a chain
    )
    return vary(found, varying_axes(expert_ids) | checked_axes(axis))


def accumulation_dtype(dtype: Any) -> Any:
    """What sums of `dtype` are made in: float32, or more where it is more."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.float32)


def to_words(x: jax.Array) -> jax.Array:
    """`x` as unsigned integers of its width, shape kept but for complex numbers."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], -1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{x.dtype.itemsize * 8}"))


def from_words(words: jax.Array, dtype: Any) -> jax.Array:
    if dtype == jnp.bool_:
        return words.astype(jnp.bool_)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        part = jnp.finfo(dtype).dtype
        parts = lax.bitcast_convert_type(words, part)
        return lax.complex(parts[..., 0], parts[..., 1])
    return lax.bitcast_convert_type(words, dtype)


def gather_rows(
    rows: tuple[jax.Array, ...],
    source_rank: jax.Array,
    source: jax.Array,
    chain: jax.Array | None = None,
    *,
    axis: Axis,
    fanout: int,
    zero_tail: bool,
    into: tuple[jax.Array, ...] | None = None,
) -> tuple[jax.Array, ...]:
    """`out[m] = rows@source_rank[m][source[m] // fanout]`, zero where `source[m]` is negative.

    With `into`, arrays of the results' shapes and dtypes, rows of source -2 are those of `into`.
    """
    assert into is None or (len(into) == len(rows) and not zero_tail)
    # Zeros are as good as anything in a tail that nobody reads.
    del chain, zero_tail

    if not rows:
        return ()
    words = tuple(map(to_words, rows))
    few = min(source.shape[0], rows[0].shape[0] * fanout)
    moved = fetch(words, source_rank, source // fanout, axis=axis, expected=few)
    if into is not None:
        kept = map(to_words, into)
        moved = tuple(
            jnp.where(over_rows(source == -2, x), x, new)
            for x, new in zip(kept, moved, strict=True)
        )
    return tuple(from_words(new, x.dtype) for new, x in zip(moved, rows, strict=True))


def gather_rows_weighted(
    g: jax.Array,
    weights: jax.Array,
    y: jax.Array,
    source_rank: jax.Array,
    source: jax.Array,
    chain: jax.Array | None = None,
    *,
    axis: Axis,
) -> tuple[jax.Array, jax.Array]:
    """Backward of the weighted sum: `dy[m] = w * g` of its assignment, `dots[m] = <g, y[m]>`."""
    k = weights.shape[1]
    rows, scales = gather_rows(
        (g, weights), source_rank, source, chain, axis=axis, fanout=k, zero_tail=True
    )
    scale = jnp.take_along_axis(scales, jnp.maximum(source, 0)[:, None] % k, 1)[:, 0]
    rows, wide_y = rows.astype(scale.dtype), mask(source >= 0, y).astype(scale.dtype)
    dots = jnp.sum(rows * wide_y, axis=1)
    return (rows * scale[:, None]).astype(y.dtype), dots


def reduce_rows(
    y: jax.Array,
    weights: jax.Array | None,
    slot_rank: jax.Array,
    slot: jax.Array,
    *,
    axis: Axis,
    out_dtype: Any,
) -> jax.Array:
    """`out[t] = sum_j w[t, j] * y@slot_rank[t, j][slot[t, j]]`, j ascending, one fma each."""
    accumulator = accumulation_dtype(y.dtype)
    shape = slot.shape[:1] + y.shape[1:]

    # XLA contracts an unrolled sum as it likes; in a scan over j it is the ordered fma.
    def add(acc: jax.Array, column: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        row, words_of_row, *weight = column
        value = from_words(words_of_row, y.dtype).astype(accumulator)
        if weight:
            value = weight[0].reshape(weight[0].shape + (1,) * (y.ndim - 1)) * value
        present = (row >= 0).reshape(row.shape + (1,) * (y.ndim - 1))
        return jnp.where(present, value + acc, acc), None

    start = vary(jnp.zeros(shape, accumulator), varying_axes(y, slot, weights) | checked_axes(axis))
    if not slot.size or not y.size:
        return start.astype(out_dtype)
    owners, places = slot_rank.T.reshape(-1), slot.T.reshape(-1)
    (fetched,) = fetch((to_words(y),), owners, places, axis=axis, expected=slot.size)
    fetched = fetched.reshape(slot.shape[::-1] + y.shape[1:])
    columns = (slot.T, fetched) if weights is None else (slot.T, fetched, weights.T)
    out, _ = lax.scan(add, start, vary(columns, varying_axes(start)))
    # A sum that starts at +0 is never -0, unless XLA takes the +0 away from a single product.
    return jnp.where(out == 0, 0, out).astype(out_dtype)


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis: Axis,
) -> jax.Array:
    """`jax.lax.ragged_all_to_all`, on CPU (which lacks it) an all-gather and a row gather."""

    def native(*args: jax.Array) -> jax.Array:
        groups = None if axis.subgroups is None else [list(group) for group in axis.subgroups]
        return _jax_ragged_all_to_all(*args, axis_name=axis.names, axis_index_groups=groups)

    def emulated(
        operand: jax.Array,
        output: jax.Array,
        input_offsets: jax.Array,
        send_sizes: jax.Array,
        output_offsets: jax.Array,
        recv_sizes: jax.Array,
    ) -> jax.Array:
        del recv_sizes  # the senders' sizes say the same
        # Slices that come to me, [R * slices]: where they begin at the sender and here, and how
        # long they are.
        begin, size, here = (
            axis.all_to_all(v.reshape(axis.size, -1)).reshape(-1)
            for v in (input_offsets, send_sizes, output_offsets)
        )
        sender = jnp.repeat(jnp.arange(axis.size), begin.size // axis.size)
        row = jnp.arange(output.shape[0], dtype=here.dtype)[:, None]
        covers = (row >= here[None]) & (row < (here + size)[None])  # [M, slices]
        covered, which = covers.any(1), covers.argmax(1)
        source = jnp.where(covered, begin[which] + row[:, 0] - here[which], -1)
        (received,) = gather_rows(
            (operand,), sender[which], source, axis=axis, fanout=1, zero_tail=True
        )
        covered = covered.reshape((-1,) + (1,) * (output.ndim - 1))
        return jnp.where(covered, received, output)

    args = (operand, output, input_offsets, send_sizes, output_offsets, recv_sizes)
    args = vary(args, varying_axes(args) | checked_axes(axis))
    if not axis.names:
        return emulated(*args)
    # Both are batched, whichever platform it will be; JAX has no rule for tables that are not.
    native = jax.custom_batching.sequential_vmap(native)
    return lax.platform_dependent(*args, cpu=emulated, default=native)
