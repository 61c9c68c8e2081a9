"""The experts' feed-forward network on rows grouped by expert, and the dense one beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jax_fusco.grouped_matmul import grouped_matmul

Activation = Callable[..., jax.Array]


def clamped_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """gpt-oss's activation: `(up + 1) * gate * sigmoid(1.702 * gate)`, both clamped at 7.

    Source: reference code of OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (arXiv 2508.10925).
    """
    gate = jnp.minimum(gate, 7.0)
    return (jnp.clip(up, -7.0, 7.0) + 1.0) * gate * jax.nn.sigmoid(1.702 * gate)


# Name -> (how many projections of the input it takes, the function of them).
ACTIVATIONS: dict[str, tuple[int, Activation]] = {
    "swiglu": (2, lambda gate, up: jax.nn.silu(gate) * up),
    "geglu": (2, lambda gate, up: jax.nn.gelu(gate) * up),
    "clamped_swiglu": (2, clamped_swiglu),
    "silu": (1, jax.nn.silu),
    "gelu": (1, jax.nn.gelu),
    "relu": (1, jax.nn.relu),
}


def _add_bias(
    rows: jax.Array, bias: jax.Array | None, group_sizes: jax.Array, **merge: Any
) -> jax.Array:
    """`rows` [C, m] plus each group's `bias` [E_local, m]."""
    if bias is None:
        return rows
    # A grouped matmul of ones, and not a gather, because its gradient masks the undefined rows.
    ones = jnp.ones((merge["merge"].shape[0] if merge else rows.shape[0], 1), rows.dtype)
    return rows + grouped_matmul(ones, bias[:, None, :].astype(rows.dtype), group_sizes, **merge)


def _activate(hidden: jax.Array, num_projections: int, activation: Activation) -> jax.Array:
    """`hidden` [N, p * h], p projections side by side -> [N, h]."""
    width = hidden.shape[-1] // num_projections
    return activation(*(hidden[:, i * width : (i + 1) * width] for i in range(num_projections)))


def expert_ffn(
    rows: Float[Array, "C d"],
    group_sizes: Int32[Array, " E_local"],
    wi: Float[Array, "E_local d p h"],
    wo: Float[Array, "E_local h d"],
    wi_bias: Float[Array, "E_local p h"] | None = None,
    wo_bias: Float[Array, "E_local d"] | None = None,
    *,
    activation: Activation,
    source: Int32[Array, " A"] | None = None,
    weights: Float[Array, " A"] | None = None,
) -> Float[Array, "C d"]:
    """The experts' outputs for rows grouped by expert.

    With `source`, assignment a of the groups reads row `source[a]`, and each row of the result is
    the sum of its assignments' outputs, weighted.

    `MoE` leaves the rows past the last group undefined: `grouped_matmul` never reads them, forward
    or in its gradients, so NaN there spreads to nothing.
    """
    num_local, features, num_projections, _ = wi.shape
    wi = wi.reshape(num_local, features, -1).astype(rows.dtype)
    hidden = grouped_matmul(rows, wi, group_sizes, source=source)
    if wi_bias is not None:
        hidden = _add_bias(hidden, wi_bias.reshape(num_local, -1), group_sizes)
    hidden = _activate(hidden, num_projections, activation)
    merge: dict[str, Any] = {}
    if source is not None:
        merge = {"merge": source, "merge_weights": weights, "num_rows": rows.shape[0]}
    out = grouped_matmul(hidden, wo.astype(rows.dtype), group_sizes, **merge)
    return _add_bias(out, wo_bias, group_sizes, **merge)


def dense_ffn(
    x: Float[Array, "T d"],
    wi: Float[Array, "d p h"],
    wo: Float[Array, "h d"],
    *,
    activation: Activation,
) -> Float[Array, "T d"]:
    """The same network with one set of kernels for all rows: the shared experts."""
    features, num_projections, _ = wi.shape
    hidden = x @ wi.reshape(features, -1).astype(x.dtype)
    return _activate(hidden, num_projections, activation) @ wo.astype(x.dtype)
