"""A router that sends no token to more than N ranks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_fusco.flax.router import Router, Routing, TopKSoftmaxRouter
from jax_fusco.placement import Placement
from jax_fusco.plan import experts_per_rank, whole
from jax_fusco.pruning import limit_ranks


@dataclasses.dataclass(frozen=True)
class RankLimitedRouter:
    """Another router, then `jax_fusco.limit_ranks`: what the block computes changes.

    Experts lie as a plan has them, `num_experts // num_ranks` consecutive ones a rank: apply a
    placement to the parameters first (`Placement.apply`).

    Attributes:
      router: the router it limits.
      num_ranks: R.
      max_ranks: N, the most ranks a token goes to.
      ranks_per_node, max_nodes: nodes of consecutive ranks, and the most of them; None: no limit.
      similarity: rows of the matrix `[E, E]` of `router_similarity`, as nested tuples; None: method
        "router".
    """

    router: Router
    num_ranks: int
    max_ranks: int
    ranks_per_node: int | None = None
    max_nodes: int | None = None
    similarity: tuple[tuple[float, ...], ...] | None = None

    @property
    def use_bias(self) -> bool:
        return self.router.use_bias

    @property
    def use_balance_bias(self) -> bool:
        return self.router.use_balance_bias

    def check(self, num_experts: int, top_k: int) -> None:
        """See `Router`."""
        self.router.check(num_experts, top_k)
        whole("max_ranks", self.max_ranks, 1)
        experts_per_rank(num_experts, whole("num_ranks", self.num_ranks, 1))

    def __call__(
        self, logits: jax.Array, top_k: int, balance_bias: jax.Array | None = None
    ) -> Routing:
        routing = self.router(logits, top_k, balance_bias)
        placement = Placement.identity(
            logits.shape[-1], self.num_ranks, ranks_per_node=self.ranks_per_node
        )
        similarity = None if self.similarity is None else jnp.array(self.similarity, jnp.float32)
        # Weights stay in proportion to `probs` for every router here.
        ids, weights = limit_ranks(
            routing.expert_ids,
            routing.weights,
            routing.probs,
            placement,
            self.max_ranks,
            max_nodes=self.max_nodes,
            method="router" if similarity is None else "similarity",
            similarity=similarity,
            renormalize=getattr(
                self.router, "renormalize", isinstance(self.router, TopKSoftmaxRouter)
            ),
        )
        return Routing(ids, weights, routing.probs)
