"""RoutingStats: what a router did, counted inside a jitted step."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from jax_fusco.files import read_npz
from jax_fusco.plan import whole

_ARRAYS = ("token_limbs", "load_limbs", "coactivation_limbs", "sample", "sample_weight")
_MOST_TOKENS = 2**24  # float32 counts exactly up to here


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RoutingStats:
    """Expert load, co-activation and a sample of tokens, of one layer or of each of L layers.

    A pytree of fixed size: carry it through the training step, save it with the checkpoint, merge
    it across ranks and processes. Every method is pure and works in and out of `jax.jit`. Counts
    are exact up to 2**64 (two uint32 limbs: JAX has no int64 by default). Distinct ranks of a token
    do not follow from pairs of experts, so that a uniform sample of tokens is kept beside them.

    Example::

        >>> import numpy as np
        >>> import jax_fusco as jf
        >>> stats = jf.RoutingStats.zeros(4)
        >>> stats = stats.update(np.array([[0, 1], [1, 3], [2, -1]]))
        >>> stats.load.tolist(), int(stats.coactivation[0, 1]), int(stats.tokens)
        ([1, 2, 1, 1], 1, 3)

    Attributes (each with a leading axis of L layers, if there are layers; E experts, W words of 32
    experts, S samples):
      token_limbs, load_limbs, coactivation_limbs: counts as (low, high): read `tokens`, `load` and
        `coactivation` instead.
      sample: the experts of sampled tokens, one bit for each. Slot s holds one of the tokens whose
        number is s modulo S, each with the same probability.
      sample_weight: how many tokens each slot stands for; 0: the slot is empty.
      num_experts: E, static.
    """

    token_limbs: UInt32[Array, "*layers 2"]
    load_limbs: UInt32[Array, "*layers E 2"]
    coactivation_limbs: UInt32[Array, "*layers E E 2"]
    sample: UInt32[Array, "*layers S W"]
    sample_weight: Float[Array, "*layers S"]
    num_experts: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def zeros(
        cls, num_experts: int, num_layers: int | None = None, *, num_samples: int = 4096
    ) -> RoutingStats:
        """Nothing counted yet.

        Args:
          num_experts: E.
          num_layers: L, or None for one layer (or the sum over several) without a leading axis.
          num_samples: S, tokens kept of each layer, 4 * (ceil(E / 32) + 1) bytes each. Searches
            look at one half of them, predictions at the other.

        Raises:
          TypeError, ValueError: an argument is no whole number of at least one.
        """
        experts = whole("num_experts", num_experts, 1)
        samples = whole("num_samples", num_samples, 1)
        layers = () if num_layers is None else (whole("num_layers", num_layers, 1),)
        return cls(
            jnp.zeros((*layers, 2), jnp.uint32),
            jnp.zeros((*layers, experts, 2), jnp.uint32),
            jnp.zeros((*layers, experts, experts, 2), jnp.uint32),
            jnp.zeros((*layers, samples, -(-experts // 32)), jnp.uint32),
            jnp.zeros((*layers, samples), jnp.float32),
            experts,
        )

    @property
    def num_layers(self) -> int | None:
        """L, or None without a leading axis of layers."""
        return self.token_limbs.shape[0] if self.token_limbs.ndim == 2 else None

    @property
    def tokens(self) -> Int[np.ndarray, "*layers"]:
        """Tokens with at least one expert, int64; like all counts a NumPy array, outside jit."""
        return _whole_numbers(self.token_limbs)

    @property
    def load(self) -> Int[np.ndarray, "*layers E"]:
        """Assignments to each expert, int64."""
        return _whole_numbers(self.load_limbs)

    @property
    def coactivation(self) -> Int[np.ndarray, "*layers E E"]:
        """Tokens that go to both experts, int64; on the diagonal those that go to the expert."""
        return _whole_numbers(self.coactivation_limbs)

    @property
    def sets(self) -> np.ndarray:
        """The experts of the sampled tokens, bool `[*layers, S, E]`; empty slots have none."""
        words = np.asarray(self.sample)
        bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1
        return bits.reshape(*words.shape[:-1], -1)[..., : self.num_experts].astype(bool)

    def update(
        self, expert_ids: Int[Array | np.ndarray, "... k"], layer: int | jax.Array | None = None
    ) -> RoutingStats:
        """Counts the routing of some tokens.

        Args:
          expert_ids: experts of each token, of NumPy or JAX, with any leading shape. Ids outside
            [0, num_experts) count nothing, tokens without experts neither.
          layer: the layer these tokens went through; may be traced. None: statistics without
            layers, or else `expert_ids` is `[num_layers, ..., k]`, all layers at once.

        Raises:
          TypeError, ValueError: an argument's type or value, named in the message.
        """
        layers = self.num_layers
        ids = self._ids(expert_ids)
        if layers is None:
            if layer is not None:
                raise ValueError(f"layer: got {layer!r}, need None for statistics without layers")
            return _auto(_update, self, ids)
        if layer is None:
            if ids.ndim < 3 or ids.shape[0] != layers:
                raise ValueError(
                    f"expert_ids: got shape {ids.shape}, need [{layers}, ..., experts per token] "
                    "for all layers at once, or a layer"
                )
            return _auto(jax.vmap(_update), self, ids)
        if not isinstance(layer, jax.Array):
            layer = whole("layer", layer, 0)
            if layer >= layers:
                raise ValueError(f"layer: got {layer}, need one of the {layers} layers from 0")
        return _auto(_update_layer, self, ids, layer)

    def merge(self, other: RoutingStats) -> RoutingStats:
        """Both together, as if one had counted the tokens of both.

        Raises:
          TypeError, ValueError: `other` is something else, or of another shape.
        """
        if not isinstance(other, RoutingStats):
            raise TypeError(f"other: got {type(other).__name__}, need RoutingStats")
        mine, theirs = self._shape(), other._shape()
        if mine != theirs:
            raise ValueError(f"other: got statistics of {theirs}, need {mine}")
        return (_merge if self.num_layers is None else jax.vmap(_merge))(self, other)

    def layer(self, index: int) -> RoutingStats:
        """The statistics of one layer.

        Raises:
          ValueError: there are no layers, or not so many.
        """
        layers = self.num_layers
        if layers is None or not 0 <= index < layers:
            raise ValueError(f"index: got {index}, need one of {layers or 'no'} layers")
        return jax.tree.map(lambda array: array[index], self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an npz file, of exactly this name."""
        arrays = {name: np.asarray(getattr(self, name)) for name in _ARRAYS}
        arrays["num_experts"] = np.array(self.num_experts)
        with open(path, "wb") as file:  # NumPy would add ".npz" to a name without it
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> RoutingStats:
        """Reads what `save` wrote; nothing is unpickled.

        Raises:
          ValueError: the file is missing, corrupt, or holds something else, in one sentence.
        """
        need = "need an npz file that RoutingStats.save wrote"
        arrays = read_npz(path, (*_ARRAYS, "num_experts"), "routing statistics", need)
        missing = [name for name in (*_ARRAYS, "num_experts") if name not in arrays]
        if missing:
            raise ValueError(f"{path}: got no array named {missing[0]}, {need}")
        experts = arrays["num_experts"]
        weight = arrays["sample_weight"]
        if experts.shape != () or experts.dtype.kind not in "iu" or weight.ndim not in (1, 2):
            raise ValueError(f"{path}: got num_experts or sample_weight of another shape, {need}")
        layers = weight.shape[0] if weight.ndim == 2 else None
        like = jax.eval_shape(lambda: cls.zeros(int(experts), layers, num_samples=weight.shape[-1]))
        for name in _ARRAYS:
            want, got = getattr(like, name), arrays[name]
            if (got.shape, got.dtype) != (want.shape, want.dtype):
                raise ValueError(
                    f"{path}: got {name} of {got.dtype} {got.shape}, need {want.dtype} {want.shape}"
                )
        return dataclasses.replace(like, **{name: arrays[name] for name in _ARRAYS})

    def _shape(self) -> str:
        layers = self.num_layers
        of = "" if layers is None else f" in {layers} layers"
        return f"{self.num_experts} experts{of} with {self.sample_weight.shape[-1]} samples"

    def _ids(self, expert_ids: Any) -> jax.Array:
        if isinstance(expert_ids, jax.Array):
            ids = expert_ids
        else:
            ids = np.asarray(expert_ids)
            if ids.dtype.kind in "iu":  # before int64 loses its upper half
                valid = (ids >= 0) & (ids < self.num_experts)
                small = np.full(ids.shape, -1, np.int32)
                small[valid] = ids[valid]
                ids = small
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"expert_ids: got dtype {ids.dtype}, need an integer dtype")
        if not ids.ndim:
            raise ValueError("expert_ids: got a scalar, need [..., experts per token]")
        if math.prod(ids.shape[:-1]) > _MOST_TOKENS:
            raise ValueError(
                f"expert_ids: got shape {ids.shape}, need at most {_MOST_TOKENS} tokens an update"
            )
        return jnp.asarray(ids).astype(jnp.int32)


def _whole_numbers(limbs: Any) -> np.ndarray:
    limbs = np.asarray(limbs).astype(np.int64)
    return limbs[..., 0] + (limbs[..., 1] << 32)


def _add(limbs: jax.Array, other: jax.Array) -> jax.Array:
    """Sums of (low, high) pairs, modulo 2**64."""
    low = limbs[..., 0] + other[..., 0]
    carry = (low < limbs[..., 0]).astype(jnp.uint32)
    return jnp.stack([low, limbs[..., 1] + other[..., 1] + carry], axis=-1)


def _count(limbs: jax.Array, numbers: jax.Array) -> jax.Array:
    numbers = numbers.astype(jnp.uint32)
    return _add(limbs, jnp.stack([numbers, jnp.zeros_like(numbers)], axis=-1))


def _mix(*words: jax.Array) -> jax.Array:
    """A well spread uint32 for each tuple of words (the finalizer of MurmurHash3, chained)."""
    state = jnp.uint32(0x9E3779B9)
    for word in words:
        state = state ^ word.astype(jnp.uint32)
        state = (state ^ (state >> 16)) * jnp.uint32(0x85EBCA6B)
        state = (state ^ (state >> 13)) * jnp.uint32(0xC2B2AE35)
        state = state ^ (state >> 16)
    return state


def _auto(
    update: Callable[..., RoutingStats], stats: RoutingStats, ids: jax.Array, *layer: Any
) -> RoutingStats:
    """`update(stats, ids, *layer)` where `ids` may be sharded over Explicit axes.

    Those refuse sums along a sharded axis; under Auto axes XLA adds what each device counted.
    """
    sharding = jax.typeof(ids).sharding
    if all(part is None for part in sharding.spec):
        return update(stats, ids, *layer)
    whole = jax.NamedSharding(sharding.mesh, jax.P())
    under_auto: Any = jax.sharding.auto_axes(update, out_sharding=whole)
    return under_auto(stats, ids, *layer)


def _hits(ids: jax.Array, num_experts: int) -> jax.Array:
    """[N, k] -> [N, E], how often each expert is named."""
    return (ids[:, :, None] == jnp.arange(num_experts, dtype=ids.dtype)[None, None]).sum(
        1, dtype=jnp.int32
    )


@jax.jit
def _merge(stats: RoutingStats, other: RoutingStats) -> RoutingStats:
    """Each slot keeps either token with the probability of its share: a reservoir of one."""
    weight = stats.sample_weight + other.sample_weight
    words = [stats.sample_weight, other.sample_weight]
    words = [jax.lax.bitcast_convert_type(jnp.asarray(word), jnp.uint32) for word in words]
    words += [set_.T[i] for set_ in (stats.sample, other.sample) for i in range(set_.shape[-1])]
    slots = jnp.arange(weight.shape[0], dtype=jnp.uint32)
    chance = (_mix(slots, *words) >> 8).astype(jnp.float32) / 2**24
    keep = chance * weight < stats.sample_weight
    return RoutingStats(
        _add(stats.token_limbs, other.token_limbs),
        _add(stats.load_limbs, other.load_limbs),
        _add(stats.coactivation_limbs, other.coactivation_limbs),
        jnp.where(keep[:, None], stats.sample, other.sample),
        weight,
        stats.num_experts,
    )


@jax.jit
def _update(stats: RoutingStats, ids: jax.Array) -> RoutingStats:
    with jax.named_scope("jax_fusco.routing_stats"):
        if not ids.size:
            return stats
        ids = ids.reshape(-1, ids.shape[-1])
        hits = _hits(ids, stats.num_experts)
        named = (hits > 0).astype(jnp.float32)
        together = named.T @ named  # at most 2**24 tokens: exact
        sets = _pack(ids, stats.num_experts)
        valid = (sets != 0).any(1)
        # At once, because tokens may lie on several devices.
        counts = jnp.concatenate([hits, valid[:, None].astype(jnp.int32)], axis=1).sum(0)
        sample, weight = _draw(stats, sets)
        zeros = jnp.zeros_like
        batch = RoutingStats(
            _count(zeros(stats.token_limbs), counts[-1]),
            _count(zeros(stats.load_limbs), counts[:-1]),
            _count(zeros(stats.coactivation_limbs), together),
            sample,
            weight,
            stats.num_experts,
        )
        return _merge(stats, batch)


def _pack(ids: jax.Array, num_experts: int) -> jax.Array:
    """[N, k] -> [N, W] words, a bit for each expert."""
    word = jnp.arange(-(-num_experts // 32), dtype=jnp.int32)[None]
    packed = jnp.zeros((ids.shape[0], word.shape[1]), jnp.uint32)
    for j in range(ids.shape[1]):
        expert = ids[:, j, None]
        here = (expert >= 0) & (expert < num_experts) & (expert // 32 == word)
        bit = jnp.uint32(1) << (expert % 32).astype(jnp.uint32)
        packed |= jnp.where(here, bit, jnp.uint32(0))
    return packed


def _draw(stats: RoutingStats, sets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sample [S, W], weight [S]): for each slot one of the tokens whose turn it is."""
    slots, tokens = stats.sample.shape[0], sets.shape[0]
    seen = stats.token_limbs[0]
    turn = jnp.arange(-(-tokens // slots), dtype=jnp.int32)[:, None]
    # The first token of this update continues where the last update stopped.
    shift = (seen % jnp.uint32(slots)).astype(jnp.int32)
    place = (jnp.arange(slots, dtype=jnp.int32) - shift) % slots
    token = turn * slots + place[None]
    found = sets.at[token].get(mode="fill", fill_value=0)  # [turns, S, W]
    valid = (found != 0).any(2)
    if len(turn) == 1:
        return found[0], valid[0].astype(jnp.float32)
    order = _mix(seen, turn.astype(jnp.uint32), place[None].astype(jnp.uint32)) >> 1
    chosen = jnp.where(valid, order, jnp.uint32(2**32 - 1)).argmin(0)
    picked = jnp.take_along_axis(found, chosen[None, :, None], axis=0)[0]
    return picked, valid.sum(0).astype(jnp.float32)


@jax.jit
def _update_layer(stats: RoutingStats, ids: jax.Array, layer: Any) -> RoutingStats:
    one = _update(jax.tree.map(lambda array: jnp.asarray(array)[layer], stats), ids)
    return jax.tree.map(lambda array, new: jnp.asarray(array).at[layer].set(new), stats, one)
