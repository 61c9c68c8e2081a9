from collections.abc import Callable
from typing import TypedDict

from jax_fusco._ffi import Handlers, TypeRegistration

def registrations() -> list[tuple[str, Handlers]]:
    """The custom calls, each a target name and its handlers."""

def types() -> list[tuple[str, TypeRegistration]]:
    """The FFI types, to be registered before the custom calls."""

def api_version() -> tuple[int, int]:
    """(major, minor) of the XLA FFI headers that the module was built against."""

def plan_scratch_bytes(
    num_ranks: int, tokens: int, k: int, num_experts: int, capacity: int, alignment: int
) -> int:
    """Bytes of device memory that planning such a shuffle needs beside its results."""

def connect(
    process: int,
    num_processes: int,
    domain: Callable[[], str],
    put: Callable[[str, str], None],
    get: Callable[[str, float], str | None],
    nccl: str,
) -> None:
    """Tells the engine once through what the job's processes find each other."""

def exchange(value: str) -> list[str]:
    """Every process's value, through the store; as the engine does, without a device."""

class Nccl(TypedDict):
    version: int
    error: str

def nccl(path: str) -> Nccl:
    """The NCCL at a path, or the system's: 10000 * major + 100 * minor + patch (0: none), and why
    windows cannot work with it (empty: they can)."""

class Device(TypedDict):
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    shares: bool
    reaches: list[bool]

class Machine(TypedDict):
    driver: int
    runtime: int
    error: str
    devices: list[Device]

max_experts: int
max_ranks: int

def machine() -> Machine:
    """What CUDA says of this machine; versions as 1000 * major + 10 * minor, driver 0: none."""
