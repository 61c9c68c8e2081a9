"""A router that sends no token to more than N ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fusco.flax.router import Router, Routing, TopKSoftmaxRouter, check_router
from jax_fusco.placement import Placement, check_node
from jax_fusco.plan import experts_per_rank, whole
from jax_fusco.pruning import limit_ranks


@dataclasses.dataclass(frozen=True)
class RankLimitedRouter:
    """Another router, then `jax_fusco.limit_ranks`: what the block computes changes.

    Experts lie as a plan has them, `num_experts // num_ranks` consecutive ones a rank: apply a
    placement to the parameters first (`Placement.apply`). A token whose ranks have fewer experts
    than it wants goes to fewer. A router that keeps groups of experts needs ranks that lie within
    one. The second choice is by scores alone, without a balance bias.

    Example::

        >>> from flax import nnx
        >>> from jax_fusco.flax import MoE, RankLimitedRouter, SoftmaxRouter
        >>> router = RankLimitedRouter(SoftmaxRouter(), num_ranks=4, max_ranks=2)
        >>> moe = MoE(16, 32, num_experts=8, top_k=4, router=router, rngs=nnx.Rngs(0))

    Attributes:
      router: the router it limits.
      num_ranks: R.
      max_ranks: N, the most ranks a token goes to.
      ranks_per_node, max_nodes: nodes of consecutive ranks, and the most of them; None: one node,
        and no limit.
      similarity: `[E, E]` of `router_similarity`, kept as nested tuples; None: method "router".

    Raises:
      TypeError, ValueError: `router` is none, `similarity` no matrix; `check` checks the rest.
    """

    router: Router
    num_ranks: int
    max_ranks: int
    ranks_per_node: int | None = None
    max_nodes: int | None = None
    similarity: Any = None

    def __post_init__(self) -> None:
        check_router(self.router)
        if self.similarity is None:
            return
        try:
            matrix = np.asarray(self.similarity, np.float32)
        except (TypeError, ValueError):  # of other things, of ragged rows, of values under jax.jit
            kind = type(self.similarity).__name__
            raise TypeError(f"similarity: got {kind}, need an array [E, E] or None") from None
        if matrix.ndim != 2:
            raise ValueError(f"similarity: got shape {matrix.shape}, need [E, E]")
        # Hashable, as a router has to be.
        object.__setattr__(self, "similarity", tuple(map(tuple, matrix.tolist())))

    @property
    def use_bias(self) -> bool:
        return self.router.use_bias

    @property
    def use_balance_bias(self) -> bool:
        return self.router.use_balance_bias

    def check(self, num_experts: int, top_k: int) -> None:
        """See `Router`; TypeError or ValueError for every argument that does not fit."""
        self.router.check(num_experts, top_k)
        ranks = whole("num_ranks", self.num_ranks, 1)
        experts_per_rank(num_experts, ranks)
        whole("max_ranks", self.max_ranks, 1)
        check_node(self.ranks_per_node, ranks)
        groups = getattr(self.router, "num_groups", 1)
        kept = getattr(self.router, "groups_kept", 1)
        if kept < groups and ranks % groups and self.max_ranks < ranks:
            raise ValueError(
                f"num_ranks: got {ranks}, need a multiple of the router's {groups} groups: on a "
                "rank with experts of two groups tokens would leave those they keep"
            )
        if self.max_nodes is not None:
            whole("max_nodes", self.max_nodes, 1)
        if self.similarity is None:
            return
        shape, need = np.shape(self.similarity), (num_experts, num_experts)
        if shape != need:
            raise ValueError(f"similarity: got shape {shape}, need {need}")
        if not np.isfinite(np.array(self.similarity)).all():
            raise ValueError("similarity: got a value that is not finite, need finite ones")

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
