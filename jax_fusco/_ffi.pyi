from typing import NotRequired, TypedDict

from typing_extensions import CapsuleType

class Handlers(TypedDict):
    instantiate: NotRequired[CapsuleType]
    initialize: NotRequired[CapsuleType]
    execute: CapsuleType

class TypeRegistration(TypedDict):
    type_id: CapsuleType
    type_info: CapsuleType

class Info(TypedDict):
    isa: str
    threads: int
    timeout_s: float
    strict: bool
    huge_pages: bool

def registrations() -> list[tuple[str, Handlers]]:
    """The custom calls, each a target name and its handlers."""

def types() -> list[tuple[str, TypeRegistration]]:
    """The FFI types, to be registered before the custom calls."""

def api_version() -> tuple[int, int]:
    """(major, minor) of the XLA FFI headers that the module was built against."""

def set_sgemm(address: int) -> None:
    """The address of the cblas_sgemm that grouped matmuls use; 0: none."""

def info() -> Info:
    """What the engine would use now.

    Raises:
      ValueError: an environment variable makes no sense.
    """
