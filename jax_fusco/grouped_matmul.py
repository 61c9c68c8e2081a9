"""Grouped matmuls that read rows through an index and sum results into one.

The idea of reading through the index in an expert's first product and summing in its second is
Occult's (arXiv 2505.13345).
"""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_fusco import blas, checks, grouped_blas, mesh
from jax_fusco.grouped_blas import Indices
from jax_fusco.plan import whole
from jax_fusco.reference import accumulation_dtype

IMPLEMENTATIONS = ("xla", "blas", "tokamax")


def grouped_matmul(
    rows: Float[Array, "N n"],
    kernel: Float[Array, "E n m"],
    group_sizes: Int32[Array, " E"],
    *,
    source: Int32[Array, " A"] | None = None,
    merge: Int32[Array, " A"] | None = None,
    merge_weights: Float[Array, " A"] | None = None,
    num_rows: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "M m"]:
    """Multiplies each row with the kernel of its group.

    There are A assignments, grouped: the first `group_sizes[0]` belong to group 0, the next to
    group 1 and so on. Assignment a of group e is the product of row `source[a]` (without a
    `source`: row a) with `kernel[e]`. Without `merge` it is row a of the result; with it, row r of
    the result is the sum of `merge_weights[a] * product[a]` over the assignments with
    `merge[a] == r`, a ascending, in float32 (float64 for float64 rows), rounded once.

    Products are summed in float32 at least. "blas" gives the same bits on every run and for every
    number of threads; the others add to `merge` as XLA's scatter does, on GPUs in any order unless
    XLA is told to be deterministic. Implementations differ in the order of the sum over n: they
    agree within `n * eps * sum |row * kernel|`, and "xla" rounds each assignment's part of the
    gradient of `rows` to their dtype before it sums them, where there is a `source`.

    Args:
      rows: floating `[N, n]`.
      kernel: `[E, n, m]` of the dtype of `rows`.
      group_sizes: sizes that sum to at most A. Assignments past them are never read, so that NaN
        there does not spread; their rows of the result, and their gradients, are zero.
      source: row of `rows` for each assignment, negative: a row of zeros. None: A is N.
      merge: row of the result for each assignment, negative: the product goes nowhere.
      merge_weights: a factor for each assignment; None means ones.
      num_rows: M, needed with `merge`; without it M is A.
      implementation: "xla" (`jax.lax.ragged_dot`; any platform), "blas" (OpenBLAS on CPU devices;
        bfloat16, float16, float32), "tokamax" (`tokamax.ragged_dot`, where it is installed; meant
        for GPUs), or None: "blas" where it can serve, else "xla".

    Returns:
      `[M, m]` of the dtype of `rows`. Differentiable in `rows`, `kernel` and `merge_weights`.

    Raises:
      TypeError, ValueError: an argument's type or value, named in the message. Sizes and indices
        that do not fit are an error of "blas" at run time, and unspecified results elsewhere.
    """
    rows, kernel = checks.array("rows", rows), checks.array("kernel", kernel)
    _check_matrices(rows, kernel)
    sizes = _index("group_sizes", group_sizes, None, "for each group")
    if sizes.shape[0] != kernel.shape[0]:
        raise ValueError(
            f"kernel: got {kernel.shape[0]} groups, need {sizes.shape[0]} as group_sizes has "
            "(inside jax.shard_map those of this rank's experts)"
        )
    if source is not None:
        source = _index("source", source, None, "for each assignment")
    count = rows.shape[0] if source is None else source.shape[0]
    if merge is not None:
        merge = _index("merge", merge, count, "for each assignment")
        if num_rows is None:
            raise ValueError("num_rows: got None, need the rows of the result with merge")
        num_rows = whole("num_rows", num_rows, 0)
    elif num_rows is not None:
        raise ValueError(f"num_rows: got {num_rows!r}, need None without merge")
    weights = _weights(merge_weights, merge, count, rows.dtype)
    chosen = _choose(implementation, rows.dtype)
    result_rows = count if num_rows is None else num_rows
    if not (count and result_rows and rows.shape[0]):
        return jnp.zeros((result_rows, kernel.shape[2]), rows.dtype)
    with jax.named_scope("jax_fusco.grouped_matmul"):
        # Outside the custom_vjp, so that cotangents vary over the axes that their operands do.
        args = (rows, kernel, weights, Indices(sizes, source, merge))
        args = mesh.vary(mesh.unshard(args), mesh.varying_axes(args))
        plain = _Plain(result_rows, chosen == "tokamax")
        if chosen in ("xla", "tokamax"):
            return plain(*args)
        default = plain if chosen == "platform" else None
        return grouped_blas.grouped_matmul(result_rows, default, *args)


def _tokamax() -> Any:
    return importlib.import_module("tokamax")


class _Plain:
    """The products from JAX alone, with JAX's own gradients; the meaning of all the others."""

    def __init__(self, num_rows: int, tokamax: bool):
        self.num_rows, self.tokamax = num_rows, tokamax

    def __hash__(self) -> int:
        return hash((self.num_rows, self.tokamax))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Plain) and vars(self) == vars(other)

    def __call__(
        self, rows: jax.Array, kernel: jax.Array, weights: jax.Array | None, indices: Indices
    ) -> jax.Array:
        sizes, source, merge = indices
        wide = accumulation_dtype(rows.dtype)
        if source is not None:
            # In float32, because the gradient of a gather is a sum.
            held = rows.astype(wide).at[jnp.where(source < 0, rows.shape[0], source)]
            x = held.get(mode="fill", fill_value=0).astype(rows.dtype)
        else:
            x = rows
        real = (jnp.arange(x.shape[0]) < sizes.sum())[:, None]
        # On both sides: zeros must come out, forward and backward, whatever the products do there.
        x = jnp.where(real, x, 0)
        out_dtype = rows.dtype if merge is None else wide
        ragged_dot = _tokamax().ragged_dot if self.tokamax else lax.ragged_dot
        try:
            y = ragged_dot(x, kernel, sizes, preferred_element_type=out_dtype)
        except NotImplementedError as error:
            blas = "" if x.dtype == jnp.float64 else "implementation='blas' on CPU devices, or "
            raise NotImplementedError(
                f"ragged_dot cannot do this ({error}); under jax.vmap use {blas}jax.lax.map"
            ) from error
        y = jnp.where(real, y, 0)
        if merge is None:
            return y
        goes = (merge >= 0) if source is None else (merge >= 0) & (source >= 0)
        goes &= real[:, 0]
        if weights is not None:
            y = jnp.where(goes, weights, 0)[:, None] * y
        y = jnp.where(goes[:, None], y, 0)
        out = jnp.zeros((self.num_rows, y.shape[1]), wide)
        out = mesh.vary(out, mesh.varying_axes(y))
        return out.at[jnp.where(goes, merge, self.num_rows)].add(y, mode="drop").astype(rows.dtype)


def _check_matrices(rows: jax.Array, kernel: jax.Array) -> None:
    if not jnp.issubdtype(rows.dtype, jnp.floating) or rows.dtype.itemsize < 2:
        raise TypeError(f"rows: got dtype {rows.dtype}, need a floating dtype of 2 bytes or more")
    if rows.ndim != 2:
        raise ValueError(f"rows: got shape {rows.shape}, need [rows, n]")
    if kernel.dtype != rows.dtype:
        raise TypeError(f"kernel: got dtype {kernel.dtype}, need {rows.dtype} as rows")
    if kernel.ndim != 3 or kernel.shape[1] != rows.shape[1]:
        raise ValueError(f"kernel: got shape {kernel.shape}, need [groups, {rows.shape[1]}, m]")


def _index(name: str, value: Any, count: int | None, what: str) -> jax.Array:
    array = checks.array(name, value)
    if array.dtype != jnp.int32:
        raise TypeError(f"{name}: got dtype {array.dtype}, need int32")
    if array.ndim != 1 or (count is not None and array.shape[0] != count):
        need = "one dimension, one entry" if count is None else f"{count} entries, one"
        raise ValueError(f"{name}: got shape {array.shape}, need {need} {what}")
    return array


def _weights(weights: Any, merge: Any, count: int, dtype: Any) -> jax.Array | None:
    """In the precision of the sum."""
    if weights is None:
        return None
    if merge is None:
        raise ValueError("merge_weights: got weights without merge, need None or merge too")
    weights = checks.array("merge_weights", weights)
    checks.floating("merge_weights", weights.dtype)
    if weights.shape != (count,):
        raise ValueError(
            f"merge_weights: got shape {weights.shape}, need {count} entries, one for each "
            "assignment"
        )
    return weights.astype(accumulation_dtype(dtype))


def reads_in_place(dtype: Any) -> bool:
    """Whether it is known here that rows behind a `source` will be read without a copy of them."""
    return _choose(None, dtype) == "blas"


def _choose(implementation: str | None, dtype: Any) -> str:
    """One of the implementations, or "platform" where only lowering can tell."""
    if implementation is None:
        # GPUs: tokamax must be asked for by name until runs on GPUs have shown it.
        if _why_not("blas", dtype) is not None:
            return "xla"
        return "platform" if mesh.platform() is None else "blas"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: got {implementation!r}, need 'xla', 'blas', 'tokamax', or None"
        )
    reason = _why_not(implementation, dtype)
    if reason is not None:
        raise ValueError(f"implementation: got {implementation!r}, {reason}")
    return implementation


def _why_not(name: str, dtype: Any) -> str | None:
    """Why an implementation cannot serve here, as far as can be known while tracing."""
    if name == "tokamax":
        try:
            _tokamax()
        except ImportError as error:
            return f"need pip install tokamax ({error}), or use 'xla'"
    if name == "blas":
        if dtype not in grouped_blas.DTYPES:
            return f"need bfloat16, float16 or float32 rows (got {dtype}), use 'xla'"
        if mesh.platform() not in (None, "cpu"):
            return f"need CPU devices (got {mesh.platform()}), use 'xla'"
        if not blas.is_installed():
            return "need pip install scipy-openblas32, or use 'xla'"
    return None
