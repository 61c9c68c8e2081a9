"""Moving experts in a checkpoint's content: parameters, router columns, an optimizer's moments."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding

from jax_fusco.placement import Placement

# The axis of the experts, counted from the end, by the names of jax_fusco.flax.MoE's attributes.
ROUTER_AXES = {"router_kernel": -1, "router_bias": -1, "balance_bias": -1}
EXPERT_AXES = {"wi_kernel": -4, "wi_bias": -3, "wo_kernel": -3, "wo_bias": -2}
_SUFFIXES = ("value", "raw_value")  # what NNX may put behind a variable's name

Path = tuple[str, ...]


def apply(
    placement: Placement,
    model_state: Any,
    optimizer_state: Any,
    expert_axes: Mapping[str, int] | None,
) -> tuple[Any, Any]:
    """See `Placement.apply`."""
    paths, leaves, tree = _flatten(model_state)
    own_axes = _checked(expert_axes or {}, paths)
    axes = {**ROUTER_AXES, **EXPERT_AXES, **own_axes}
    # An attention may have a wo_kernel too, of as many heads as there are experts.
    blocks = {path[:-1] for path in paths if path and path[-1] == "wi_kernel"}
    blocks &= {path[:-1] for path in paths if path and path[-1] == "wo_kernel"}
    sure = {*ROUTER_AXES, *own_axes}
    owned = {
        path: leaf
        for path, leaf in zip(paths, leaves, strict=True)
        if _name(path, axes) and (path[-1] in sure or path[:-1] in blocks)
    }
    if not owned:
        raise ValueError(
            "model_state: got no router_kernel, and no block with a wi_kernel and a wo_kernel, "
            "need one, or expert_axes with the names of other parameters"
        )
    for path, leaf in owned.items():
        _check_axis(path, leaf.shape, axes[path[-1]], placement.num_experts)
    layer_of = _layers(placement, owned, axes)
    moves = [_move(placement, path, layer_of, axes) if path in owned else None for path in paths]
    steps: list[tuple[Any, Any]] = list(zip(leaves, moves, strict=True))
    there = len(steps)
    optimizer_tree = None
    if optimizer_state is not None:
        moment_paths, moments, optimizer_tree = _flatten(optimizer_state)
        known = set(paths)
        for path, moment in zip(moment_paths, moments, strict=True):
            of = _parameter_of(path, known, owned)
            move = None
            if of in owned:
                move = _moment_move(placement, path, moment, of, owned, layer_of, axes)
            elif of not in known and _name(path, axes):
                raise ValueError(
                    f"optimizer_state: got {_spell(path)}, need a parameter of that name in "
                    "model_state"
                )
            steps.append((moment, move))
    moved = [leaf if move is None else _take(leaf, *move) for leaf, move in steps]
    new_state = tree.unflatten(moved[:there])
    return new_state, None if optimizer_tree is None else optimizer_tree.unflatten(moved[there:])


def _flatten(state: Any) -> tuple[list[Path], list[Any], Any]:
    found, tree = jax.tree_util.tree_flatten_with_path(state)
    paths = []
    for keys, _ in found:
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        while path and path[-1] in _SUFFIXES:
            path = path[:-1]
        paths.append(path)
    return paths, [leaf for _, leaf in found], tree


def _checked(expert_axes: Mapping[str, Any], paths: list[Path]) -> dict[str, int]:
    """`expert_axes`, if each names a parameter, and counts from the end."""
    names = {path[-1] for path in paths if path}
    for name, axis in expert_axes.items():
        if name not in names:
            raise ValueError(f"expert_axes: got {name!r}, need the name of a parameter")
        if isinstance(axis, bool) or not isinstance(axis, int) or axis >= 0:
            raise ValueError(
                f"expert_axes: got {axis!r} for {name!r}, need an axis counted from the end, "
                "a negative integer"
            )
    return dict(expert_axes)


def _parameter_of(path: Path, known: Collection[Path], owned: Collection[Path]) -> Path:
    """The parameter that a moment at `path` belongs to, or `path` itself."""
    for at in range(len(path)):
        if path[at:] in known:
            return path[at:]
    # An optimizer that holds several arrays for a parameter (SM3) puts them below its path.
    inside = (path[at:end] for end in range(len(path)) for at in range(end))
    return next((part for part in inside if part in owned), path)


def _name(path: Path, axes: Mapping[str, int]) -> bool:
    return bool(path) and path[-1] in axes


def _spell(path: Path) -> str:
    return "/".join(path)


def _check_axis(path: Path, shape: tuple[int, ...], axis: int, experts: int) -> None:
    if len(shape) < -axis or shape[axis] != experts:
        raise ValueError(
            f"model_state: got {_spell(path)} of shape {tuple(shape)}, need the placement's "
            f"{experts} experts along axis {axis}"
        )


def _natural(path: Path) -> list[Any]:
    """Layer 10 comes after layer 9."""
    parts = re.split(r"(\d+)", "/".join(path))
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def _layers(
    placement: Placement, owned: Mapping[Path, Any], axes: Mapping[str, int]
) -> dict[Path, int | None]:
    """The layer of each parameter by its path; None: all, along the leading axis or the same."""
    layers = placement.num_layers
    if layers is None:
        return dict.fromkeys(owned)
    # A layer's parameters may lie in one block or in several (its router beside its experts).
    by_name: dict[str, list[Path]] = {}
    for path in sorted(owned, key=_natural):
        by_name.setdefault(path[-1], []).append(path)
    counts = {len(paths) for paths in by_name.values()}
    if counts == {layers}:
        return {path: layer for paths in by_name.values() for layer, path in enumerate(paths)}
    stacked = all(
        leaf.ndim > -axes[path[-1]] and leaf.shape[0] == layers for path, leaf in owned.items()
    )
    if counts == {1} and stacked:
        return dict.fromkeys(owned)
    blocks = sorted({path[:-1] for path in owned}, key=_natural)
    if len(blocks) == layers and counts != {1}:  # some layers have biases, say, and some have none
        return {path: blocks.index(path[:-1]) for path in owned}
    got = ", ".join(f"{len(paths)} {name}" for name, paths in by_name.items())
    if len(counts) == 1:
        got = f"{counts.pop()} MoE layers ({_spell(min(owned, key=_natural))}, ...)"
    raise ValueError(f"model_state: got {got}, need the placement's {layers}")


def _move(
    placement: Placement, path: Path, layer_of: Mapping[Path, int | None], axes: Mapping[str, int]
) -> tuple[Any, int] | None:
    """(index [slots] or [layers, slots], axis from the end), or None where nothing moves."""
    if placement.has_replicas and path[-1] in ROUTER_AXES:
        return None  # the router goes on speaking of experts
    layer = layer_of[path]
    index = placement.expert_of_slot
    return (index if layer is None else index[layer]), axes[path[-1]]


def _moment_move(
    placement: Placement,
    path: Path,
    moment: Any,
    owner: Path,
    owned: Mapping[Path, Any],
    layer_of: Mapping[Path, int | None],
    axes: Mapping[str, int],
) -> tuple[Any, int] | None:
    """The move of the parameter that a moment belongs to, along the moment's own axis."""
    move = _move(placement, owner, layer_of, axes)
    param, shape = owned[owner].shape, tuple(moment.shape)
    if move is None or int(np.prod(shape)) == 1:
        return None
    if shape == param:
        return move
    # A factored moment (Adafactor): the parameter's shape without one axis.
    expert = len(param) + move[1]
    found = set()
    for gone in range(len(param)):
        if shape == (*param[:gone], *param[gone + 1 :]):
            found.add(None if gone == expert else (expert - (gone < expert)) - len(shape))
    if len(found) != 1:
        raise ValueError(
            f"optimizer_state: got {_spell(path)} of shape {shape}, need that of the parameter, "
            f"{tuple(param)}, or one that tells the axis of the experts"
        )
    axis = found.pop()
    return None if axis is None else (move[0], axis)


def _take(array: Any, index: Any, axis: int) -> Any:
    """`array[..., index, ...]` along `axis` (from the end), in its sharding."""
    if isinstance(array, np.ndarray):
        return _gather(np, array, np.asarray(index), axis)
    if isinstance(array, Tracer) or not isinstance(array, jax.Array):
        return _gather(jnp, array, index, axis)
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding):
        return _gather_jit(sharding, axis)(array, np.asarray(index))
    # Explicit axes refuse to gather along a sharded axis; the same devices under Auto do not.
    mesh = Mesh(np.asarray(sharding.mesh.devices), sharding.mesh.axis_names)
    plain = NamedSharding(mesh, sharding.spec)
    with jax.set_mesh(mesh):
        moved = _gather_jit(plain, axis)(jax.device_put(array, plain), np.asarray(index))
    return jax.device_put(moved, sharding)


@functools.cache
def _gather_jit(sharding: Any, axis: int) -> Any:
    return jax.jit(lambda a, i: _gather(jnp, a, i, axis), out_shardings=sharding)


def _gather(xp: Any, array: Any, index: Any, axis: int) -> Any:
    if index.ndim == 1:
        return xp.take(array, index, axis=axis)
    # One index a layer, along the leading axis.
    shape = [1] * array.ndim
    shape[0], shape[axis] = index.shape
    return xp.take_along_axis(array, index.reshape(shape), axis=axis)
