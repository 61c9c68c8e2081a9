"""Collaboration pruning: no token touches more than N ranks. It changes what the model computes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from jax_fusco import checks
from jax_fusco.placement import Placement
from jax_fusco.plan import whole

METHODS = ("router", "similarity")


def limit_ranks(
    expert_ids: Int[Array | np.ndarray, "... k"],
    weights: Float[Array | np.ndarray, "... k"],
    scores: Float[Array | np.ndarray, "... E"],
    placement: Placement,
    max_ranks: int,
    *,
    max_nodes: int | None = None,
    method: str = "router",
    similarity: Float[Array | np.ndarray, "E E"] | None = None,
    renormalize: bool = True,
) -> tuple[Int32[Array, "... k"], Float[Array, "... k"]]:
    """Chooses again among the experts of at most `max_ranks` ranks (and `max_nodes` nodes).

    A token's experts are walked from the highest score down, and their ranks admitted until there
    are `max_ranks`. With "router" the token then takes its best experts of those ranks; with
    "similarity" it keeps those it had there, and each other expert, best first, makes way for the
    unchosen one there that is most similar to it. Nodes come first where they are limited too. A
    token that touches few enough keeps experts and weights, bit for bit.

    Source: collaboration pruning of Occult (arXiv 2505.13345).

    Args:
      expert_ids: the router's choice, -1 for none; distinct in a row. Ids that are no expert's
        become -1.
      weights: of the choice, in proportion to its scores, as every router of `jax_fusco.flax` has
        them (top-k then softmax: to the softmax over all experts).
      scores: of all experts, positive; the result is differentiable in them and in `weights`.
      placement: where experts live, in the ids of `expert_ids`: after `Placement.apply` that is
        `Placement.identity`. One layer's, without replicas.
      max_ranks: N, at least 1.
      max_nodes: the most nodes a token may touch; None: as many as ranks.
      method: "router" or "similarity".
      similarity: how alike two experts are, `[E, E]`; see `router_similarity`.
      renormalize: True: the new weights have the sum of the old; False: the same factor on scores.

    Returns:
      (expert_ids int32, weights), of the shapes they came in; -1 and 0 where the admitted ranks
      have no more experts.

    Raises:
      TypeError, ValueError: an argument's type or value, named in the message.
    """
    ids, weights, scores = (jnp.asarray(each) for each in (expert_ids, weights, scores))
    max_ranks = whole("max_ranks", max_ranks, 1)
    _check_arrays(ids, weights, scores, placement)
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, need one of {', '.join(METHODS)}")
    if (similarity is None) != (method == "router"):
        given = "None" if similarity is None else "an array"
        raise ValueError(
            f"similarity: got {given}, need one with method 'similarity' and None with 'router'"
        )
    if similarity is not None:
        similarity = jnp.asarray(similarity)
        if similarity.shape != (scores.shape[-1],) * 2:
            raise ValueError(
                f"similarity: got shape {similarity.shape}, need {(scores.shape[-1],) * 2}"
            )
    rank = jnp.asarray(placement.rank_of_expert)
    node, nodes = rank // placement.ranks_per_node, placement.num_ranks // placement.ranks_per_node
    most_nodes = nodes if max_nodes is None else whole("max_nodes", max_nodes, 1)
    limits = [(node, nodes, most_nodes), (rank, placement.num_ranks, max_ranks)]
    # Those that no token can pass cost nothing.
    limits = [(group, most) for group, number, most in limits if most < min(number, ids.shape[-1])]
    with jax.named_scope("jax_fusco.limit_ranks"):
        shape = ids.shape
        ids = ids.reshape(-1, shape[-1]).astype(jnp.int32)
        ids = jnp.where((ids >= 0) & (ids < placement.num_experts), ids, -1)
        weights = weights.reshape(ids.shape)
        scores = scores.reshape(-1, scores.shape[-1])
        old, fixed = ids, lax.stop_gradient(scores)
        for group, most in limits:
            ids = _limit(ids, fixed, group, most, similarity)
        changed = (ids != old).any(-1, keepdims=True)
        weights = jnp.where(changed, _weigh(ids, old, weights, scores, renormalize), weights)
        return ids.reshape(shape), weights.reshape(shape)


def router_similarity(logits: Float[Array | np.ndarray, "... E"]) -> Float[Array, "E E"]:
    """The cosine of the experts' logits over many tokens, for `limit_ranks`.

    Source: Occult (arXiv 2505.13345), similarity-based pruning.
    """
    logits = jnp.asarray(logits, jnp.float32)
    logits = logits.reshape(-1, logits.shape[-1])
    norm = jnp.maximum(jnp.linalg.norm(logits, axis=0), 1e-30)
    unit = logits / norm
    return jnp.dot(unit.T, unit, precision=lax.Precision.HIGHEST)


def _check_arrays(ids: Any, weights: Any, scores: Any, placement: object) -> None:
    if not isinstance(placement, Placement):
        raise TypeError(f"placement: got {type(placement).__name__}, need a Placement")
    if placement.num_layers is not None:
        raise ValueError(
            f"placement: got one of {placement.num_layers} layers, need placement.layer(index)"
        )
    if placement.has_replicas:
        raise ValueError("placement: got one with replicas, need one rank for each expert")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"expert_ids: got dtype {ids.dtype}, need an integer dtype")
    checks.floating("weights", weights.dtype)
    checks.floating("scores", scores.dtype)
    if not ids.ndim or weights.shape != ids.shape:
        raise ValueError(f"weights: got shape {weights.shape}, need {ids.shape}")
    need = (*ids.shape[:-1], placement.num_experts)
    if scores.shape != need:
        raise ValueError(f"scores: got shape {scores.shape}, need {need}")
    if ids.shape[-1] > placement.num_experts:
        raise ValueError(
            f"expert_ids: got {ids.shape[-1]} experts per token, need at most "
            f"{placement.num_experts}"
        )


def _at(scores: jax.Array, ids: jax.Array, fill: float) -> jax.Array:
    found = jnp.take_along_axis(scores, jnp.maximum(ids, 0), axis=-1)
    return jnp.where(ids >= 0, found, fill)


def _limit(
    ids: jax.Array, scores: jax.Array, group: jax.Array, most: int, similarity: jax.Array | None
) -> jax.Array:
    """`ids` [T, k] with experts of at most `most` groups; `group` [E]."""
    by_score = jnp.argsort(-_at(scores, ids, -jnp.inf), axis=-1, stable=True)
    walked = jnp.take_along_axis(ids, by_score, axis=-1)
    valid = walked >= 0
    its_group = jnp.where(valid, group[walked], -1)
    same = its_group[:, :, None] == its_group[:, None, :]
    earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)[None]
    first = valid & ~(same & earlier).any(-1)
    number = jnp.cumsum(first, axis=-1)
    entering = first & (number <= most)
    admitted = (entering[:, :, None] & (its_group[:, :, None] == group[None, None])).any(
        1
    )  # [T, E]
    if similarity is None:
        chosen = _best(walked, scores, admitted)
    else:
        chosen = _alike(walked, similarity, admitted)
    return jnp.where(number[:, -1:] <= most, ids, chosen)


def _best(walked: jax.Array, scores: jax.Array, admitted: jax.Array) -> jax.Array:
    """As many experts as the token had, the best of those admitted."""
    value, best = lax.top_k(jnp.where(admitted, scores, -jnp.inf), walked.shape[-1])
    return jnp.where((walked >= 0) & (value > -jnp.inf), best.astype(jnp.int32), -1)


def _alike(walked: jax.Array, similarity: jax.Array, admitted: jax.Array) -> jax.Array:
    """Those admitted, and for each other expert the most similar one that is admitted and free."""
    experts = jnp.arange(admitted.shape[-1])
    stays = (walked >= 0) & jnp.take_along_axis(admitted, jnp.maximum(walked, 0), axis=-1)
    taken = (stays[:, :, None] & (walked[:, :, None] == experts)).any(1)
    chosen = []
    for j in range(walked.shape[-1]):
        mine = walked[:, j]
        alike = jnp.where(admitted & ~taken, similarity[jnp.maximum(mine, 0)], -jnp.inf)
        best = alike.argmax(-1).astype(jnp.int32)
        moves = (mine >= 0) & ~stays[:, j]
        best = jnp.where(alike.max(-1) > -jnp.inf, best, -1)
        taken |= moves[:, None] & (best[:, None] == experts)
        chosen.append(jnp.where(moves, best, mine))
    return jnp.stack(chosen, axis=-1)


def _weigh(
    ids: jax.Array, old: jax.Array, weights: jax.Array, scores: jax.Array, renormalize: bool
) -> jax.Array:
    """Weights of `ids` in proportion to their scores."""
    mine = _at(scores, ids, 0.0)
    base = (mine if renormalize else _at(scores, old, 0.0)).sum(-1, keepdims=True)
    total = jnp.where(old >= 0, weights, 0).sum(-1, keepdims=True)
    # For rows whose scores all vanish, as in the routers.
    return (mine * (total / jnp.maximum(base, 1e-12))).astype(weights.dtype)
