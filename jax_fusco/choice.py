"""Which implementation serves a call, as far as can be known while tracing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax

from jax_fusco import ffi, mesh, movers
from jax_fusco.mesh import Axis

Implementation: TypeAlias = str | Sequence[str] | None


def choose(implementation: Implementation, axis: Axis, *, reached: bool = False) -> str:
    """The implementation to use: "xla", "fused", or "platform" where only lowering can tell.

    `reached`: a topology says that the ranks of `axis` reach each other's memory.
    """
    if implementation is None:
        if axis.names and not mesh.is_mesh_axis(axis):
            return "xla"
        if not axis.names and mesh.platform() is None:
            return "platform"
        # GPUs: the engine must be asked for by name until runs on GPUs have shown it.
        if mesh.platform() != "cpu" or why_not("fused", axis) is not None:
            return "xla"
        reached = reached or not axis.names or jax.process_count() == 1
        return "fused" if reached else "xla"
    reason = "need one or more of 'xla', 'fused'"
    for name in checked_names(implementation):
        reason = why_not(name, axis)
        if reason is None:
            return name
    raise ValueError(f"implementation: got {implementation!r}, {reason}")


def checked_names(implementation: Implementation) -> Sequence[str]:
    """Those that `implementation` names, in order; ValueError where it names anything else."""
    if implementation is None:
        return ()
    names: Any = implementation if isinstance(implementation, tuple | list) else (implementation,)
    for name in names:
        if not isinstance(name, str) or name not in movers.IMPLEMENTATIONS:
            raise ValueError(f"implementation: got {name!r}, need 'xla', 'fused', or None")
    return names


def why_not(name: str, axis: Axis) -> str | None:
    """Why an implementation cannot serve here, as far as can be known while tracing."""
    if name == "xla":
        return None
    if axis.names and not mesh.is_mesh_axis(axis):
        return "need a mesh axis of jax.shard_map for 'fused', use 'xla' under jax.vmap"
    if mesh.platform() in mesh.GPU_PLATFORMS:
        cuda = ffi.cuda_module()
        if cuda is None:
            return (
                "need a build with CUDA for 'fused' on GPUs (nvcc was not found when jax_fusco was "
                "installed), use 'xla'"
            )
        if axis.size > cuda.max_ranks:
            return (
                f"need at most {cuda.max_ranks} ranks for 'fused' on GPUs (got {axis.size}), "
                "use 'xla'"
            )
        return None
    if mesh.platform() not in (None, "cpu"):
        return f"need CPU devices or NVIDIA GPUs for 'fused' (got {mesh.platform()}), use 'xla'"
    # A group that reaches into other processes is only seen here where it must; else it times out.
    # Where the platform is not known, nor is what a group may reach.
    if mesh.platform() == "cpu" and axis.size > jax.local_device_count(backend="cpu"):
        return (
            f"need all {axis.size} ranks of a group in one process for 'fused' "
            f"(this one has {jax.local_device_count(backend='cpu')} devices), use 'xla'"
        )
    return None
