"""Generating text: one compiled scan that feeds each byte back in."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from .model import empty_caches
from .training import Trainer


def generate(
    trainer: Trainer,
    state: nnx.State,
    prompts: list[str],
    *,
    length: int,
    temperature: float,
    seed: int,
) -> list[str]:
    """Continues every prompt to `length` bytes, all of them at once; returns prompt and text.

    A temperature of 0 takes the likeliest byte each time. The shuffle runs dropless here, and is
    as small as it gets: a token or less a device.
    """
    encoded = [prompt.encode()[:length] or b"\n" for prompt in prompts]
    forced = np.full((length, len(encoded)), -1, np.int32)
    for column, prompt in enumerate(encoded):
        forced[: len(prompt), column] = list(prompt)
    with jax.set_mesh(trainer.mesh):
        everywhere = NamedSharding(trainer.mesh, PartitionSpec())
        run = jax.jit(
            partial(_generate, trainer), static_argnames="temperature", out_shardings=everywhere
        )
        key = np.asarray(jax.random.key_data(jax.random.key(seed)))
        tokens = run(state, forced, key, temperature=temperature)
    return [bytes(column).decode(errors="replace") for column in np.asarray(tokens, np.uint8).T]


def _generate(
    trainer: Trainer, state: nnx.State, forced: jax.Array, key: jax.Array, *, temperature: float
) -> jax.Array:
    model, _ = nnx.merge(trainer.graphdef, state)
    key = jax.random.wrap_key_data(key)
    for block in model.blocks:
        block.moe.capacity_factor = None

    def next_byte(carry, given):
        tokens, caches, position = carry
        logits, caches = model.step(tokens, caches, position)
        if temperature:
            step_key = jax.random.fold_in(key, position)
            chosen = jax.random.categorical(step_key, logits / temperature)
        else:
            chosen = jnp.argmax(logits, axis=-1)
        tokens = jnp.where(given < 0, chosen.astype(jnp.int32), given)
        return (tokens, caches, position + 1), tokens

    caches = empty_caches(trainer.model_config, forced.shape[1])
    carry = (forced[0], caches, jnp.int32(0))
    _, rest = jax.lax.scan(next_byte, carry, forced[1:])
    return jnp.concatenate([forced[:1], rest])
