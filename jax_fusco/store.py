"""How the processes of a job find each other: by jax.distributed's store of keys and values."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax

try:
    from jax._src import distributed
except ImportError:  # JAX may move what it does not promise
    distributed = None


@dataclasses.dataclass(frozen=True)
class Store:
    """What the CUDA engine asks of a job. Callbacks come from threads of the runtime.

    Attributes:
      process: index of this one.
      num_processes: of the job.
      domain: names the GPUs that may reach each other's memory, empty if unknown.
      put: writes a key, once.
      get: its value, or None where nobody has written it within so many seconds.
      nccl: path of the NCCL that came with JAX, empty if none did.
    """

    process: int
    num_processes: int
    domain: Callable[[], str]
    put: Callable[[str, str], None]
    get: Callable[[str, float], str | None]
    nccl: str


def nccl_path() -> str:
    """The library in pip's package, empty if there is none: then the system's is looked for."""
    try:
        found = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return ""
    for place in (found.submodule_search_locations or ()) if found else ():
        if (library := pathlib.Path(place) / "lib" / "libnccl.so.2").exists():
            return str(library)
    return ""


def _domain() -> str:
    """The slice of this process's GPUs: JAX numbers hosts, or NVLink domains of several hosts."""
    devices = jax.local_devices(backend="gpu")
    for name in ("slice_index", "partition_index"):
        slices = {getattr(device, name, None) for device in devices}
        if len(slices) == 1 and None not in slices:
            return f"slice {slices.pop()}"
    return ""


def job_store() -> Store | None:
    """The store of this job, None where it is one process."""
    if jax.process_count() == 1:
        return None
    client = getattr(getattr(distributed, "global_state", None), "client", None)

    def checked() -> Any:
        if client is None:
            raise RuntimeError(
                f"jax {jax.__version__} lets processes find each other no more, or "
                "jax.distributed.initialize was not called: use implementation='xla'"
            )
        return client

    def put(key: str, value: str) -> None:
        checked().key_value_set(key, value)

    def get(key: str, timeout_s: float) -> str | None:
        milliseconds = max(1, math.ceil(timeout_s * 1000))
        try:
            return checked().blocking_key_value_get(key, milliseconds)
        except Exception as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    return Store(
        process=jax.process_index(),
        num_processes=jax.process_count(),
        domain=_domain,
        put=put,
        get=get,
        nccl=nccl_path(),
    )
