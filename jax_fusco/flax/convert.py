"""Converters between `MoE`'s parameters and the layouts in which other projects keep them.

A layout is a flat dict of arrays, of NumPy or JAX. Values are only moved: both ways are exact.

| layout | names | kernels |
|---|---|---|
| "wi_wo" | gate.kernel, wi_0, wi_1, wo | [in, out] (MaxText) |
| "w13_w2" | router, w13, w2 | [in, out], gate before up in one (Levanter) |
| "gate_up_down" | gate.weight, experts.0.gate_proj.weight, ... | [out, in] (DeepSeek, Qwen3) |
| "w1_w2_w3" | gate.weight, experts.0.w1.weight, ... | [out, in] (Mixtral) |
| "gpt_oss" | router.weight, experts.gate_up_proj, ... | [in, out], gate and up interleaved |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fusco.flax.moe import MoE

Arrays = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How one parameter of ours is stored.

    Shapes are words of one letter for each dimension, the same size throughout a layout, `2` in
    front of a letter doubling it. "{}" in a name stands for the expert; such arrays are stacked.
    """

    ours: str
    shape: str
    theirs: Mapping[str, str]
    load: Callable[..., Any]
    store: Callable[[Any, Any], tuple[Any, ...]]


def _same(ours: str, name: str, shape: str) -> _Rule:
    return _Rule(ours, shape, {name: shape}, lambda _, a: a, lambda _, a: (a,))


def _transposed(ours: str, name: str, shape: str) -> _Rule:
    """`shape` is ours; theirs has the last two dimensions swapped."""
    *front, a, b = shape.split()
    return _Rule(
        ours,
        shape,
        {name: " ".join((*front, b, a))},
        lambda _, array: array.swapaxes(-1, -2),
        lambda _, array: (array.swapaxes(-1, -2),),
    )


def _pair(ours: str, gate: str, up: str, shape: str, *, transposed: bool = False) -> _Rule:
    """Gate and up apart; `shape` is that of each of theirs."""
    words = shape.split()
    swap = (lambda array: array.swapaxes(-1, -2)) if transposed else (lambda array: array)
    front, last = (words[:-2] + words[-1:], words[-2]) if transposed else (words[:-1], words[-1])
    return _Rule(
        ours,
        " ".join((*front, "p", last)),
        {gate: shape, up: shape},
        lambda xp, a, b: xp.stack([swap(a), swap(b)], axis=-2),
        lambda _, array: (swap(array[..., 0, :]), swap(array[..., 1, :])),
    )


def _fused(ours: str, name: str, shape: str, *, interleaved: bool = False) -> _Rule:
    """Gate and up in one last dimension, side by side or taking turns; `shape` is theirs."""
    *front, last = shape.split()

    def load(_: Any, array: Any) -> Any:
        if interleaved:
            return array.reshape(*array.shape[:-1], -1, 2).swapaxes(-1, -2)
        return array.reshape(*array.shape[:-1], 2, -1)

    def store(_: Any, array: Any) -> tuple[Any, ...]:
        array = array.swapaxes(-1, -2) if interleaved else array
        return (array.reshape(*array.shape[:-2], -1),)

    return _Rule(ours, " ".join((*front, "p", last.removeprefix("2"))), {name: shape}, load, store)


def _torch(gate: str, up: str, down: str) -> tuple[_Rule, ...]:
    """Names and shapes of modules that hold [out, in] matrices, one for each expert."""
    names = {name: f"experts.{{}}.{name}.weight" for name in (gate, up, down)}
    shared = {name: f"shared_experts.{name}.weight" for name in (gate, up, down)}
    return (
        _transposed("router_kernel", "gate.weight", "d E"),
        _same("balance_bias", "gate.e_score_correction_bias", "E"),
        _pair("wi_kernel", names[gate], names[up], "E h d", transposed=True),
        _transposed("wo_kernel", names[down], "E h d"),
        _pair("shared_wi_kernel", shared[gate], shared[up], "H d", transposed=True),
        _transposed("shared_wo_kernel", shared[down], "H d"),
    )


_LAYOUTS: dict[str, tuple[_Rule, ...]] = {
    "wi_wo": (
        _same("router_kernel", "gate.kernel", "d E"),
        _same("router_bias", "gate.bias", "E"),
        _pair("wi_kernel", "wi_0", "wi_1", "E d h"),
        _pair("wi_bias", "wi_0_bias", "wi_1_bias", "E h"),
        _same("wo_kernel", "wo", "E h d"),
        _same("wo_bias", "wo_bias", "E d"),
    ),
    "w13_w2": (
        _same("router_kernel", "router", "d E"),
        _fused("wi_kernel", "w13", "E d 2h"),
        _same("wo_kernel", "w2", "E h d"),
    ),
    "gate_up_down": _torch("gate_proj", "up_proj", "down_proj"),
    "w1_w2_w3": _torch("w1", "w3", "w2"),
    "gpt_oss": (
        _transposed("router_kernel", "router.weight", "d E"),
        _same("router_bias", "router.bias", "E"),
        _fused("wi_kernel", "experts.gate_up_proj", "E d 2h", interleaved=True),
        _fused("wi_bias", "experts.gate_up_proj_bias", "E 2h", interleaved=True),
        _same("wo_kernel", "experts.down_proj", "E h d"),
        _same("wo_bias", "experts.down_proj_bias", "E d"),
    ),
}
_EVERY_BLOCK_HAS = ("router_kernel", "wi_kernel", "wo_kernel")
LAYOUTS: tuple[str, ...] = tuple(_LAYOUTS)
"""The names of all layouts."""


def _rules(layout: str) -> tuple[_Rule, ...]:
    if layout not in _LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, need one of {', '.join(LAYOUTS)}")
    return _LAYOUTS[layout]


def _numpy_of(array: Any) -> Any:
    return np if isinstance(array, np.ndarray) else jnp


def _check_shape(name: str, array: Any, shape: str, sizes: dict[str, int]) -> None:
    """Every letter of `shape` has one size; those seen for the first time are added to `sizes`."""
    words = shape.split()
    if len(array.shape) == len(words):
        for word, size in zip(words, array.shape, strict=True):
            factor = 2 if word.startswith("2") else 1
            if size % factor == 0:
                sizes.setdefault(word[-1], size // factor)
        need = [math.prod((int(word[:-1] or 1), sizes.get(word[-1], -1))) for word in words]
        if list(array.shape) == need:
            return
    known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items() if letter in shape)
    where = f" where {known}" if known else ""
    raise ValueError(f"{name}: got shape {tuple(array.shape)}, need [{', '.join(words)}]" + where)


def _gather(arrays: Arrays, name: str, shape: str, sizes: dict[str, int]) -> tuple[Any, set[str]]:
    """The array of that name (the experts' stacked) and the names it took; None if missing."""
    if "{}" not in name:
        if name not in arrays:
            return None, set()
        _check_shape(name, arrays[name], shape, sizes)
        return arrays[name], {name}
    names = []
    while (one := name.format(len(names))) in arrays:
        _check_shape(one, arrays[one], shape.removeprefix("E "), sizes)
        names.append(one)
    if not names:
        return None, set()
    if (count := sizes.setdefault("E", len(names))) < len(names):
        raise ValueError(
            f"{name.replace('{}', '*')}: got {len(names)} experts, need {count}, one for "
            "each row of the router"
        )
    if count > len(names):
        raise ValueError(
            f"{name.format(len(names))}: got nothing, need one for each of {count} experts"
        )
    return _numpy_of(arrays[names[0]]).stack([arrays[one] for one in names]), set(names)


def load_params(arrays: Arrays, layout: str) -> dict[str, Any]:
    """Another project's arrays under the names and in the shapes of `MoE`'s attributes.

    Args:
      arrays: the arrays of one layer by name; biases and shared experts may be missing.
      layout: one of `LAYOUTS`; the module's table says what each is.

    Raises:
      ValueError: a missing or unknown name, or a shape that does not fit the others.
    """
    sizes: dict[str, int] = {}
    params, used = {}, set()
    for rule in _rules(layout):
        found = {name: _gather(arrays, name, shape, sizes) for name, shape in rule.theirs.items()}
        used |= set().union(*(names for _, names in found.values()))
        missing = [name for name, (array, _) in found.items() if array is None]
        if missing and (len(missing) < len(found) or rule.ours in _EVERY_BLOCK_HAS):
            raise ValueError(f"{missing[0].format(0)}: got nothing, need it in layout {layout!r}")
        if not missing:
            stacked = [array for array, _ in found.values()]
            params[rule.ours] = rule.load(_numpy_of(stacked[0]), *stacked)
    if unknown := sorted(set(arrays) - used):
        raise ValueError(f"{unknown[0]}: got a name that layout {layout!r} does not have")
    return params


def store_params(params: Arrays, layout: str) -> dict[str, Any]:
    """The inverse of `load_params`: `MoE`'s parameters under the layout's names and in its shapes.

    Raises:
      ValueError: a parameter the layout has no place for, or a shape that does not fit the others.
    """
    rules = {rule.ours: rule for rule in _rules(layout)}
    sizes = {"p": 2}
    arrays: dict[str, Any] = {}
    for name, array in params.items():
        if name not in rules:
            raise ValueError(f"{name}: got a parameter that layout {layout!r} has no place for")
        _check_shape(name, array, rules[name].shape, sizes)
        stored = rules[name].store(_numpy_of(array), array)
        for theirs, one in zip(rules[name].theirs, stored, strict=True):
            if "{}" in theirs:
                arrays |= {theirs.format(expert): part for expert, part in enumerate(one)}
            else:
                arrays[theirs] = one
    return arrays


def assign_params(moe: MoE, params: Arrays) -> None:
    """Puts arrays, as `load_params` gives them, into the block, in its dtypes and shardings.

    For use outside of `jax.jit`. Every parameter of the block must be there: give zeros for a
    balance bias that was not published. Where this raises, the block stays as it was.

    Raises:
      ValueError: a name the block does not have, one that is missing, or a shape that is not the
        block's own.
    """
    present = moe.params()
    for name, old in present.items():
        if name not in params:
            raise ValueError(f"{name}: got nothing, need shape {old.shape}: this block has one")
    for name, array in params.items():
        if name not in present:
            raise ValueError(f"{name}: got a parameter that this block does not have")
        old = present[name]
        if tuple(array.shape) != old.shape:
            raise ValueError(f"{name}: got shape {tuple(array.shape)}, need {old.shape}")
    for name, old in present.items():
        value = jnp.asarray(params[name], old.dtype)
        getattr(moe, name)[...] = jax.device_put(value, old.sharding)
