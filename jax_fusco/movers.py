"""The row movers between the ranks of one axis, by whichever implementation was chosen.

`gather_rows` takes rows to their slots, `reduce_rows` sums them back, `gather_rows_weighted` is the
backward of a weighted sum. `jax_fusco.two_level` has the same three over nodes.
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
from jax_fusco.mesh import Axis

IMPLEMENTATIONS = {"xla": reference, "fused": ffi}

# Indices of one shuffle: (slot_rank, slot, source_rank, source, chain).
Indices = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static about one call: where it runs, and the options of its movers."""

    implementation: str
    axis: Axis
    zero_tail: bool = True
    out_dtype: Any = None


def run(implementation: str, name: str, *args: Any, **static: Any) -> Any:
    """Calls the mover `name` of an implementation; "platform" chooses while lowering."""
    if implementation != "platform":
        return getattr(IMPLEMENTATIONS[implementation], name)(*args, **static)
    branches = {key: functools.partial(getattr(module, name), **static)
                for key, module in IMPLEMENTATIONS.items()}  # fmt: skip
    return lax.platform_dependent(*args, cpu=branches["fused"], default=branches["xla"])


def make_integers(
    implementation: str, expert_ids: jax.Array, *, chained: bool = False, **static: Any
) -> tuple[Any, ...]:
    """The integers of a shuffle, in the order of the fields of `Plan`.

    `chained`: with the chain by which the engine of GPUs reads a token once, where there is one.
    """
    chained = chained and implementation == "fused" and ffi.may_run_on_gpu()
    static["chain_rows"] = static["capacity"] if chained else 0
    return run(implementation, "plan", expert_ids, **static)


def is_summable(dtype: Any) -> bool:
    """Whether the movers sum rows of this dtype as they are."""
    return dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)


def gather_rows(call: Call, rows: tuple[jax.Array, ...], indices: Indices) -> tuple[jax.Array, ...]:
    """Each token's row of each array to the token's slots."""
    slot_rank, _, source_rank, source, chain = indices
    return run(
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


def reduce_rows(call: Call, y: jax.Array, weights: jax.Array | None, indices: Indices) -> jax.Array:
    """The weighted sum over each token's slots."""
    slot_rank, slot, *_ = indices
    return run(
        call.implementation,
        "reduce_rows",
        y,
        weights,
        slot_rank,
        slot,
        axis=call.axis,
        out_dtype=call.out_dtype,
    )


def gather_rows_weighted(
    call: Call, g: jax.Array, weights: jax.Array, y: jax.Array, indices: Indices
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of `y` and `weights` in `reduce_rows`, from that of its result."""
    slot_rank, slot, source_rank, source, chain = indices
    if not weights.size:
        return jnp.zeros_like(y), jnp.zeros_like(weights)
    width = math.prod(y.shape[1:])
    dy, dots = run(
        call.implementation,
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
        call.implementation,
        "gather_rows",
        (dots,),
        slot_rank.reshape(-1),
        slot.reshape(-1),
        axis=call.axis,
        fanout=1,
        zero_tail=True,
    )
    return dy.reshape(y.shape), home.reshape(weights.shape)
