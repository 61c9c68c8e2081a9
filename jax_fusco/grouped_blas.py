"""The grouped matmul of CPU devices: custom calls over a BLAS, and their gradients.

One custom call is the forward, and with the kernel transposed and the indices swapped the backward
of rows and weights; the other is the backward of the kernel. docs/architecture.md has both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_fusco import ffi
from jax_fusco.mesh import struct, varying_axes

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


class Indices(NamedTuple):
    """Which assignments there are; `source` and `merge` [A] are None where they are 0, 1, ..."""

    group_sizes: jax.Array
    source: jax.Array | None
    merge: jax.Array | None


Operand = jax.Array | jax.ShapeDtypeStruct


def _or_none(array: jax.Array | None, dtype: Any, *row: int) -> Operand:
    """Arrays without elements stand for None in the custom calls."""
    return jax.ShapeDtypeStruct((0, *row), dtype) if array is None else array


def _call(
    name: str,
    shapes: list[tuple[tuple[int, ...], Any]],
    *operands: Operand,
    **attributes: int,
) -> Sequence[jax.Array]:
    """The custom call `jax_fusco_<name>`, which has no peers; `shapes` are (shape, dtype)."""
    ffi.register()
    absent = [x if isinstance(x, jax.ShapeDtypeStruct) else None for x in operands]
    given = [x for x in operands if not isinstance(x, jax.ShapeDtypeStruct)]
    varying = varying_axes(given)
    results = [struct(shape, dtype, varying) for shape, dtype in shapes]

    @functools.partial(jax.jit, inline=True)
    def call(*given: jax.Array) -> Sequence[jax.Array]:
        rest = iter(given)
        arrays = [
            next(rest) if x is None else ffi.no_elements(given[0], x.dtype, *x.shape[1:])
            for x in absent
        ]
        called = jax.ffi.ffi_call(f"jax_fusco_{name}", results, vmap_method="sequential")
        return called(*arrays, **attributes)

    return ffi.in_manual_axes(call)(*given)


def _matmul(
    rows: jax.Array,
    kernel: jax.Array,
    weights: jax.Array | None,
    indices: Indices,
    partner: jax.Array | None = None,
    *,
    num_rows: int,
    transposed: bool,
) -> tuple[jax.Array, jax.Array]:
    """(result [num_rows, m], each unweighted product's dot with its row of `partner` [A])."""
    each = [x for x in (indices.source, indices.merge, weights) if x is not None]
    count = (each[0] if each else rows).shape[0] if partner is not None else 0
    width = kernel.shape[1 if transposed else 2]
    out, dots = _call(
        "grouped_matmul",
        [((num_rows, width), rows.dtype), ((count,), jnp.float32)],
        rows,
        kernel,
        indices.group_sizes,
        _or_none(indices.source, jnp.int32),
        _or_none(indices.merge, jnp.int32),
        _or_none(weights, jnp.float32),
        _or_none(partner, rows.dtype, width),
        transposed=int(transposed),
    )
    return out, dots


def _outer(rows: jax.Array, g: jax.Array, weights: jax.Array | None, indices: Indices) -> jax.Array:
    """[E, n, m]: the sum of `outer(rows[source], weight * g[merge])` over each group."""
    shape = (indices.group_sizes.shape[0], rows.shape[1], g.shape[1])
    (out,) = _call(
        "grouped_outer",
        [(shape, rows.dtype)],
        rows,
        g,
        indices.group_sizes,
        _or_none(indices.source, jnp.int32),
        _or_none(indices.merge, jnp.int32),
        _or_none(weights, jnp.float32),
    )
    return out


def _backward(
    rows: jax.Array,
    kernel: jax.Array,
    weights: jax.Array | None,
    indices: Indices,
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    back = indices._replace(source=indices.merge, merge=indices.source)
    d_rows, d_weights = _matmul(
        g,
        kernel,
        weights,
        back,
        None if weights is None else rows,
        num_rows=rows.shape[0],
        transposed=True,
    )
    d_kernel = _outer(rows, g, weights, indices)
    return d_rows, d_kernel, None if weights is None else d_weights


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def grouped_matmul(
    num_rows: int,
    default: Callable[..., jax.Array] | None,
    rows: jax.Array,
    kernel: jax.Array,
    weights: jax.Array | None,
    indices: Indices,
) -> jax.Array:
    """The products, summed where `indices.merge` says, by the BLAS.

    With `default`, a function of the last four arguments, the platform is chosen while lowering:
    other platforms than CPU devices run it, and its gradients.
    """
    here = functools.partial(_matmul, num_rows=num_rows, transposed=False)
    return _choose(default, lambda *args: here(*args)[0], default, rows, kernel, weights, indices)


def _choose(choose: Any, here: Callable[..., Any], elsewhere: Any, *args: Any) -> Any:
    if choose is None:
        return here(*args)
    # Each is batched, whichever platform it will be; jax.lax.ragged_dot has no rule for that.
    elsewhere = jax.custom_batching.sequential_vmap(elsewhere)
    return lax.platform_dependent(*args, cpu=here, default=elsewhere)


def _forward(num_rows: int, default: Any, *args: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return grouped_matmul(num_rows, default, *args), args


def _pull(num_rows: int, default: Any, args: tuple[Any, ...], g: jax.Array) -> tuple[Any, ...]:
    def elsewhere(rows: Any, kernel: Any, weights: Any, indices: Indices, g: jax.Array) -> Any:
        pulled = jax.vjp(lambda *floats: default(*floats, indices), rows, kernel, weights)[1]
        return pulled(g)

    with jax.named_scope("jax_fusco.grouped_matmul_backward"):
        return *_choose(default, _backward, elsewhere, *args, g), None


grouped_matmul.defvjp(_forward, _pull)
