"""The row movers over several nodes: each row crosses between nodes once, in slices.

`gather_rows`, `reduce_rows` and `gather_rows_weighted` as in `jax_fusco.movers`, from a `Crossing`.
Rows cross in slices of a fixed number of rows for each pair of nodes, as many slices as the fullest
pair needs. On GPUs, while one slice crosses, the next is packed and the one before is forwarded:
the three do not depend on each other, so that XLA runs them side by side (FUSCO's pipeline, arXiv
2512.22036). The loop over slices runs inside the custom_vjp, so that its length may depend on data.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jax_fusco import reference
from jax_fusco.mesh import Axis, platform, vary, varying_axes
from jax_fusco.movers import Call, run
from jax_fusco.plan import Crossing
from jax_fusco.reference import accumulation_dtype, from_words, to_words
from jax_fusco.topology import Levels

Array = jax.Array
Arrays = tuple[Array, ...]


def _overlaps() -> bool:
    """Whether XLA runs exchanges beside other work: on CPU devices one thing follows another."""
    return platform() != "cpu"


@dataclasses.dataclass(frozen=True)
class _Slices:
    """Slices of the blocks `[N, T, ...]` of a crossing: `rows` rows of each block that crosses."""

    crossing: Crossing
    levels: Levels
    rows: int

    @classmethod
    def of(cls, crossing: Crossing, row_bytes: int) -> _Slices:
        tokens = crossing.pack_token.shape[1]
        rows = crossing.topology.rows_of_slices(tokens, row_bytes)
        return cls(crossing, Levels.of(crossing.topology), rows)

    @property
    def block(self) -> int:
        """Rows of a block, in whole slices."""
        return -(-self.crossing.pack_token.shape[1] // self.rows) * self.rows

    def cut(self, blocks: Array, index: Array, empty: int) -> Array:
        """Slice `index` of `blocks [N, T, ...]`, as `[blocks * rows, ...]`; `empty` for this
        node."""
        node = jnp.arange(blocks.shape[0]).reshape((-1,) + (1,) * (blocks.ndim - 1))
        blocks = jnp.where(node == self.levels.node.rank(), empty, blocks)
        missing = [(0, 0)] * blocks.ndim
        missing[1] = (0, self.block - blocks.shape[1])
        blocks = jnp.pad(blocks, missing, constant_values=empty)
        part = lax.dynamic_slice_in_dim(blocks, index * self.rows, self.rows, 1)
        return part.reshape((self.levels.node.size * self.rows, *part.shape[2:]))

    def lengths(self, home: bool) -> tuple[Array, Array]:
        """Rows of each block that go to its node and come from there, [N] each."""
        elsewhere = jnp.arange(self.levels.node.size) != self.levels.node.rank()

        def rows(there: Array) -> Array:
            return jnp.where(elsewhere, there.sum(1, dtype=jnp.int32), 0)

        sent = rows(self.crossing.pack_token >= 0)
        received = rows((self.crossing.deliver_slot >= 0).any(2))
        return (received, sent) if home else (sent, received)

    def cross(self, part: Array, index: Array, lengths: tuple[Array, Array] | None) -> Array:
        """Exchanges the blocks of slice `index` with their nodes; whole ones without `lengths`."""
        words, node = to_words(part), self.levels.node
        if lengths is None:
            blocks = words.reshape((node.size, self.rows, *words.shape[1:]))
            crossed = node.all_to_all(blocks).reshape(words.shape)
        else:
            begin = jnp.arange(node.size, dtype=jnp.int32) * self.rows
            sent, received = (jnp.clip(n - index * self.rows, 0, self.rows) for n in lengths)
            there = jnp.full_like(begin, node.rank() * self.rows)
            room = jnp.zeros_like(words)
            crossed = reference.ragged_all_to_all(
                words, room, begin, sent, there, received, axis=node
            )
        return from_words(crossed, part.dtype)

    def run(
        self,
        produce: Callable[[Array], Arrays],
        consume: Callable[[Array, Arrays, Arrays], Arrays],
        state: Arrays,
        *,
        home: bool = False,
    ) -> Arrays:
        """`state` after `consume(i, cross(produce(i)), state)` for every slice i in turn; `home`:
        from forwarders.

        Where exchanges overlap, `produce` and `consume` are also called for one slice too many, at
        either end.
        """
        number = -(-self.crossing.most_rows // self.rows)
        lengths = self.lengths(home) if self.crossing.topology.exchange == "ragged" else None

        def cross(parts: Arrays, i: Array) -> Arrays:
            # In turn, the largest last: XLA runs other work beside the last exchange alone.
            crossed: dict[int, Array] = {}
            for n in sorted(range(len(parts)), key=lambda n: parts[n].nbytes):
                part = parts[n]
                if crossed:
                    part, _ = lax.optimization_barrier((part, tuple(crossed.values())))
                crossed[n] = self.cross(part, i, lengths)
            return tuple(crossed[n] for n in range(len(parts)))

        carried = functools.partial(vary, axes=varying_axes(self.crossing))  # as all operands do

        if not _overlaps():

            def one(i: Array, state: Arrays) -> Arrays:
                return carried(consume(i, cross(produce(i), i), state))

            return lax.fori_loop(0, number, one, carried(state))

        def step(i: Array, carry: tuple[Arrays, Arrays, Arrays]) -> tuple[Arrays, Arrays, Arrays]:
            ready, arrived, state = carry
            return carried((produce(i + 1), cross(ready, i), consume(i - 1, arrived, state)))

        ready = produce(jnp.int32(0))
        carry = carried((ready, jax.tree.map(jnp.zeros_like, ready), state))
        _, arrived, state = lax.fori_loop(0, number, step, carry)
        return consume(number - 1, arrived, state)


def gather_rows(call: Call, rows: Arrays, crossing: Crossing) -> Arrays:
    """Each token's row of each array to the token's slots."""
    tokens, k = crossing.deliver_slot.shape[1:]
    slices = _Slices.of(crossing, sum(x.nbytes // max(tokens, 1) for x in rows))
    levels = slices.levels
    gather = functools.partial(
        run, call.implementation, "gather_rows", axis=levels.local, fanout=1, zero_tail=False
    )
    # Rows that come from other nodes are left (-2) to the slices.
    filled = crossing.from_assignment >= 0
    row = crossing.from_assignment // max(k, 1)
    from_node, row = row // tokens, row % tokens
    near = filled & (from_node == levels.node.rank())
    empty = -1 if call.zero_tail else crossing.from_assignment
    first = jnp.where(near, row, jnp.where(filled, -2, empty))
    moved = gather(rows, crossing.from_rank, first)

    def pack(i: Array) -> Arrays:
        owner = slices.cut(crossing.pack_rank, i, -2)
        return gather(rows, owner, slices.cut(crossing.pack_token, i, -2))

    def forward(i: Array, arrived: Arrays, moved: Arrays) -> Arrays:
        now = filled & ~near & (row // slices.rows == i)
        source = jnp.where(now, from_node * slices.rows + row % slices.rows, -2)
        return gather(arrived, crossing.from_rank, source, into=moved)

    return slices.run(pack, forward, moved)


def reduce_rows(call: Call, y: Array, weights: Array | None, crossing: Crossing) -> Array:
    """The weighted sum over each token's slots: a partial sum on each node, then over nodes."""
    nodes = crossing.deliver_slot.shape[0]
    accumulator = accumulation_dtype(y.dtype)
    wire = accumulator if crossing.topology.wire_dtype == "float32" else y.dtype
    row_bytes = jnp.dtype(wire).itemsize * (y.size // max(y.shape[0], 1))
    slices = _Slices.of(crossing, row_bytes)
    levels = slices.levels
    reduce = functools.partial(run, call.implementation, "reduce_rows", axis=levels.local)
    here = levels.node.rank()
    own = reduce(
        y, weights, crossing.deliver_rank[here], crossing.deliver_slot[here], out_dtype=accumulator
    )
    if weights is not None:
        weights = _to_forwarders(call, weights, crossing, levels)

    def partial_sums(i: Array) -> Arrays:
        of_rows = None if weights is None else slices.cut(weights, i, 0)
        target = slices.cut(crossing.deliver_rank, i, -1), slices.cut(crossing.deliver_slot, i, -1)
        return (reduce(y, of_rows, *target, out_dtype=wire),)

    def keep(i: Array, arrived: Arrays, returned: Arrays) -> Arrays:
        part = to_words(arrived[0]).reshape((nodes, slices.rows, *y.shape[1:]))
        return (lax.dynamic_update_slice_in_dim(returned[0], part, i * slices.rows, 1),)

    # Words: XLA on CPU devices would convert all of a bfloat16 array to change a part of it.
    words = jnp.dtype(f"uint{8 * jnp.dtype(wire).itemsize}")
    returned = jnp.zeros((nodes, slices.block, *y.shape[1:]), words)
    (returned,) = slices.run(partial_sums, keep, (returned,), home=True)
    block = jnp.arange(nodes, dtype=jnp.int32) * slices.block
    at = jnp.where(crossing.rail_row >= 0, block[None] + crossing.rail_row, -1)
    returned = from_words(returned, wire).reshape((nodes * slices.block, *y.shape[1:]))
    others = reduce(returned, None, crossing.rail, at, out_dtype=accumulator)
    return (own + others).astype(call.out_dtype)


def gather_rows_weighted(
    call: Call, g: Array, weights: Array, y: Array, crossing: Crossing
) -> tuple[Array, Array]:
    """Cotangents of `y` and `weights` in `reduce_rows`, from that of its result."""
    nodes, tokens, k = crossing.deliver_slot.shape
    levels = Levels.of(crossing.topology)
    call = dataclasses.replace(call, zero_tail=True)
    rows, scales = gather_rows(call, (g, weights), crossing)
    assignment = crossing.from_assignment
    choice = jnp.maximum(assignment, 0) % max(k, 1)
    scale = jnp.take_along_axis(scales, choice[:, None], 1)
    # The rest is a weighted gather of rows that lie here.
    capacity, width = y.shape[0], math.prod(y.shape[1:])
    source = jnp.where(assignment >= 0, jnp.arange(capacity, dtype=jnp.int32), assignment)
    dy, dots = run(
        call.implementation,
        "gather_rows_weighted",
        rows.reshape(capacity, width),
        scale,
        y.reshape(capacity, width),
        jnp.minimum(source, 0),
        source,
        axis=Axis((), 1),
    )

    # Each dot product lies where its row lies: to the forwarder, over the link, to the owner.
    gather = functools.partial(
        run, call.implementation, "gather_rows", axis=levels.local, fanout=1, zero_tail=True
    )
    target = crossing.deliver_rank.reshape(-1), crossing.deliver_slot.reshape(-1)
    (back,) = gather((dots,), *target)
    back = levels.node.all_to_all(back.reshape(nodes, tokens * k)).reshape(-1)
    node = jnp.maximum(crossing.owner_node, 0)
    near = node == levels.node.rank()
    rail = jnp.where(near, levels.local.rank(), jnp.take_along_axis(crossing.rail, node, 1))
    token = jnp.arange(tokens, dtype=jnp.int32)[:, None]
    row = jnp.where(near, token, jnp.take_along_axis(crossing.rail_row, node, 1))
    at = (node * tokens + row) * k + jnp.arange(k, dtype=jnp.int32)[None]
    at = jnp.where(crossing.owner_node >= 0, at, -1)
    (home,) = gather((back,), rail.reshape(-1), at.reshape(-1))
    return dy.reshape(y.shape), home.reshape(weights.shape)


def _to_forwarders(call: Call, weights: Array, crossing: Crossing, levels: Levels) -> Array:
    """`[N, T, k]`: the weights of the rows that each block brings here."""
    (packed,) = run(
        call.implementation,
        "gather_rows",
        (weights,),
        crossing.pack_rank.reshape(-1),
        crossing.pack_token.reshape(-1),
        axis=levels.local,
        fanout=1,
        zero_tail=True,
    )
    return levels.node.all_to_all(packed.reshape(crossing.deliver_slot.shape))
