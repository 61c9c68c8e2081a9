"""Routers: from a token's logits to its experts and their weights, all in float32."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from jax_fusco import checks


class Routing(NamedTuple):
    """What a router says about T tokens.

    Attributes:
      expert_ids: the experts of each token, best first; ties go to the lower id.
      weights: what each chosen expert's output is multiplied with; differentiable.
      probs: a distribution over all experts for the load-balance loss; each row sums to one.
    """

    expert_ids: Int32[Array, "T k"]
    weights: Float[Array, "T k"]
    probs: Float[Array, "T E"]


@runtime_checkable
class Router(Protocol):
    """Any hashable object with these members routes for `MoE`.

    Attributes:
      use_bias: the logits get a learned bias, one for each expert.
      use_balance_bias: a `BalanceBias` takes part in the choice of experts.
    """

    @property
    def use_bias(self) -> bool: ...

    @property
    def use_balance_bias(self) -> bool: ...

    def check(self, num_experts: int, top_k: int) -> None:
        """Raises ValueError where this router cannot choose `top_k` of `num_experts`."""
        ...

    def __call__(
        self,
        logits: Float[Array, "T E"],
        top_k: int,
        balance_bias: Float[Array, " E"] | None = None,
    ) -> Routing:
        """Routes T tokens by their float32 logits."""
        ...


def check_router(router: Any) -> None:
    """TypeError for anything else than a router."""
    # A router's class has all of a router's members too.
    if isinstance(router, type) or not isinstance(router, Router):
        raise TypeError(f"router: got {router!r}, need a jax_fusco.flax.Router")


class BalanceBias(nnx.Variable):
    """Bias that is added to the scores when experts are chosen, and at no other place.

    No gradient reaches it: the training loop moves it with `update_balance_bias`.
    """


def update_balance_bias(
    bias: Float[Array, " E"], tokens_per_expert: Int[Array, " E"], rate: float = 1e-3
) -> Float[Array, " E"]:
    """The next bias: up by `rate` for each expert below the mean load, down for each above it.

    Args:
      bias: the present bias.
      tokens_per_expert: each expert's assignments in the last step, as `MoEMetrics` has them.
      rate: size of the step.

    Raises:
      TypeError, ValueError: an argument is no array, or their shapes differ.

    Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts"
    (arXiv 2408.15664), algorithm 1, as used by DeepSeek-V3.
    """
    bias = checks.array("bias", bias)
    load = checks.array("tokens_per_expert", tokens_per_expert).astype(jnp.float32)
    if load.shape != bias.shape:
        raise ValueError(f"tokens_per_expert: got shape {load.shape}, need {bias.shape} of bias")
    return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load).astype(bias.dtype)


def _check_top_k(num_experts: int, top_k: int) -> None:
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: got {top_k}, need 1 to num_experts ({num_experts})")


def _normalised(weights: jax.Array, renormalize: bool, scale: float) -> jax.Array:
    if renormalize:
        # For rows whose scores all vanish; its square, which the gradient divides by, is normal.
        weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-12)
    return weights if scale == 1.0 else weights * scale


@dataclasses.dataclass(frozen=True)
class SoftmaxRouter:
    """Softmax over all experts, then the `top_k` largest (Mixtral, Qwen3, OLMoE).

    Attributes:
      renormalize: divide the chosen probabilities by their sum (Mixtral, Qwen3; not OLMoE).
      scale: factor on the weights.
      use_bias, use_balance_bias: see `Router`.
    """

    renormalize: bool = True
    scale: float = 1.0
    use_bias: bool = False
    use_balance_bias: bool = False

    def check(self, num_experts: int, top_k: int) -> None:
        _check_top_k(num_experts, top_k)

    def __call__(
        self, logits: jax.Array, top_k: int, balance_bias: jax.Array | None = None
    ) -> Routing:
        probs = jax.nn.softmax(logits, axis=-1)
        if balance_bias is None:
            weights, ids = lax.top_k(probs, top_k)
        else:
            ids = lax.top_k(lax.stop_gradient(probs + balance_bias), top_k)[1]
            weights = jnp.take_along_axis(probs, ids, axis=-1)
        return Routing(ids, _normalised(weights, self.renormalize, self.scale), probs)


@dataclasses.dataclass(frozen=True)
class SigmoidRouter:
    """Sigmoid scores; experts chosen by score plus balance bias within the best groups.

    The weights come from the scores alone. DeepSeek-V3: `num_groups=8, groups_kept=4, scale=2.5`;
    Kimi-K2: `scale=2.827`. Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2.

    Attributes:
      num_groups: the experts form this many groups of equal size, in order of their ids.
      groups_kept: a token's experts come from this many groups: those with the largest sum of
        their two best selection scores.
      renormalize: divide the chosen scores by their sum.
      scale: factor on the weights.
      use_bias, use_balance_bias: see `Router`.
    """

    num_groups: int = 1
    groups_kept: int = 1
    renormalize: bool = True
    scale: float = 1.0
    use_bias: bool = False
    use_balance_bias: bool = True

    def check(self, num_experts: int, top_k: int) -> None:
        _check_top_k(num_experts, top_k)
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise ValueError(
                f"num_groups: got {self.num_groups}, need a divisor of num_experts ({num_experts})"
            )
        if not 1 <= self.groups_kept <= self.num_groups:
            raise ValueError(
                f"groups_kept: got {self.groups_kept}, need 1 to num_groups ({self.num_groups})"
            )
        if top_k > (room := self.groups_kept * (num_experts // self.num_groups)):
            raise ValueError(f"top_k: got {top_k}, need at most the {room} experts of groups_kept")

    def _selectable(self, choice: jax.Array) -> jax.Array:
        """`choice` [T, E] with -inf for the experts of the groups that are not kept."""
        grouped = choice.reshape(choice.shape[0], self.num_groups, -1)
        best_two = lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
        kept = lax.top_k(best_two, self.groups_kept)[1]
        keep = (kept[:, :, None] == jnp.arange(self.num_groups)[None, None]).any(1)
        return jnp.where(keep[:, :, None], grouped, -jnp.inf).reshape(choice.shape)

    def __call__(
        self, logits: jax.Array, top_k: int, balance_bias: jax.Array | None = None
    ) -> Routing:
        scores = jax.nn.sigmoid(logits)
        choice = lax.stop_gradient(scores if balance_bias is None else scores + balance_bias[None])
        if self.groups_kept < self.num_groups:
            choice = self._selectable(choice)
        ids = lax.top_k(choice, top_k)[1]
        weights = _normalised(
            jnp.take_along_axis(scores, ids, axis=-1), self.renormalize, self.scale
        )
        return Routing(ids, weights, _normalised(scores, True, 1.0))


@dataclasses.dataclass(frozen=True)
class TopKSoftmaxRouter:
    """The `top_k` largest logits, then softmax over those alone (gpt-oss).

    Attributes:
      use_bias, use_balance_bias: see `Router`; gpt-oss's router has a bias.
    """

    use_bias: bool = True
    use_balance_bias: bool = False

    def check(self, num_experts: int, top_k: int) -> None:
        _check_top_k(num_experts, top_k)

    def __call__(
        self, logits: jax.Array, top_k: int, balance_bias: jax.Array | None = None
    ) -> Routing:
        if balance_bias is None:
            chosen, ids = lax.top_k(logits, top_k)
        else:
            ids = lax.top_k(lax.stop_gradient(logits + balance_bias), top_k)[1]
            chosen = jnp.take_along_axis(logits, ids, axis=-1)
        return Routing(ids, jax.nn.softmax(chosen, axis=-1), jax.nn.softmax(logits, axis=-1))
