"""One rank's part of the MoE layer: route, dispatch, experts, combine, on local arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

import jax_fusco as jf
from jax_fusco.choice import Implementation
from jax_fusco.flax.experts import ACTIVATIONS, dense_ffn, expert_ffn
from jax_fusco.flax.limited import RankLimitedRouter
from jax_fusco.flax.metrics import MoEMetrics, measure
from jax_fusco.flax.router import Router
from jax_fusco.grouped_matmul import reads_in_place
from jax_fusco.mesh import AxisName, expert_axis, vary, varying_axes
from jax_fusco.plan import expected_ranks
from jax_fusco.topology import Topology

Params = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What is static about a layer; `MoE` documents each."""

    num_experts: int
    top_k: int
    router: Router
    activation: str
    capacity_factor: float | None
    alignment: int
    implementation: Implementation
    topology: Topology | None
    rows: Literal["assignment", "token"] | None
    report_expert_ids: bool
    dtype: Any


@dataclasses.dataclass(frozen=True)
class LocalAxes:
    """Manual mesh axes by what they do: of the experts, of the tokens, of the hidden features."""

    expert: AxisName
    tokens: tuple[str, ...]
    model: str | None


def _rows_to_send(config: LayerConfig, num_ranks: int) -> Literal["assignment", "token"]:
    """`config.rows`, or what is faster; docs/grouped_matmul.md has the measurement."""
    if config.rows is not None:
        return config.rows
    ranks = expected_ranks(config.top_k, config.num_experts, num_ranks)
    if isinstance(config.router, RankLimitedRouter):
        ranks = min(ranks, config.router.max_ranks)
    few = ranks < config.top_k / 2
    return "token" if few and reads_in_place(config.dtype) else "assignment"


def _logits(params: Params, x: jax.Array) -> jax.Array:
    """[T, E] in float32 whatever the dtype of `x`: experts are chosen by small differences."""
    kernel = params["router_kernel"].astype(jnp.float32)
    logits = jnp.dot(x.astype(jnp.float32), kernel, precision=lax.Precision.HIGHEST)
    bias = params.get("router_bias")
    return logits if bias is None else logits + bias.astype(jnp.float32)[None]


def _once(bias: jax.Array | None, model: str | None) -> jax.Array | None:
    """`bias` on the first rank of the `model` axis, zeros on others: their outputs are summed."""
    if bias is None or model is None:
        return bias
    return jnp.where(lax.axis_index(model) == 0, bias, jnp.zeros_like(bias))


def moe_layer(
    config: LayerConfig, axes: LocalAxes, params: Params, x: jax.Array, mask: jax.Array | None
) -> tuple[tuple[jax.Array, jax.Array | None], MoEMetrics]:
    """`x` [..., d] and `mask` [...] of this rank -> ((y, expert ids), metrics).

    `params` holds this rank's shards under the names of `MoE`'s attributes. Masked tokens must be
    zero in `x`; they go to no expert. y [..., d] and ids [..., k] are of this rank's tokens (ids
    None where nobody asked for them); the metrics are of the whole mesh, and without ids.
    """
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    mask = None if mask is None else mask.reshape(-1)
    activation = ACTIVATIONS[config.activation][1]
    with jax.named_scope("moe_router"):
        logits = _logits(params, x)
        routing = config.router(logits, config.top_k, params.get("balance_bias"))
        ids = routing.expert_ids
        if mask is not None:
            ids = jnp.where(mask[:, None], ids, -1)
    x = x.astype(config.dtype)
    if axes.model is not None:
        # Here, and not where the kernels meet the rows, so that backward sums over the model axis
        # one row per token and not k of them.
        x = vary(x, varying_axes(lax.axis_index(axes.model)))
    num_ranks, capacity = expert_axis(axes.expert).size, None
    if config.capacity_factor is not None:
        capacity = jf.capacity(
            x.shape[0],
            config.top_k,
            config.num_experts,
            num_ranks,
            config.capacity_factor,
            config.alignment,
        )
    plan = jf.make_plan(
        ids,
        rows=_rows_to_send(config, num_ranks),
        axis_name=axes.expert,
        num_experts=config.num_experts,
        capacity=capacity,
        alignment=config.alignment,
        implementation=config.implementation,
        topology=None if axes.expert is None else config.topology,
    )
    # Undefined, not zero: grouped_matmul masks the rows past the last group.
    if isinstance(plan, jf.TokenPlan):
        rows, here = jf.dispatch((x, routing.weights), plan, padding="undefined")
        weights, index = None, {"source": plan.source, "weights": plan.weights_of(here)}
    else:
        rows = jf.dispatch(x, plan, padding="undefined")
        weights, index = routing.weights, {}
    with jax.named_scope("moe_experts"):
        rows = expert_ffn(
            rows,
            plan.group_sizes,
            params["wi_kernel"],
            params["wo_kernel"],
            params.get("wi_bias"),
            _once(params.get("wo_bias"), axes.model),
            activation=activation,
            **index,
        )
    y = jf.combine(rows, weights, plan)
    if "shared_wi_kernel" in params:
        with jax.named_scope("moe_shared_experts"):
            shared = params["shared_wi_kernel"], params["shared_wo_kernel"]
            y = y + dense_ffn(x, *shared, activation=activation)
    if axes.model is not None:
        y = lax.psum(y, axes.model)
    with jax.named_scope("moe_metrics"):
        metrics = measure(
            logits, routing, ids, mask, plan.num_dropped, plan.num_invalid, axes.tokens
        )
    reported = ids.reshape(*shape[:-1], ids.shape[-1]) if config.report_expert_ids else None
    return (y.reshape(shape), reported), metrics
