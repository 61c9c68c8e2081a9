"""The mesh around the block: which axes do what, and the shard_map it opens over them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_fusco.flax.layer import LocalAxes
from jax_fusco.mesh import AxisName, varying_axes

# One entry for each dimension, as in a PartitionSpec.
Entry = str | tuple[str, ...] | None
Entries = tuple[Entry, ...]


def axis_names(entry: Entry) -> tuple[str, ...]:
    """The axes of one entry."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the mesh serves one call of the block.

    Attributes:
      local: the roles of the axes, as seen inside.
      opened: axes that the block's own shard_map makes manual; empty where it opens none.
      mesh: the mesh of that shard_map; None means the ambient one.
      sizes: (name, size) of every mesh axis.
      explicit: those of `opened` whose type is Explicit.
    """

    local: LocalAxes
    opened: tuple[str, ...] = ()
    mesh: Mesh | None = None
    sizes: tuple[tuple[str, int], ...] = ()
    explicit: tuple[str, ...] = ()

    def size(self, entry: Entry) -> int:
        """Number of shards over the axes of `entry`."""
        sizes = dict(self.sizes)
        return math.prod(sizes[name] for name in axis_names(entry))


def _check_axes(mesh: Mesh | AbstractMesh, argument: str, names: tuple[str, ...]) -> None:
    for name in names:
        if name not in mesh.axis_names:
            known = ", ".join(mesh.axis_names)
            raise ValueError(
                f"{argument}: got {name!r}, need an axis of the mesh ({known}) or None"
            )


def resolve(
    mesh: Mesh | None,
    axis_name: AxisName,
    token_axes: Entry,
    model_axis: str | None,
) -> Layout:
    """The layout for `mesh`, or for the ambient mesh if None, or for one device if there is none.

    Inside a shard_map the ambient mesh counts, whatever `mesh` is, and its manual axes stay as they
    are: only the others are opened.

    Raises:
      ValueError: an axis the mesh does not have, or one with two roles.
    """
    ambient = jax.sharding.get_abstract_mesh()
    if mesh is None or ambient.manual_axes:
        given, mesh = ambient, None
    else:
        given = mesh
    if given.empty:
        return Layout(LocalAxes(None, (), None))
    expert, model = axis_names(axis_name), axis_names(model_axis)
    _check_axes(given, "axis_name", expert)
    _check_axes(given, "model_axis", model)
    if token_axes is None:
        tokens = tuple(name for name in given.axis_names if name not in model)
    else:
        tokens = axis_names(token_axes)
        _check_axes(given, "token_axes", tokens)
    if clash := set(model) & {*expert, *tokens}:
        raise ValueError(
            f"model_axis: got {min(clash)!r}, need an axis that axis_name and token_axes leave free"
        )
    if missing := [name for name in expert if name not in tokens]:
        raise ValueError(
            f"token_axes: got {token_axes!r}, need axis_name's {missing[0]!r} among them"
        )
    types = dict(zip(given.axis_names, given.axis_types, strict=True))
    opened = tuple(name for name in given.axis_names if types[name] != AxisType.Manual)
    return Layout(
        local=LocalAxes(axis_name, tokens, model_axis),
        opened=opened,
        mesh=mesh,
        sizes=tuple(given.shape.items()),
        explicit=tuple(name for name in opened if types[name] == AxisType.Explicit),
    )


def _only(entries: Entries, axes: tuple[str, ...]) -> Entries:
    """`entries` without the axes that are not in `axes`."""
    kept = (tuple(name for name in axis_names(entry) if name in axes) for entry in entries)
    return tuple(names or None for names in kept)


def _present_entries(x: jax.Array) -> Entries:
    """How `x` is sharded over Explicit axes, one entry for each dimension."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def _reshard(layout: Layout, x: jax.Array, entries: Entries) -> jax.Array:
    """`x` sharded as shard_map wants it; only Explicit axes need to be told."""
    if not layout.explicit:
        return x
    want = tuple(axis_names(entry) for entry in _only(entries, layout.explicit))
    if tuple(axis_names(entry) for entry in _present_entries(x)) == want:
        return x
    spec = PartitionSpec(*(names or None for names in want))
    return jax.reshard(x, spec if layout.mesh is None else NamedSharding(layout.mesh, spec))


def _token_entries(layout: Layout, x: jax.Array) -> Entries | None:
    """How to shard the leading dimensions of `x` over the token axes; None if sizes forbid it."""
    axes = tuple(name for name in layout.opened if name in layout.local.tokens)
    present = _present_entries(x)
    named = [name for entry in present[:-1] for name in axis_names(entry)]
    if present[-1] is None and sorted(named) == sorted(axes):
        return present[:-1]
    entries = []
    for length in x.shape[:-1]:
        taken = len(axes)
        while length % layout.size(axes[:taken]):
            taken -= 1
        entries.append(axes[:taken] or None)
        axes = axes[taken:]
    return None if axes else tuple(entries)


def _pad(layout: Layout, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """`x` [..., d] as [N, d] and `mask` as [N], N the next count that the token axes divide."""
    tokens = math.prod(x.shape[:-1])
    mask = (
        jnp.ones(x.shape[:-1], bool)
        if mask is None
        else _reshard(layout, mask, (None,) * mask.ndim)
    )
    missing = -tokens % layout.size(_only((layout.local.tokens,), layout.opened)[0])
    x = _reshard(layout, x, (None,) * x.ndim).reshape(tokens, x.shape[-1])
    return jnp.pad(x, ((0, missing), (0, 0))), jnp.pad(mask.reshape(tokens), (0, missing))


def _tracked() -> bool:
    """What `check_vma` must be here: as in the shard_map around, if there is one."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return not manual or bool(varying_axes(jax.lax.axis_index(manual)))


def run_sharded(
    function: Callable[..., Any],
    layout: Layout,
    param_entries: Mapping[str, Entries],
    params: Mapping[str, jax.Array],
    x: jax.Array,
    mask: jax.Array | None,
) -> Any:
    """`function(params, x, mask)` on every rank of the opened axes: (by token, shared values).

    What is by token is a pytree of arrays with the leading dimensions of `x` and one more. They are
    sharded as `x` is; along their last dimension where it is as long as that of `x`.
    """
    before, present = jax.typeof(x).sharding, _present_entries(x)
    entries = _token_entries(layout, x)
    padded = entries is None
    shape = x.shape
    if entries is None:
        x, mask = _pad(layout, x, mask)
        entries = _only((layout.local.tokens,), layout.opened)
    x_entries = (*entries, None)
    param_entries = {name: _only(param_entries[name], layout.opened) for name in params}
    operands: list[Any] = [
        {name: _reshard(layout, value, param_entries[name]) for name, value in params.items()},
        _reshard(layout, x, x_entries),
    ]
    in_specs: list[Any] = [
        {name: PartitionSpec(*entry) for name, entry in param_entries.items()},
        PartitionSpec(*x_entries),
    ]
    if mask is not None:
        operands.append(_reshard(layout, mask, entries))
        in_specs.append(PartitionSpec(*entries))
    mapped = jax.shard_map(
        lambda params, x, mask=None: function(params, x, mask),
        mesh=layout.mesh,
        in_specs=tuple(in_specs),
        out_specs=(PartitionSpec(*x_entries), PartitionSpec()),
        axis_names=set(layout.opened),
        check_vma=_tracked(),
    )
    by_token, rest = mapped(*operands)

    def like_x(y: jax.Array) -> jax.Array:
        last = y.shape[-1]
        if padded:
            y = _reshard(layout, y, (None, None))[: math.prod(shape[:-1])]
            y = y.reshape(*shape[:-1], last)
        if layout.explicit and not before.mesh.empty:
            entries = present if last == shape[-1] else (*present[:-1], None)
            y = jax.reshard(y, NamedSharding(before.mesh, PartitionSpec(*entries)))
        return y

    return jax.tree.map(like_x, by_token), rest
