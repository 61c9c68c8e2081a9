"""What one MoE layer reports of its routing, over all tokens of the mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_fusco.flax.router import Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEMetrics:
    """Routing of one layer, summed over the mesh; the same values on every device. A pytree.

    Only `expert_ids` is of each token, sharded as the tokens are, and therefore there on request
    alone: sums may be logged, averaged and returned from a shard_map by one `PartitionSpec()`.

    Attributes:
      load_balance_loss: E * sum_e (share of assignments to e) * (mean probability of e), 1 if
        balanced. Differentiable through the probabilities. Source: Fedus et al. 2021, "Switch
        Transformers" (arXiv 2101.03961), equations 4-6, with shares counted over all k choices.
      router_z_loss: mean squared log-sum-exp of the logits, differentiable. Source: Zoph et al.
        2022, "ST-MoE" (arXiv 2202.08906), equation 5.
      tokens_per_expert: assignments the router made to each expert, dropped ones included.
      dropped: assignments that found no room in a receive buffer.
      invalid: expert ids outside [-1, num_experts), which only a router of one's own can produce.
      expert_ids: the experts of each token, -1 where it is masked, for `jax_fusco.RoutingStats`;
        None, a pytree without leaves, unless the block has `report_expert_ids`.
    """

    load_balance_loss: Float[Array, ""]
    router_z_loss: Float[Array, ""]
    tokens_per_expert: Int32[Array, " E"]
    dropped: Int32[Array, ""]
    invalid: Int32[Array, ""]
    expert_ids: Int32[Array, "*batch k"] | None = None


def measure(
    logits: jax.Array,
    routing: Routing,
    expert_ids: jax.Array,
    mask: jax.Array | None,
    num_dropped: jax.Array,
    num_invalid: jax.Array,
    token_axes: tuple[str, ...],
) -> MoEMetrics:
    """MoEMetrics from one shard's tokens, summed over the manual mesh axes `token_axes`.

    Args:
      logits: [T, E] float32.
      routing: what the router said of these tokens.
      expert_ids: [T, k], -1 where a token is masked.
      mask: [T] bool, True for real tokens; None means all.
      num_dropped, num_invalid: of this shard's plan.
      token_axes: the axes that tokens are sharded over.
    """
    num_experts = logits.shape[1]
    real = jnp.ones(logits.shape[:1], jnp.float32) if mask is None else mask.astype(jnp.float32)
    # An id of -1 would wrap around to the last expert.
    counted = jnp.where(expert_ids < 0, num_experts, expert_ids).reshape(-1)
    sums = (
        real.sum(),
        real @ routing.probs,
        real @ jnp.square(jax.nn.logsumexp(logits, axis=-1)),
        jnp.bincount(counted, length=num_experts).astype(jnp.int32),
        num_dropped,
        num_invalid,
    )
    tokens, probs, z, load, dropped, invalid = lax.psum(sums, token_axes) if token_axes else sums
    tokens = jnp.maximum(tokens, 1.0)
    assignments = jnp.maximum(load.sum(), 1).astype(jnp.float32)
    shares = lax.stop_gradient(load.astype(jnp.float32) / assignments)
    return MoEMetrics(
        load_balance_loss=num_experts * jnp.dot(shares, probs / tokens),
        router_z_loss=z / tokens,
        tokens_per_expert=load,
        dropped=dropped,
        invalid=invalid,
    )
