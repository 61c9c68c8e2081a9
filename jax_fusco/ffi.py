"""The plan and the row movers as XLA custom calls: `implementation="fused"`.

The only module that touches compiled code. docs/architecture.md has the contract of each call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pathlib
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import PartitionSpec

from jax_fusco import blas
from jax_fusco.mesh import (
    GPU_PLATFORMS,
    Axis,
    checked_axes,
    free_axes,
    platform,
    struct,
    vary,
    varying_axes,
)
from jax_fusco.store import job_store

MAX_ARRAYS = 16  # that one call moves: as many as ranks on GPUs can tell each other of


def runtime_ffi_version() -> tuple[int, int]:
    """(major, minor) of the running jaxlib's FFI, from the header that comes with it."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    text = header.read_text()
    major, minor = (
        int(match.group(1))
        for part in ("MAJOR", "MINOR")
        if (match := re.search(rf"#define XLA_FFI_API_{part} (\d+)", text))
    )
    return major, minor


def _checked(module: Any) -> Any:
    """A compiled module, once it is known to fit the jaxlib that runs."""
    built, found = module.api_version(), runtime_ffi_version()
    if built[0] != found[0] or built[1] > found[1]:
        raise ImportError(
            f"jax_fusco was built for FFI version {built[0]}.{built[1]}, but jaxlib "
            f"{version('jaxlib')} has {found[0]}.{found[1]}: install jaxlib>=0.10.2, or rebuild "
            "jax_fusco against this jaxlib"
        )
    return module


@functools.cache
def cpu_module() -> Any:
    """The engine of CPU devices."""
    try:
        from jax_fusco import _ffi
    except ImportError as error:
        raise ImportError(
            f"implementation: 'fused' needs the compiled module jax_fusco._ffi ({error}); "
            "install jax_fusco with pip, or use implementation='xla'"
        ) from error
    return _checked(_ffi)


@functools.cache
def cuda_module() -> Any | None:
    """The engine of NVIDIA GPUs, None where this build has none."""
    try:
        module = importlib.import_module("jax_fusco._cuda")
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        raise ImportError(
            f"jax_fusco._cuda cannot be loaded ({error}): reinstall jax_fusco with pip"
        ) from error
    return _checked(module)


@functools.cache
def _cuda_plugin() -> bool:
    """Whether JAX can compile for NVIDIA GPUs here."""
    found = importlib.util.find_spec("jax_plugins")
    places = found.submodule_search_locations if found else None
    return any(path.name.startswith("xla_cuda") for place in places or ()
               for path in pathlib.Path(place).iterdir())  # fmt: skip


def may_run_on_gpu() -> bool:
    """Whether what is traced now may be compiled for GPUs by an engine that is there."""
    if platform() not in (None, *GPU_PLATFORMS):
        return False
    return _cuda_plugin() and cuda_module() is not None


@functools.cache
def register() -> None:
    """Registers every custom call now, starting JAX's backends if they are not up.

    Calls register themselves when they are traced. Programs that were exported or serialised
    elsewhere are never traced here: call this before running them. Export a program for CPU devices
    by itself: in one for several platforms nothing orders its calls among XLA's collectives there.

    Raises:
      ImportError: the compiled module is missing, or was built for a newer jaxlib.
    """
    modules = {"cpu": cpu_module()}
    if (cuda := cuda_module()) is not None:
        modules["CUDA"] = cuda
    # Types must be known before the handlers that use them, and what is registered before the
    # backend is up reaches it in the wrong order. The start loads the plugins of all platforms, and
    # asks for no platform that JAX_PLATFORMS may exclude.
    jax.devices()
    for name, module in modules.items():
        for type_name, registration in module.types():
            jax.ffi.register_ffi_type(type_name, registration, platform=name)
        for target, stages in module.registrations():
            jax.ffi.register_ffi_target(target, stages, platform=name)
    modules["cpu"].set_sgemm(blas.sgemm())
    if cuda is not None and (store := job_store()) is not None:
        cuda.connect(**vars(store))


def in_manual_axes(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` where all mesh axes are manual.

    The compiler would run one copy of a call per device along the axes that the enclosing shard_map
    left to it, all with the same rank and group. Inside an inner shard_map they are manual, so each
    copy is a group of its own.
    """
    inner_axes = free_axes()
    if not inner_axes:
        return call
    return jax.shard_map(
        call,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        axis_names=set(inner_axes),
        check_vma=False,
    )


def among_collectives(name: str, custom_call: Callable[..., Any], axis: Axis) -> Callable[..., Any]:
    """`custom_call`, its first operand the rank, as a collective of the program on CPU devices.

    XLA:CPU starts collectives in the program's order on every device, custom calls in any order,
    where ranks that wait in different calls would wait for ever. A call that is not inlined is one
    step of its schedule, and one of the collectives for the sake of that which it holds and never
    runs. (JAX inlines all calls of a program that was exported for several platforms.)
    """

    def never(rank: jax.Array, *others: jax.Array | None) -> jax.Array:
        # Of all operands: partial evaluation would take a branch that it knows before to a place of
        # its own.
        arrays = jax.tree.leaves(others)
        firsts = [x.reshape(-1)[:1].astype(bool).sum(dtype=rank.dtype) for x in arrays]
        one_axis = max(axis.names, key=lax.axis_size)  # several must come in the mesh's order
        return vary(lax.ppermute(sum(firsts, rank), one_axis, [(0, 0)]), varying_axes(rank))

    def nothing(rank: jax.Array, *others: jax.Array | None) -> jax.Array:
        return 0 * rank  # of the type that any result has in an inner shard_map

    def ordered(rank: jax.Array, *others: jax.Array | None) -> Any:
        alike = vary((rank, *others), varying_axes(rank, others))
        return custom_call(rank + lax.cond(rank < 0, never, nothing, *alike), *others)

    ordered.__name__ = f"jax_fusco_{name}"

    def called(*operands: jax.Array | None) -> Any:
        with set_xla_metadata(inlineable="false"):
            return jax.jit(ordered)(*operands)

    return called


def no_elements(like: jax.Array, dtype: Any, *row: int) -> jax.Array:
    """`[0, *row]`. From an operand: a constant may be saved for a backward pass and come back as a
    parameter, and jaxlib 0.11.2 crashes on parameters without elements."""
    return like.reshape(-1)[:0].reshape(0, *row).astype(bool).astype(dtype)


def call(
    name: str,
    axis: Axis,
    results: Sequence[tuple[tuple[int, ...], Any]],
    *operands: jax.Array | None,
    attributes: dict[str, int] | None = None,
    aliases: dict[int, int] | None = None,
) -> Sequence[jax.Array]:
    """The custom call `jax_fusco_<name>`: `rank` and `group` first, then the operands.

    None is an integer array of no elements.
    """
    shapes = [x.shape for x in operands if x is not None]
    for shape in (*shapes, *(shape for shape, _ in results)):
        if not all(isinstance(size, int) for size in shape):
            raise ValueError(
                f"jax_fusco_{name}: got an array of shape {shape}, need sizes that are numbers: "
                "export one program for each"
            )
    register()
    varying = varying_axes(operands) | checked_axes(axis)

    @functools.partial(jax.jit, inline=True)
    def custom_call(*operands: jax.Array | None) -> Sequence[jax.Array]:
        last = jax.tree.leaves(operands)[-1]
        arrays = (no_elements(last, jnp.int32) if x is None else x for x in operands)
        return jax.ffi.ffi_call(
            f"jax_fusco_{name}",
            [struct(shape, dtype, varying) for shape, dtype in results],
            vmap_method="sequential",
            input_output_aliases=aliases,
        )(*arrays, num_ranks=axis.size, **(attributes or {}))

    def local(rank: jax.Array, *operands: jax.Array | None) -> Sequence[jax.Array]:
        operands = (rank, axis.group(), *operands)
        if axis.size == 1 or platform() in GPU_PLATFORMS:
            return custom_call(*operands)
        ordered = among_collectives(name, custom_call, axis)
        # Programs for several platforms choose when they run, those for one when they are lowered.
        return lax.platform_dependent(*operands, cpu=ordered, default=custom_call)

    return in_manual_axes(local)(axis.rank(), *operands)


def plan(
    expert_ids: jax.Array,
    *,
    axis: Axis,
    num_experts: int,
    capacity: int,
    alignment: int,
    chain_rows: int,
) -> tuple[jax.Array, ...]:
    """The integers of a shuffle, in the order of the fields of `Plan`."""
    local = num_experts // axis.size
    shapes = [
        (local,),
        (local,),
        expert_ids.shape,
        expert_ids.shape,
        (capacity,),
        (capacity,),
        (),
        (),
        (chain_rows,),
    ]
    module = cuda_module() if may_run_on_gpu() else None
    if module is not None and platform() in GPU_PLATFORMS and num_experts > module.max_experts:
        raise ValueError(
            f"num_experts: got {num_experts}, need at most {module.max_experts} for 'fused' on "
            "GPUs, use 'xla'"
        )
    shape = (axis.size, *expert_ids.shape, num_experts, capacity, alignment)
    scratch = 0 if module is None else module.plan_scratch_bytes(*shape)
    results = [*((shape, jnp.int32) for shape in shapes), ((scratch,), jnp.uint8)]
    attributes = {"num_experts": num_experts, "alignment": alignment}
    return tuple(call("plan", axis, results, expert_ids, attributes=attributes))[:-1]


def gather_rows(
    rows: tuple[jax.Array, ...],
    source_rank: jax.Array,
    source: jax.Array,
    chain: jax.Array | None = None,
    *,
    axis: Axis,
    fanout: int,
    zero_tail: bool,
    into: tuple[jax.Array, ...] | None = None,
) -> tuple[jax.Array, ...]:
    """`out[m] = rows@source_rank[m][source[m] // fanout]`, zero (or untouched) where negative.

    The results take over the memory of `into`, arrays of their shapes and dtypes, where given:
    untouched rows (`source` is -2, `zero_tail` is False) are those of `into`, bit for bit.
    """
    assert into is None or (len(into) == len(rows) and not zero_tail)
    attributes = {"fanout": fanout, "zero_tail": int(zero_tail)}
    moved: list[jax.Array] = []
    for first in range(0, len(rows), MAX_ARRAYS):
        some = rows[first : first + MAX_ARRAYS]
        taken = () if into is None else into[first : first + MAX_ARRAYS]
        results = [(source.shape + x.shape[1:], x.dtype) for x in some]
        operands = (source_rank, source, chain, *some, *taken)
        # Operands are rank, group and these.
        aliases = {2 + len(operands) - len(taken) + i: i for i in range(len(taken))}
        moved += call(
            "gather_rows", axis, results, *operands, attributes=attributes, aliases=aliases
        )
    return tuple(moved)


def gather_rows_weighted(
    g: jax.Array,
    weights: jax.Array,
    y: jax.Array,
    source_rank: jax.Array,
    source: jax.Array,
    chain: jax.Array | None = None,
    *,
    axis: Axis,
) -> tuple[jax.Array, jax.Array]:
    """Backward of the weighted sum: `dy[m] = w * g` of its assignment, `dots[m] = <g, y[m]>`."""
    results = [(y.shape, y.dtype), (source.shape, weights.dtype)]
    operands = (source_rank, source, chain, g, weights, y)
    dy, dots = call("gather_rows_weighted", axis, results, *operands)
    return dy, dots


def reduce_rows(
    y: jax.Array,
    weights: jax.Array | None,
    slot_rank: jax.Array,
    slot: jax.Array,
    *,
    axis: Axis,
    out_dtype: Any,
) -> jax.Array:
    """`out[t] = sum_j w[t, j] * y@slot_rank[t, j][slot[t, j]]`, j ascending, one fma each."""
    results = [(slot.shape[:1] + y.shape[1:], out_dtype)]
    optional = () if weights is None else (weights,)
    return call("reduce_rows", axis, results, slot_rank, slot, y, *optional)[0]


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis: Axis,
) -> jax.Array:
    """`jax.lax.ragged_all_to_all`, each slice copied once to where it belongs."""
    results = [(output.shape, output.dtype)]
    tables = (input_offsets, send_sizes, output_offsets, recv_sizes)
    aliases = {7: 0}  # operands are rank, group, four tables, operand, output
    return call("ragged_all_to_all", axis, results, *tables, operand, output, aliases=aliases)[0]
