"""One benchmark case: its sizes, its data, and the jitted function of every operation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fusco as jf
from jax_fusco.bench.rivals import Shuffle, Sizes
from jax_fusco.bench.routing import ROUTINGS, loads
from jax_fusco.bench.rows import AXIS
from jax_fusco.bench.shapes import SHAPES

OPS: dict[str, str] = {
    "plan": "the plan alone",
    "dispatch": "rows to the experts, plan given",
    "combine": "rows back, weighted and summed, plan given",
    "forward": "plan, dispatch, combine",
    "train": "forward and backward (rivals under plain autodiff)",
    "layer": "forward with SwiGLU experts, all through jax_fusco.grouped_matmul",
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is asked for: a shape by name, devices, tokens per rank, a routing by name,
    operations."""

    shape: str
    devices: int
    tokens: int
    routing: str
    ops: tuple[str, ...]
    repeats: int = 7
    capacity_factor: float | None = None
    implementation: str | None = None
    seed: int = 0

    @property
    def title(self) -> str:
        return f"{self.shape}, {self.devices} devices x {self.tokens} tokens, {self.routing}"


@dataclasses.dataclass(frozen=True)
class Fusco:
    """This library."""

    sizes: Sizes
    padding: str = "undefined"
    implementation: str | None = None

    @property
    def name(self) -> str:
        return "jax_fusco" if self.padding == "undefined" else f"jax_fusco/{self.padding}"

    def plan(self, ids: jax.Array) -> jf.Plan:
        return jf.make_plan(
            ids,
            axis_name=AXIS,
            num_experts=self.sizes.experts,
            capacity=self.sizes.capacity,
            implementation=self.implementation,
        )

    def group_sizes(self, plan: jf.Plan) -> jax.Array:
        return plan.group_sizes

    def dispatch(self, x: jax.Array, plan: jf.Plan) -> jax.Array:
        return jf.dispatch(x, plan, padding=self.padding)

    def combine(self, y: jax.Array, weights: jax.Array, plan: jf.Plan) -> jax.Array:
        return jf.combine(y, weights, plan)


@jax.custom_vjp
def stand_in(rows: jax.Array, times: jax.Array) -> jax.Array:
    """Experts that do nothing, where `times` is 0 at run time.

    Real experts need the dispatched rows in memory. With a plain identity XLA merges a rival's
    gathers before and after the experts into one and never makes the rows, so the compiler must not
    see that nothing happens here.
    """
    return lax.fori_loop(0, times[0], lambda _, r: -r, rows)


stand_in.defvjp(
    lambda rows, times: (stand_in(rows, times), times),
    lambda times, g: (lax.fori_loop(0, times[0], lambda _, r: -r, g), None),
)


def swiglu(rows: jax.Array, group_sizes: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
    """Grouped SwiGLU: `w_in` is `[E_local, d, 2h]`, `w_out` `[E_local, h, d]`."""
    gate, up = jnp.split(jf.grouped_matmul(rows, w_in, group_sizes), 2, axis=1)
    return jf.grouped_matmul(jax.nn.silu(gate) * up, w_out, group_sizes)


class Case:
    """Data of one spec on `spec.devices` devices, and functions over it.

    Arrays are global, sharded along their first dimension: x and g `[R*T, d]` bf16, ids `[R*T, k]`,
    weights `[R*T, k]` float32, y `[R*C, d]` bf16.
    """

    experts: Callable[[jax.Array, jax.Array], jax.Array] = staticmethod(stand_in)

    def __init__(self, spec: Spec):
        shape = SHAPES[spec.shape]
        ranks, tokens = spec.devices, spec.tokens
        rng = np.random.default_rng(spec.seed)
        ids = ROUTINGS[spec.routing](rng, ranks * tokens, shape.k, shape.experts, ranks)
        load, pairs = loads(ids, shape.experts, ranks)
        capacity = _round_up(int(load.max()))
        if spec.capacity_factor is not None:
            roomy = jf.capacity(tokens, shape.k, shape.experts, ranks, spec.capacity_factor)
            capacity = max(capacity, roomy)
        pair = _round_up(int(pairs.max()))
        self.spec, self.host_ids = spec, ids
        self.sizes = Sizes(ranks, tokens, shape.k, shape.experts, shape.features, capacity, pair)
        self.kept = ids.size
        self.mesh = jax.make_mesh((ranks,), (AXIS,), devices=jax.devices()[:ranks])
        d = shape.features
        self.ids = self.put(ids)
        self.weights = self.put(rng.random(ids.shape, dtype=np.float32) / shape.k)
        self.x = self.put(_normal(rng, (ranks * tokens, d)))
        self.g = self.put(_normal(rng, (ranks * tokens, d)))
        self.times = self.put(np.zeros(ranks, np.int32))

    @functools.cached_property
    def y(self) -> jax.Array:
        rng = np.random.default_rng(self.spec.seed + 1)
        rows = self.sizes.ranks * self.sizes.capacity
        return self.put(_normal(rng, (rows, self.sizes.features)))

    @functools.cached_property
    def expert_weights(self) -> tuple[jax.Array, jax.Array]:
        rng = np.random.default_rng(self.spec.seed + 2)
        e, d, h = self.sizes.experts, self.sizes.features, SHAPES[self.spec.shape].expert_features
        w_in, w_out = _normal(rng, (e, d, 2 * h), d**-0.5), _normal(rng, (e, h, d), h**-0.5)
        return self.put(w_in), self.put(w_out)

    def put(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, NamedSharding(self.mesh, P(AXIS)))

    def function(self, op: str, shuffle: Shuffle) -> Callable[..., Any]:
        """The jitted operation; its arguments are `arguments(op, ...)`."""

        def forward(x: jax.Array, weights: jax.Array, ids: jax.Array, times: jax.Array):
            plan = shuffle.plan(ids)
            rows = shuffle.dispatch(x, plan)
            return shuffle.combine(self.experts(rows, times), weights, plan)

        def train(x: jax.Array, weights: jax.Array, ids: jax.Array, times: jax.Array, g: Any):
            out, pull = jax.vjp(lambda x, w: forward(x, w, ids, times), x, weights)
            return out, *pull(g)

        def layer(x: jax.Array, weights: jax.Array, ids: jax.Array, w_in: Any, w_out: Any):
            plan = shuffle.plan(ids)
            rows = shuffle.dispatch(x, plan)
            y = swiglu(rows, shuffle.group_sizes(plan), w_in, w_out)
            return shuffle.combine(y, weights, plan)

        steps: dict[str, Callable[..., Any]] = {
            "plan": lambda ids: _pack(shuffle.plan(ids)),
            "dispatch": lambda x, plan: shuffle.dispatch(x, _unpack(plan)),
            "combine": lambda y, weights, plan: shuffle.combine(y, weights, _unpack(plan)),
            "forward": forward,
            "train": train,
            "layer": layer,
        }
        return self.jit(steps[op])

    def jit(self, step: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(
            jax.shard_map(
                step, mesh=self.mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False
            )
        )

    def arguments(self, op: str, plan: Any) -> tuple[Any, ...]:
        """`plan` is the result of the "plan" function of the same contestant."""
        inputs = self.x, self.weights, self.ids
        return {
            "plan": lambda: (self.ids,),
            "dispatch": lambda: (self.x, plan),
            "combine": lambda: (self.y, self.weights, plan),
            "forward": lambda: (*inputs, self.times),
            "train": lambda: (*inputs, self.times, self.g),
            "layer": lambda: (*inputs, *self.expert_weights),
        }[op]()


def _round_up(rows: int, multiple: int = 8) -> int:
    return -(-rows // multiple) * multiple


def _normal(rng: np.random.Generator, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(jnp.bfloat16)


def _pack(plan: Any) -> Any:
    """A per-rank plan whose arrays can be laid side by side (scalars become vectors of one)."""
    return jax.tree.map(lambda a: a if a.ndim else _Scalar(a[None]), plan)


def _unpack(plan: Any) -> Any:
    return jax.tree.map(
        lambda a: a.value[0] if isinstance(a, _Scalar) else a,
        plan,
        is_leaf=lambda a: isinstance(a, _Scalar),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Scalar:
    value: jax.Array
