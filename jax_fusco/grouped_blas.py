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

from jax_fusco import ffi, mesh
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


def _outer(rows: jax.Array, weights: jax.Array | None, g: jax.Array, indices: Indices) -> jax.Array:
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


# The calls are the derivatives of one form, linear in each factor of it:
#
#   F(rows, kernel, weights, g) = sum over the assignments a, of group e, of
#                                 weights[a] * <rows[source[a]] kernel[e], g[merge[a]]>
#
# The forward is its derivative by `g`, the backward has those by the other factors. A gradient of
# one of them is again such derivatives, of F with the cotangent in the place of that factor: there
# are gradients of any order.
#
# `default` is None, or what other platforms than CPU devices run: a function of rows, kernel,
# weights and indices, whose gradients JAX knows. The platform is then chosen while lowering: inside
# the rules below, as autodiff of the choice would keep what either platform needs.
Default = Any


def _choose(default: Default, here: Callable[..., Any], elsewhere: Any, *args: Any) -> Any:
    if default is None:
        return here(*args)
    # Each is batched, whichever platform it will be; jax.lax.ragged_dot has no rule for that.
    elsewhere = jax.custom_batching.sequential_vmap(elsewhere)
    return lax.platform_dependent(*args, cpu=here, default=elsewhere)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def grouped_matmul(
    num_rows: int,
    default: Default,
    rows: jax.Array,
    kernel: jax.Array,
    weights: jax.Array | None,
    indices: Indices,
) -> jax.Array:
    """F by `g`: the products, summed where `indices.merge` says, by the BLAS."""

    def here(*args: Any) -> jax.Array:
        return _matmul(*args, num_rows=num_rows, transposed=False)[0]

    return _choose(default, here, default, rows, kernel, weights, indices)


def _by_rows_and_weights(
    default: Default,
    rows: jax.Array,
    kernel: jax.Array,
    weights: jax.Array | None,
    g: jax.Array,
    indices: Indices,
) -> tuple[jax.Array, jax.Array | None]:
    """F by `rows` and by `weights`; only the latter reads `rows`."""

    def here(rows: Any, kernel: Any, weights: Any, g: Any, indices: Indices) -> Any:
        swapped = indices._replace(source=indices.merge, merge=indices.source)
        partner = None if weights is None else rows
        by_rows, by_weights = _matmul(
            g, kernel, weights, swapped, partner, num_rows=rows.shape[0], transposed=True
        )
        return by_rows, None if weights is None else by_weights

    def elsewhere(rows: Any, kernel: Any, weights: Any, g: Any, indices: Indices) -> Any:
        return jax.vjp(
            lambda rows, weights: default(rows, kernel, weights, indices), rows, weights
        )[1](g)

    return _choose(default, here, elsewhere, rows, kernel, weights, g, indices)


_by_rows: Any = jax.custom_vjp(_by_rows_and_weights, nondiff_argnums=(0,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernel(
    default: Default,
    rows: jax.Array,
    weights: jax.Array | None,
    g: jax.Array,
    indices: Indices,
) -> jax.Array:
    """F by `kernel`."""

    def elsewhere(rows: Any, weights: Any, g: Any, indices: Indices) -> Any:
        shape = (indices.group_sizes.shape[0], rows.shape[1], g.shape[1])
        anywhere = mesh.vary(jnp.zeros(shape, rows.dtype), varying_axes((rows, g)))
        return jax.vjp(lambda kernel: default(rows, kernel, weights, indices), anywhere)[1](g)[0]

    return _choose(default, _outer, elsewhere, rows, weights, g, indices)


def _pull(num_rows: int, default: Default, args: tuple[Any, ...], g: jax.Array) -> tuple[Any, ...]:
    rows, kernel, weights, indices = args
    with jax.named_scope("jax_fusco.grouped_matmul_backward"):
        by_rows, by_weights = _by_rows(default, rows, kernel, weights, g, indices)
        return by_rows, _by_kernel(default, rows, weights, g, indices), by_weights, None


def _pull_by_rows(
    default: Default,
    args: tuple[Any, ...],
    cotangents: tuple[Any, Any],
) -> tuple[Any, ...]:
    rows, kernel, weights, g, indices = args
    x, w = cotangents  # in the place of rows and of weights
    count = g.shape[0]
    by_kernel: Any = _by_kernel(default, x, weights, g, indices)
    by_g: Any = grouped_matmul(count, default, x, kernel, weights, indices)
    if w is None:
        return jnp.zeros_like(rows), by_kernel, None, by_g, None
    by_rows, _ = _by_rows(default, rows, kernel, w, g, indices)
    _, by_weights = _by_rows(default, x, kernel, weights, g, indices)
    by_kernel += _by_kernel(default, rows, w, g, indices)
    by_g += grouped_matmul(count, default, rows, kernel, w, indices)
    return by_rows, by_kernel, by_weights, by_g, None


def _pull_by_kernel(default: Default, args: tuple[Any, ...], kernel: jax.Array) -> tuple[Any, ...]:
    rows, weights, g, indices = args
    by_rows, by_weights = _by_rows(default, rows, kernel, weights, g, indices)
    by_g = grouped_matmul(g.shape[0], default, rows, kernel, weights, indices)
    return by_rows, by_weights, by_g, None


grouped_matmul.defvjp(lambda *args: (grouped_matmul(*args), args[2:]), _pull)
_by_rows.defvjp(lambda *args: (_by_rows(*args), args[1:]), _pull_by_rows)
_by_kernel.defvjp(lambda *args: (_by_kernel(*args), args[1:]), _pull_by_kernel)
