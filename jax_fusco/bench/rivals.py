"""The two shuffles that JAX users write today, each in its best formulations on XLA:CPU.

* **ring**: every rank all-gathers all tokens and ids and picks the rows of its own experts; after
  the experts it weights and sums them per token, and a reduce-scatter brings the sums home
  (MaxText's `use_ring_of_experts`, Levanter's ring).
* **padded**: every rank sorts its assignments by expert, packs them into slices of one capacity for
  each destination, exchanges the slices with a dense `all_to_all` and sorts what came by expert;
  the rows go back the same way and are weighted and summed at home (GShard and its heirs).

Every function runs inside `jax.shard_map` over `AXIS`. A rival drops nothing: its buffers hold the
measured routing. Rows past the last group hold whatever is cheapest to put there.

What can be written in several ways is an option, and the benchmark counts the fastest for each
measurement:

* `transport`: how rows travel, see `rows`.
* `sums`: "gather" reads each token's rows through the inverse permutation; "scatter32" and
  "scatter16" add each row to its token in float32, or in the rows' own bf16 (Levanter's default).
* `reduce` (ring): "psum_scatter", or "all_to_all" of the partial sums followed by a local sum.
* `helped`: permutations, sums and collectives carry hand-written adjoints, as MaxText's sorts do.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jax_fusco.bench import rows as rw
from jax_fusco.bench.rows import AXIS, Permutation, Transport


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of one shuffle: ranks R, tokens T on a rank, experts per token k, experts E, row
    length d, rows C of a receive buffer, rows of a padded slice between one pair of ranks."""

    ranks: int
    tokens: int
    k: int
    experts: int
    features: int
    capacity: int
    pair_capacity: int

    @property
    def local_experts(self) -> int:
        return self.experts // self.ranks


class Shuffle(Protocol):
    """What the benchmark asks of a contestant; a plan is any pytree of arrays."""

    @property
    def name(self) -> str: ...

    def plan(self, ids: jax.Array) -> Any: ...

    def group_sizes(self, plan: Any) -> jax.Array: ...

    def dispatch(self, x: jax.Array, plan: Any) -> jax.Array: ...

    def combine(self, y: jax.Array, weights: jax.Array, plan: Any) -> jax.Array: ...


FAMILIES = (
    "jax_fusco",
    "jax_fusco/zero",
    "ring",
    "padded",
    "ring/helped",
    "padded/helped",
    "limit",
    "limit/once",
    "launch",
)


def family_of(name: str) -> str:
    """Contestants of one family stand for one way to shuffle; the fastest counts. It is the first
    part of a name, or all of it where it stands alone."""
    return name if name in FAMILIES else name.split("/")[0]


Sums = Literal["gather", "scatter32", "scatter16"]


def _sum(y: jax.Array, weights: jax.Array, p: Permutation, sums: Sums, helped: bool) -> jax.Array:
    if helped:
        return rw.helped_sum(y, weights, p)
    if sums == "gather":
        return rw.sum_rows(y, weights, p.slots)
    dtype = jnp.float32 if sums == "scatter32" else y.dtype
    return rw.scatter_rows(y, weights, p, dtype).astype(jnp.float32)


class RingPlan(NamedTuple):
    """Over the all-gathered tokens: `rows.slots` is `[R * T, k]`."""

    rows: Permutation
    group_sizes: jax.Array


@dataclasses.dataclass(frozen=True)
class Ring:
    """All-gather, local select, weighted sum, reduce-scatter."""

    sizes: Sizes
    transport: Transport = "rows"
    sums: Sums = "gather"
    reduce: Literal["psum_scatter", "all_to_all"] = "psum_scatter"
    helped: bool = False

    @property
    def name(self) -> str:
        if self.helped:
            return "ring/helped"
        return f"ring/{self.transport}/{self.sums}/{self.reduce}"

    def plan(self, ids: jax.Array) -> RingPlan:
        s = self.sizes
        everyone = lax.all_gather(ids, AXIS, tiled=True).reshape(-1)
        local = everyone - lax.axis_index(AXIS) * s.local_experts
        local = jnp.where((local >= 0) & (local < s.local_experts), local, s.local_experts)
        order = rw.sorted_positions(local, s.local_experts + 1)
        counts = jnp.bincount(local, length=s.local_experts + 1).astype(jnp.int32)[:-1]
        source = order[: s.capacity]
        source = jnp.pad(source, (0, s.capacity - source.shape[0]))
        used = jnp.arange(s.capacity) < counts.sum()
        slots = rw.inverse(source, everyone.shape[0], used).reshape(-1, s.k)
        return RingPlan(Permutation(jnp.where(used, source, 0), slots), counts)

    def group_sizes(self, plan: RingPlan) -> jax.Array:
        return plan.group_sizes

    def dispatch(self, x: jax.Array, plan: RingPlan) -> jax.Array:
        if self.helped:
            return rw.helped_take(rw.helped_all_gather(x), plan.rows)
        everyone = lax.all_gather(rw.encode(x, self.transport), AXIS, tiled=True)
        return rw.decode(rw.take(everyone, plan.rows.row), x.dtype)

    def combine(self, y: jax.Array, weights: jax.Array, plan: RingPlan) -> jax.Array:
        everyone = lax.all_gather(weights, AXIS, tiled=True)
        partial = _sum(y, everyone, plan.rows, self.sums, self.helped)
        return rw.sum_scatter(partial, y.dtype, self.reduce)


class PaddedPlan(NamedTuple):
    """`send` packs assignments into R slices, `receive` orders what came by expert."""

    send: Permutation
    receive: Permutation
    group_sizes: jax.Array


@dataclasses.dataclass(frozen=True)
class Padded:
    """Sort by destination, padded `all_to_all`, sort by expert; and back."""

    sizes: Sizes
    transport: Transport = "rows"
    sums: Sums = "gather"
    helped: bool = False

    @property
    def name(self) -> str:
        return "padded/helped" if self.helped else f"padded/{self.transport}/{self.sums}"

    def plan(self, ids: jax.Array) -> PaddedPlan:
        s = self.sizes
        ids = ids.reshape(-1)
        order = rw.sorted_positions(ids, s.experts)
        counts = jnp.bincount(ids, length=s.experts).astype(jnp.int32)
        per_rank = counts.reshape(s.ranks, -1).sum(1)
        place = jnp.arange(s.pair_capacity, dtype=jnp.int32)
        packed = rw.starts(per_rank)[:, None] + place
        filled = (place < per_rank[:, None]).reshape(-1)
        source = rw.take(order, jnp.clip(packed.reshape(-1), 0, ids.shape[0] - 1))
        send_slots = rw.inverse(source, ids.shape[0], filled).reshape(-1, s.k)
        send = Permutation(jnp.where(filled, source, 0), send_slots)
        came = lax.all_to_all(counts.reshape(s.ranks, -1), AXIS, 0, 0, tiled=True)
        return PaddedPlan(send, self._receive(came), came.sum(0))

    def _receive(self, came: jax.Array) -> Permutation:
        """Each slice comes sorted by expert, so the counts `[R, E_local]` say where every row
        belongs: no second sort."""
        s = self.sizes
        cells = came.T.reshape(-1)
        in_slice = (jnp.cumsum(came, 1) - came).T.reshape(-1)
        base = in_slice + jnp.tile(jnp.arange(s.ranks) * s.pair_capacity, s.local_experts)
        shift = (base - rw.starts(cells)).astype(jnp.int32)
        rows = jnp.arange(s.capacity, dtype=jnp.int32)
        used = rows < cells.sum()
        take = rows + jnp.repeat(shift, cells, total_repeat_length=s.capacity)
        take = jnp.where(used, take, 0)
        back = rw.inverse(take, s.ranks * s.pair_capacity, used)
        return Permutation(take, back[:, None])

    def group_sizes(self, plan: PaddedPlan) -> jax.Array:
        return plan.group_sizes

    def _move(self, rows: jax.Array, p: Permutation) -> jax.Array:
        return rw.helped_take(rows, p) if self.helped else rw.take(rows, p.row)

    def _exchange(self, rows: jax.Array) -> jax.Array:
        if self.helped:
            return rw.helped_all_to_all(rows)
        return lax.all_to_all(rows, AXIS, 0, 0, tiled=True)

    def dispatch(self, x: jax.Array, plan: PaddedPlan) -> jax.Array:
        bits = x if self.helped else rw.encode(x, self.transport)
        came = self._exchange(self._move(bits, plan.send))
        return rw.decode(self._move(came, plan.receive), x.dtype)

    def combine(self, y: jax.Array, weights: jax.Array, plan: PaddedPlan) -> jax.Array:
        # The way back is the inverse permutation; slice rows that held nothing bring any row.
        there = plan.receive
        last = y.shape[0] - 1
        turn = Permutation(jnp.minimum(there.slots[:, 0], last), there.source[:, None])
        bits = y if self.helped else rw.encode(y, self.transport)
        came = rw.decode(self._exchange(self._move(bits, turn)), y.dtype)
        return _sum(came, weights, plan.send, self.sums, self.helped).astype(y.dtype)


Rival = Ring | Padded


def rivals_for(op: str, sizes: Sizes) -> list[Rival]:
    """The formulations worth trying for one measurement ("plan", "dispatch", "combine", "forward",
    "layer", or "train", which is forward and backward under plain autodiff)."""
    ring, padded = functools.partial(Ring, sizes), functools.partial(Padded, sizes)
    if op == "plan":
        return [ring(), padded()]
    if op == "dispatch":
        ways: tuple[Transport, ...] = ("rows", "u16", "u32")
        return [kind(way) for kind in (ring, padded) for way in ways]
    if op == "train":
        # Gathered sums are left out: autodiff turns each of their k gathers into a scatter-add.
        rivals = [ring(sums="scatter32"), ring(sums="scatter16"), padded(sums="scatter16")]
        return [*rivals, ring(helped=True), padded(helped=True)]
    if op == "layer":
        return [ring("u16"), padded("u16")]
    rivals = [ring("u16"), ring("u16", reduce="all_to_all"), padded("u16"), padded("u32")]
    if op == "combine":
        return [*rivals, ring(sums="scatter16")]
    return [*rivals, ring("u32")]
