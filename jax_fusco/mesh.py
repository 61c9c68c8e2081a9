"""The mesh around a call: ranks and groups of the expert axis, and what varies over which axes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jax_fusco import checks

AxisName: TypeAlias = str | tuple[str, ...] | None

GPU_PLATFORMS = ("cuda", "gpu")  # what JAX calls NVIDIA GPUs, the second in some places


@dataclasses.dataclass(frozen=True)
class Axis:
    """The expert axis: mesh axis names whose row-major index is the rank, and the number of ranks.

    No names mean one rank and no collective. With `subgroups` (as `axis_index_groups` of
    `jax.lax` collectives) only the ranks of one subgroup exchange rows, and a rank is a position in
    it.
    """

    names: tuple[str, ...]
    size: int
    subgroups: tuple[tuple[int, ...], ...] | None = None

    def _position(self) -> tuple[jax.Array, jax.Array]:
        """(subgroup, position in it) of this device."""
        table = [(0, 0)] * sum(map(len, self.subgroups or ()))
        for group, members in enumerate(self.subgroups or ()):
            for position, index in enumerate(members):
                table[index] = (group, position)
        mine = jnp.asarray(table, jnp.int32)[lax.axis_index(self.names)]
        return mine[0], mine[1]

    def rank(self) -> jax.Array:
        """This device's rank, int32 []."""
        if not self.names:
            return jnp.int32(0)
        if self.subgroups:
            return self._position()[1]
        return lax.axis_index(self.names).astype(jnp.int32)

    def group(self) -> jax.Array:
        """Index of this device's group: its position on all other manual mesh axes, int32 []."""
        others = tuple(
            name for name in jax.sharding.get_abstract_mesh().manual_axes if name not in self.names
        )
        group = lax.axis_index(others).astype(jnp.int32) if others else jnp.int32(0)
        if self.names and self.subgroups:
            group = group * len(self.subgroups) + self._position()[0]
        return group

    def all_gather(self, x: jax.Array) -> jax.Array:
        """[R, ...]: every rank's `x`, in rank order."""
        if not self.names:
            return x[None]
        return lax.all_gather(x, self.names, axis_index_groups=self.subgroups)

    def all_to_all(self, x: jax.Array) -> jax.Array:
        """[R, ...]: entry r of the result is entry `rank` of rank r's `x` [R, ...]."""
        if not self.names:
            return x
        return lax.all_to_all(x, self.names, 0, 0, axis_index_groups=self.subgroups)


def expert_axis(axis_name: AxisName) -> Axis:
    """The Axis that `axis_name` names here; ValueError where it is not bound.

    Raises:
      TypeError: `axis_name` is neither a string, a tuple of strings nor None.
      ValueError: an axis is unbound, or named twice.
    """
    if axis_name is None:
        return Axis((), 1)
    names = checks.axes("axis_name", axis_name)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"axis_name: got {axis_name!r}, need one or more distinct mesh axes")
    for name in names:
        try:
            lax.axis_size(name)
        except NameError:
            bound = jax.sharding.get_abstract_mesh().manual_axes
            raise ValueError(
                f"axis_name: got {name!r}, need a mesh axis that is bound by an enclosing "
                f"jax.shard_map (bound here: {', '.join(bound) or 'none'})"
            ) from None
    return Axis(names, math.prod(lax.axis_size(name) for name in names))


def is_mesh_axis(axis: Axis) -> bool:
    """Whether every name is a manual mesh axis (and not, say, an axis of `jax.vmap`)."""
    return set(axis.names) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def free_axes() -> tuple[str, ...]:
    """Mesh axes that the enclosing shard_map left to the compiler, if any is larger than 1.

    All of them, those of size 1 included: XLA of jaxlib 0.12 refuses manual axes that are neither
    the whole mesh nor in its order.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = tuple(n for n in mesh.axis_names if n not in mesh.manual_axes)
    return free if mesh.manual_axes and any(mesh.shape[n] > 1 for n in free) else ()


def platform() -> str | None:
    """Platform of the ambient mesh's devices ("cpu", "cuda", ...), None where it is not known."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform


def varying_axes(*trees: Any) -> frozenset[str]:
    """Manual axes over which any leaf varies; none under `check_vma=False`."""
    leaves = jax.tree.leaves(trees)
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in leaves))


def checked_axes(axis: Axis) -> frozenset[str]:
    """The axis' names if the enclosing shard_map tracks what varies, else nothing."""
    return varying_axes(lax.axis_index(axis.names)) if axis.names else frozenset()


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """`tree` with every leaf marked as varying over `axes`."""

    def mark(leaf: jax.Array) -> jax.Array:
        missing = axes - varying_axes(leaf)
        return lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def unshard(tree: Any) -> Any:
    """`tree` with no leaf sharded over Explicit axes that the enclosing shard_map left free.

    Rows are moved whole, whatever the types of a partly manual mesh say of their parts.
    """

    def whole(leaf: jax.Array) -> jax.Array:
        sharded = any(part is not None for part in jax.typeof(leaf).sharding.spec)
        return jax.reshard(leaf, jax.sharding.PartitionSpec()) if sharded else leaf

    return jax.tree.map(whole, tree) if free_axes() else tree


def struct(shape: tuple[int, ...], dtype: Any, axes: frozenset[str]) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a result that varies over `axes`."""
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    # Without a sharding the struct belongs to no mesh, and no mesh has no axis to vary over.
    sharding = jax.sharding.NamedSharding(
        jax.sharding.get_abstract_mesh(), jax.sharding.PartitionSpec()
    )
    varying = jax.sharding.ManualAxisType(varying=axes)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding, manual_axis_type=varying)
