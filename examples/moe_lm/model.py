"""A decoder-only transformer over bytes whose every feed-forward layer is a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_fusco import Topology
from jax_fusco.flax import MoE

VOCABULARY = 256


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the transformer, and how experts shuffle.

    Experts lie along the axes of `topology`, or along "expert" where it is None; `implementation`
    names the shuffle's implementation or is None.
    """

    context: int
    layers: int
    width: int
    heads: int
    experts: int
    top_k: int
    expert_width: int
    shared_experts: int
    capacity_factor: float | None
    dropout: float
    implementation: str | None
    topology: Topology | None = None


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) of `x[B, T, heads, head_dim]`.

    `positions` is `[T]`; the first and second halves of a head form the pairs that turn.
    """
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and normalised queries and keys."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.head_dim = config.width // config.heads
        self.qkv = nnx.Linear(config.width, 3 * config.width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(config.width, config.width, use_bias=False, rngs=rngs)
        self.query_norm = nnx.RMSNorm(self.head_dim, rngs=rngs)
        self.key_norm = nnx.RMSNorm(self.head_dim, rngs=rngs)

    def _heads(self, x: jax.Array, positions: jax.Array) -> list[jax.Array]:
        parts = jnp.split(self.qkv(x), 3, axis=-1)
        q, k, v = (p.reshape(*p.shape[:-1], self.heads, self.head_dim) for p in parts)
        return [rotate(self.query_norm(q), positions), rotate(self.key_norm(k), positions), v]

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` is `[B, T, width]`, and so is the result."""
        q, k, v = self._heads(x, jnp.arange(x.shape[1]))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.reshape(x.shape))

    def step(
        self, x: jax.Array, cache: dict[str, jax.Array], position: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One token `x[B, 1, width]` at `position` against a ring of the last `context` tokens.

        Keys are stored rotated: only differences of positions count, so the ring may wrap.
        """
        q, k, v = self._heads(x, position[None])
        size = cache["k"].shape[1]
        cache = {
            "k": jax.lax.dynamic_update_slice_in_dim(cache["k"], k, position % size, axis=1),
            "v": jax.lax.dynamic_update_slice_in_dim(cache["v"], v, position % size, axis=1),
        }
        filled = (jnp.arange(size) <= position)[None, None, None, :]
        y = jax.nn.dot_product_attention(q, cache["k"], cache["v"], mask=filled)
        return self.out(y.reshape(x.shape)), cache


class Block(nnx.Module):
    """Attention, then a mixture of experts, each on the normalised residual stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.moe_norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.moe = MoE(
            config.width,
            config.expert_width,
            num_experts=config.experts,
            top_k=config.top_k,
            axis_name="expert" if config.topology is None else config.topology.axis_name,
            topology=config.topology,
            num_shared_experts=config.shared_experts,
            capacity_factor=config.capacity_factor,
            implementation=config.implementation,
            report_expert_ids=True,
            rngs=rngs,
        )
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> tuple[jax.Array, Any]:
        x = x + self._drop(self.attention(self.attention_norm(x)), rngs)
        y, metrics = self.moe(self.moe_norm(x))
        return x + self._drop(y, rngs), metrics

    def _drop(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        return self.dropout(x, deterministic=rngs is None, rngs=rngs)

    def step(
        self, x: jax.Array, cache: dict[str, jax.Array], position: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        y, cache = self.attention.step(self.attention_norm(x), cache, position)
        x = x + y
        return x + self.moe(self.moe_norm(x))[0], cache


class Transformer(nnx.Module):
    """Bytes in, logits over the next byte out."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, config.width, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, list[Any]]:
        """Logits `[B, T, 256]` for `tokens[B, T]`, and each layer's `MoEMetrics`.

        Dropout happens only where there is a `dropout_key`.
        """
        rngs = None if dropout_key is None else nnx.Rngs(dropout=dropout_key)
        x = self.embed(tokens)
        metrics = []
        for block in self.blocks:
            x, layer_metrics = block(x, rngs)
            metrics.append(layer_metrics)
        return self.head(self.norm(x)), metrics

    def step(
        self, tokens: jax.Array, caches: list[dict[str, jax.Array]], position: jax.Array
    ) -> tuple[jax.Array, list[dict[str, jax.Array]]]:
        """Logits `[B, 256]` after one more token per sequence, `tokens[B]`, and the new caches."""
        x = self.embed(tokens[:, None])
        new_caches = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block.step(x, cache, position)
            new_caches.append(cache)
        return self.head(self.norm(x))[:, 0], new_caches


def empty_caches(config: ModelConfig, batch: int) -> list[dict[str, jax.Array]]:
    """Attention caches for `Transformer.step`: one ring of `context` keys and values a layer."""
    shape = (batch, config.context, config.heads, config.width // config.heads)
    return [{"k": jnp.zeros(shape), "v": jnp.zeros(shape)} for _ in range(config.layers)]
