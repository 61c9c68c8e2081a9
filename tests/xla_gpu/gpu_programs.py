"""A MoE layer's shuffle around a stand-in for its experts, and what its HLO holds."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fusco as jf
from jax_fusco.bench.rivals import Ring, Sizes

TARGET = pathlib.Path(__file__).parent / "h100.txtpb"
# NVLink domains x hosts in one x GPUs of a host.
TOPOLOGIES = {1: "1x1x1", 8: "1x1x8", 64: "8x1x8"}


def make_mesh(num_gpus: int) -> Mesh:
    """One expert axis over H100s that nobody has."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology=TOPOLOGIES[num_gpus]
    )
    return topologies.make_mesh(topology, (num_gpus,), ("expert",))


def make_node_mesh(nodes: int = 8) -> Mesh:
    """Servers of eight H100s, an axis for each level."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology=f"{nodes}x1x8"
    )
    return topologies.make_mesh(topology, (nodes, 8), ("node", "expert"))


@dataclasses.dataclass(frozen=True)
class Layer:
    """Sizes of a layer, by default Qwen3-30B-A3B's, and how it is shuffled."""

    ranks: int
    tokens: int = 4096
    k: int = 8
    experts: int = 128
    features: int = 2048
    implementation: str = "fused"  # or "xla" or "ring"
    topology: jf.Topology | None = None

    @property
    def capacity(self) -> int:
        return jf.capacity(self.tokens, self.k, self.experts, self.ranks, 1.25)

    @property
    def axis_name(self) -> str | tuple[str, ...]:
        return "expert" if self.topology is None else self.topology.axis_name

    def __call__(self, x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        if self.implementation == "ring":
            sizes = Sizes(
                self.ranks, self.tokens, self.k, self.experts, self.features, self.capacity, 0
            )
            ring = Ring(sizes)
            plan = ring.plan(ids)
            rows = 2 * ring.dispatch(x, plan)
            return ring.combine(rows, weights, plan).astype(x.dtype)
        plan = jf.make_plan(
            ids,
            axis_name=self.axis_name,
            num_experts=self.experts,
            capacity=self.capacity,
            topology=self.topology,
            implementation=self.implementation,
        )
        return jf.combine(2 * jf.dispatch(x, plan), weights, plan)

    def arguments(self, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Global shapes of x, ids and weights."""
        sharding = NamedSharding(mesh, P(self.axis_name))

        def shape(*row: int, dtype: Any) -> jax.ShapeDtypeStruct:
            rows = self.ranks * self.tokens
            return jax.ShapeDtypeStruct((rows, *row), dtype, sharding=sharding)

        return (
            shape(self.features, dtype=jnp.bfloat16),
            shape(self.k, dtype=jnp.int32),
            shape(self.k, dtype=jnp.float32),
        )


def forward(layer: Layer, mesh: Mesh) -> Callable[..., jax.Array]:
    spec = P(layer.axis_name)
    return jax.shard_map(
        layer, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=layer.implementation != "ring"
    )


def train(layer: Layer, mesh: Mesh) -> Callable[..., Any]:
    def loss(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.square(forward(layer, mesh)(x, ids, weights).astype(jnp.float32)).sum()

    return jax.grad(loss, argnums=(0, 2))


def compiled(function: Callable[..., Any], arguments: Any, **options: Any) -> Any:
    return jax.jit(function).lower(*arguments).compile(compiler_options=options or None)


def custom_calls(text: str) -> Counter[str]:
    """How often HLO calls each of our targets, without the prefix."""
    return Counter(re.findall(r'custom_call_target="jax_fusco_(\w+)"', text))


def computation_calls(text: str) -> dict[str, Counter[str]]:
    """The same, by the computation that holds the calls."""
    calls: dict[str, Counter[str]] = {}
    name = ""
    for line in text.splitlines():
        if opening := re.match(r"(?:ENTRY )?%([\w.\-]+) .*\{$", line):
            name = opening[1]
        if found := custom_calls(line):
            calls.setdefault(name, Counter()).update(found)
    return calls


# What a shuffle must not hold: exchanges of rows or counts by XLA, sorts, transfers, copies to the
# host (memory space 5).
UNWANTED = re.compile(
    r"= [^=]*?\b(all-to-all|ragged-all-to-all|all-gather|collective-permute|reduce-scatter|sort|"
    r"infeed|outfeed|send|recv)(-start)?\(|S\(5\)"
)


def unwanted(text: str) -> list[str]:
    return [line.strip()[:160] for line in text.splitlines() if UNWANTED.search(line)]
