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

class Device(TypedDict):
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
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
