"""What most tests need: meshes of host devices, and a function run under `jax.shard_map`."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_fusco import fetch

P = PartitionSpec
ROWS = P("expert")
IMPLEMENTATIONS = ("xla", "fused")
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def cases(names: str, every: Sequence[Any], *, xla: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes over implementation and `names`: "fused" over `every`, "xla" over a part of it.

    Plain XLA takes seconds to compile what the engine compiles in a fraction of one.
    """
    assert all(case in every for case in xla)
    pairs = [("fused", case) for case in every] + [("xla", case) for case in xla]
    several = "," in names
    return pytest.mark.parametrize(
        f"implementation,{names}", [(n, *(case if several else (case,))) for n, case in pairs]
    )


def make_mesh(
    shape: int | Mapping[str, int],
    *,
    axis_type: AxisType = AxisType.Auto,
    order: Sequence[int] | None = None,
) -> Mesh:
    """Mesh over the first devices: `shape` is a size for "expert", or sizes by axis name.

    `order` permutes the devices used, so that ranks differ from device ordinals.
    """
    sizes = {"expert": shape} if isinstance(shape, int) else dict(shape)
    count = math.prod(sizes.values())
    devices = np.asarray(jax.devices()[:count])
    if order is not None:
        devices = devices[np.asarray(order)]
    return Mesh(
        devices.reshape(tuple(sizes.values())), tuple(sizes), axis_types=(axis_type,) * len(sizes)
    )


def sharded(
    function: Callable[..., Any],
    mesh: Mesh,
    *,
    in_specs: Any = ROWS,
    out_specs: Any = ROWS,
    check_vma: bool = True,
    jit: bool = True,
    **options: Any,
) -> Callable[..., Any]:
    """`function` under `jax.shard_map` over `mesh`, jitted; specs default to rows over "expert"."""
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma, **options
    )
    return jax.jit(mapped) if jit else mapped


@contextlib.contextmanager
def rows_in_slices() -> Iterator[None]:
    """Plain XLA asks for rows, however few they are, and moves them in small slices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "_gathers_all", lambda *_: False)
        patch.setattr(fetch, "_SMALL", 1)
        patch.setattr(fetch, "_SLICE", 1)
        yield


def place(mesh: Mesh, specs: Any, *arguments: Any) -> tuple[Any, ...]:
    """Arguments laid out by one spec, or by one each: Explicit meshes accept nothing else."""
    each = (specs,) * len(arguments) if isinstance(specs, PartitionSpec) else specs
    return tuple(
        jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arguments, each, strict=True)
    )


def run_python(
    code: str,
    *,
    arguments: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter that finds the package and the test modules."""
    # The package this process tests, installed or not, and nothing else by that name.
    package = importlib.util.find_spec("jax_fusco")
    assert package is not None
    assert package.origin is not None
    places = [str(pathlib.Path(package.origin).parent.parent), str(pathlib.Path(__file__).parent)]
    path = os.pathsep.join(places + list(filter(None, [os.environ.get("PYTHONPATH")])))
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def per_rank(
    function: Callable[..., Any],
    mesh: Mesh | int,
    axis: str | tuple[str, ...] = "expert",
    *,
    check_vma: bool = True,
    jit: bool = True,
    **options: Any,
) -> Callable[..., Any]:
    """`function` on every rank: leaves gain a leading axis of ranks, as in the oracle."""
    mesh = make_mesh(mesh) if isinstance(mesh, int) else mesh

    def local(*arguments: Any) -> Any:
        results = function(*jax.tree.map(lambda a: a[0], arguments))
        return jax.tree.map(lambda a: a[None], results)

    return sharded(
        local,
        mesh,
        in_specs=P(axis),
        out_specs=P(axis),
        check_vma=check_vma,
        jit=jit,
        **options,
    )


def assert_same_bits(got: Any, want: Any, message: str = "") -> None:
    """Equal dtype, shape and bits; every NaN equals every other."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype, (message, got.dtype, want.dtype)
    assert got.shape == want.shape, (message, got.shape, want.shape)
    if not np.issubdtype(want.dtype, np.integer) and want.dtype != bool:
        wide = np.float64 if want.dtype.itemsize == 8 else np.float32
        wide = np.complex64 if want.dtype == np.complex64 else wide
        nan = np.isnan(want.astype(wide))
        np.testing.assert_array_equal(np.isnan(got.astype(wide)), nan, message)
        got, want = np.where(nan, np.zeros_like(got), got), np.where(nan, np.zeros_like(want), want)
    unsigned = np.dtype(f"u{want.dtype.itemsize}")
    np.testing.assert_array_equal(
        np.ascontiguousarray(got).view(unsigned), np.ascontiguousarray(want).view(unsigned), message
    )
