"""Checks of arguments: one sentence that names the argument, what came, and what is needed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def array(name: str, value: Any) -> jax.Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: got {type(value).__name__}, need an array") from error


def dtype_of(name: str, value: Any) -> Any:
    try:
        return jnp.dtype(value)
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, need a dtype") from None


def floating(name: str, dtype: Any) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name}: got dtype {dtype}, need a floating dtype")


def weights(value: Any, shape: tuple[int, ...]) -> jax.Array:
    """Router weights: floating, `[T, k]`."""
    found = array("weights", value)
    floating("weights", found.dtype)
    if found.shape != shape:
        raise ValueError(f"weights: got shape {found.shape}, need {shape}")
    return found


def axes(name: str, value: Any) -> tuple[str, ...]:
    """The mesh axes that `value` names, not None."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple | list) or not all(isinstance(each, str) for each in names):
        raise TypeError(f"{name}: got {value!r}, need a mesh axis name, a tuple of them, or None")
    return tuple(names)


def above_zero(name: str, number: Any) -> None:
    real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not (real and 0 < float(number) < math.inf):
        raise ValueError(f"{name}: got {number!r}, need a finite number above 0")


def payload(name: str, x: jax.Array, rows: str | None, number: int | None) -> None:
    """A payload has a dtype of 1, 2, 4 or 8 whole bytes, and `number` leading rows (None: any)."""
    extended = jnp.issubdtype(x.dtype, jax.dtypes.extended)
    packed = not extended and x.dtype.name.startswith(("int2", "int4", "uint2", "uint4", "float4"))
    if extended or packed or x.dtype.itemsize not in (1, 2, 4, 8):
        raise TypeError(f"{name}: got dtype {x.dtype}, need one of 8, 16, 32 or 64 bits")
    if not x.ndim or (number is not None and x.shape[0] != number):
        need = "rows along a leading dimension"
        if rows is not None:
            need = f"{number} rows in its first dimension, one for each {rows}"
        raise ValueError(f"{name}: got shape {x.shape}, need {need}")


def table(name: str, value: Any, ranks: int) -> jax.Array:
    """`value` as int32 `[K]`, K a multiple of `ranks`."""
    found = array(name, value)
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise TypeError(f"{name}: got dtype {found.dtype}, need an integer dtype")
    if found.ndim != 1 or not found.size or found.size % ranks:
        raise ValueError(
            f"{name}: got shape {found.shape}, need one dimension, a multiple of {ranks} ranks"
        )
    return found.astype(jnp.int32)


def subgroups(groups: Sequence[Sequence[int]], size: int) -> tuple[tuple[int, ...], ...]:
    """`axis_index_groups` as tuples: all of `size` indices, in groups of one length."""
    try:
        found = tuple(tuple(int(index) for index in group) for group in groups)
    except TypeError:
        raise TypeError(
            f"axis_index_groups: got {groups!r}, need lists of axis indices, or None"
        ) from None
    members = sorted(index for group in found for index in group)
    if members != list(range(size)) or len({len(group) for group in found}) != 1:
        raise ValueError(
            f"axis_index_groups: got {groups}, need equally long lists that hold each of the "
            f"{size} axis indices once"
        )
    return found
