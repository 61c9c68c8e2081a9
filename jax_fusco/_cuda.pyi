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
