"""The BLAS under the grouped matmuls of CPU devices: OpenBLAS from the package scipy-openblas32.

SciPy, which JAX brings, has an OpenBLAS too, but it starts threads of its own inside every product,
and what stops it stops everybody else's. This copy belongs to nobody: it may run on the threads
that call it alone. Measured, it is as fast. oneDNN comes with a SYCL runtime of a gigabyte.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import pathlib
from collections.abc import Iterator

_KERNELS = {"avx2": "Haswell", "avx512": "SkylakeX"}


def is_installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("scipy_openblas32") is not None


@contextlib.contextmanager
def _environment(values: dict[str, str | None]) -> Iterator[None]:
    """Sets environment variables for a moment: OpenBLAS reads them once, when it is loaded."""

    def put(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    before = {name: os.environ.get(name) for name in values}
    put(values)
    try:
        yield
    finally:
        put(before)


@functools.cache
def library() -> ctypes.CDLL | None:
    """OpenBLAS with one thread, None where the package is missing.

    Its kernels are those of JAX_FUSCO_ISA where that is set, else those that it finds best. What
    OPENBLAS_CORETYPE says is meant for others: some systems set it for all programs, and AVX2 takes
    twice as long as AVX-512.
    """
    if not is_installed():
        return None
    kernels = _KERNELS.get(os.environ.get("JAX_FUSCO_ISA", ""))
    values = {"OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": kernels}
    with _environment(values):
        package = importlib.import_module("scipy_openblas32")  # loads the library
        file = pathlib.Path(package.get_lib_dir()) / package.get_library(fullname=True)
        found = ctypes.CDLL(str(file))
    found.scipy_openblas_set_num_threads(1)  # where something else had loaded it before
    return found


def kernels() -> str | None:
    """The processor that OpenBLAS has chosen its kernels for, None without a BLAS."""
    found = library()
    if found is None:
        return None
    name = found.scipy_openblas_get_corename
    name.restype = ctypes.c_char_p
    return name().decode()


def sgemm() -> int:
    """Address of `cblas_sgemm`, 0 without a BLAS."""
    found = library()
    if found is None:
        return 0
    return ctypes.cast(found.scipy_cblas_sgemm, ctypes.c_void_p).value or 0
