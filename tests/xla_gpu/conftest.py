"""The real XLA:GPU compiles for H100s that are not there.

Needs `jax[cuda13]` and jax_fusco built with the CUDA engine.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import pytest
from gpu_programs import TOPOLOGIES, make_mesh
from jax.sharding import Mesh

from jax_fusco import ffi


def pytest_sessionstart() -> None:
    if not ffi.may_run_on_gpu():
        raise pytest.UsageError(
            "these tests need jax[cuda13], and jax_fusco built with JAX_FUSCO_CUDA=ON"
        )


@pytest.fixture(scope="session", params=TOPOLOGIES, ids=lambda n: f"{n}-gpus")
def mesh(request: pytest.FixtureRequest) -> Mesh:
    """One expert axis over 1, 8 and 64 GPUs."""
    return make_mesh(request.param)
