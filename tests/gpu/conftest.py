"""Every GPU of this machine is a rank. `run.sh` says how to run these."""

import jax
import pytest


def pytest_sessionstart() -> None:
    try:
        platform = jax.devices()[0].platform
    except RuntimeError as error:
        raise pytest.UsageError(f"these tests need a GPU: {error}") from None
    if platform != "gpu":
        raise pytest.UsageError(f"these tests need a GPU, JAX runs on {platform}")
