"""What this machine can do, and why not more: `jax-fusco doctor`."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax

from jax_fusco import ffi
from jax_fusco.store import nccl_path

GOOD, MISSING, BROKEN = "ok", "missing", "broken"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
      what: the thing looked at.
      found: what it is, in words.
      verdict: GOOD; MISSING where something could be installed; BROKEN where something that is
        installed cannot work.
      remedy: what to do about it, empty if nothing.
    """

    what: str
    found: str
    verdict: str = GOOD
    remedy: str = ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _software() -> Iterator[Finding]:
    yield Finding(
        "system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"
    )
    yield Finding("Python", platform.python_version())
    yield Finding("jax", f"{jax.__version__}, jaxlib {_version('jaxlib')}")


def _cpu_engine() -> Iterator[Finding]:
    try:
        module = ffi.cpu_module()
    except ImportError as error:
        yield Finding("CPU engine", str(error), BROKEN, "reinstall jax_fusco with pip")
        return
    built, found = module.api_version(), ffi.runtime_ffi_version()
    yield Finding("XLA FFI", f"{found[0]}.{found[1]}, jax_fusco built for {built[0]}.{built[1]}")
    try:
        info = module.info()
    except ValueError as error:
        yield Finding("CPU engine", str(error), BROKEN, "unset or correct the variable")
        return
    yield Finding(
        "CPU engine",
        f"{info['isa']} row kernels, {info['threads']} threads, timeout {info['timeout_s']:g} s"
        + (", strict" if info["strict"] else ""),
    )
    if info["huge_pages"]:
        yield Finding("huge pages", "offered for results")
    else:
        yield Finding(
            "huge pages",
            "not offered by the system: large results cost more page faults",
            MISSING,
            "write 'madvise' to /sys/kernel/mm/transparent_hugepage/enabled",
        )


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _cuda_plugin() -> tuple[str, str] | None:
    """(package, version) of JAX's plugin for NVIDIA GPUs."""
    for package in ("jax-cuda13-plugin", "jax-cuda12-plugin"):
        if (version := _version(package)) is not None:
            return package, version
    return None


def _cuda_engine() -> Iterator[Finding]:
    try:
        module = ffi.cuda_module()
    except ImportError as error:
        yield Finding("CUDA engine", str(error), BROKEN, "reinstall jax_fusco with pip")
        return
    if module is None:
        yield Finding(
            "CUDA engine",
            "not in this build: 'fused' runs on CPU devices alone",
            MISSING,
            "install jax_fusco from source where nvcc is found (PATH or CUDA_HOME)",
        )
        return
    machine = module.machine()
    yield Finding("CUDA engine", f"built with CUDA {_cuda_version(machine['runtime'])}")
    plugin = _cuda_plugin()
    if plugin is None:
        yield Finding("JAX on GPUs", "no plugin", MISSING, 'pip install "jax[cuda13]"')
    elif plugin[1] != _version("jaxlib"):
        yield Finding(
            "JAX on GPUs",
            f"{plugin[0]} {plugin[1]} beside jaxlib {_version('jaxlib')}",
            BROKEN,
            f"pip install {plugin[0]}=={_version('jaxlib')}",
        )
    else:
        yield Finding("JAX on GPUs", f"{plugin[0]} {plugin[1]}")
    yield from _gpus(machine)
    if machine["driver"] and machine["devices"]:
        yield _several_processes(machine, module.nccl(nccl_path()))


def _gpus(machine: Any) -> Iterator[Finding]:
    driver, runtime, devices = machine["driver"], machine["runtime"], machine["devices"]
    if not driver:
        yield Finding("NVIDIA driver", "none: no GPU can be used here", MISSING)
        return
    if driver // 1000 < runtime // 1000:
        yield Finding(
            "NVIDIA driver",
            f"serves CUDA {_cuda_version(driver)}, this build needs {_cuda_version(runtime)}",
            BROKEN,
            f"update the driver, or build jax_fusco with CUDA {driver // 1000}",
        )
    else:
        yield Finding("NVIDIA driver", f"serves CUDA {_cuda_version(driver)}")
    if machine["error"]:
        yield Finding("GPUs", machine["error"], BROKEN, "see what nvidia-smi says")
        return
    for index, device in enumerate(devices):
        major, minor = device["compute_capability"]
        found = f"{device['name']}, {device['memory_bytes'] / 2**30:.0f} GiB, sm_{major}{minor}"
        if major < 8:
            yield Finding(f"GPU {index}", found, BROKEN, "the engine needs sm_80 or newer")
        else:
            yield Finding(f"GPU {index}", found)
    apart = [
        (i, j)
        for i, device in enumerate(devices)
        for j, reaches in enumerate(device["reaches"])
        if i < j and not (reaches and devices[j]["reaches"][i])
    ]
    if apart:
        pairs = ", ".join(f"{i} and {j}" for i, j in apart)
        yield Finding(
            "peer access",
            f"not between GPUs {pairs}: 'fused' cannot serve ranks there",
            MISSING,
            "leave these out of one expert axis, or use implementation='xla'",
        )
    elif len(devices) > 1:
        yield Finding("peer access", "between all GPUs")


def _several_processes(machine: Any, nccl: Any) -> Finding:
    what = "several processes"
    shares = all(device["shares"] for device in machine["devices"])
    here = "on this host by CUDA IPC" if shares else "not on this host (its GPUs have no CUDA IPC)"
    version = nccl["version"]
    name = f"NCCL {version // 10000}.{version // 100 % 100}.{version % 100}"
    if not nccl["error"]:
        return Finding(what, f"{here}; across hosts of one NVLink domain by windows of {name}")
    problem = f"{name} is too old" if version else "there is no NCCL"
    remedy = "pip install --upgrade nvidia-nccl-cu13 (2.29.2 or newer)"
    return Finding(what, f"{here}; not across hosts: {problem}", MISSING, remedy)


def examine() -> list[Finding]:
    """Looks at everything; starts no GPU backend and allocates nothing on a device."""
    return [*_software(), *_cpu_engine(), *_cuda_engine()]
