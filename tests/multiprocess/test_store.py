"""What the CUDA engine asks of jax.distributed, between two processes without a GPU."""

from __future__ import annotations

import pytest
from launch import run

from jax_fusco import ffi
from jax_fusco.store import job_store

_COMMON = """
import os, time
from jax_fusco import ffi
from jax_fusco.store import job_store

process = join()
"""

_STORE = """
store = job_store()
assert (store.process, store.num_processes) == (process, 2)
store.put(f"a/{process}", f"of {process}")
assert store.get(f"a/{1 - process}", 20) == f"of {1 - process}"
start = time.monotonic()
assert store.get("never", 0.2) is None and 0.15 < time.monotonic() - start < 10
try:
    store.put(f"a/{process}", "again")
except Exception as error:
    assert "ALREADY_EXISTS" in str(error)
else:
    raise AssertionError("a key was written twice")
"""

# The callbacks run on a thread that holds no lock of Python's.
_ENGINE = """
ffi.register()
module = ffi.cuda_module()
assert module.exchange(f"from {process}") == ["from 0", "from 1"]
"""

_MISSING = """
os.environ["JAX_FUSCO_TIMEOUT_S"] = "0.1"
ffi.register()
if process == 0:
    try:
        ffi.cuda_module().exchange("here")
    except RuntimeError as error:
        print("MISSING", error)
"""


def test_processes_talk_through_the_store():
    run(_COMMON + _STORE)


@pytest.mark.skipif(ffi.cuda_module() is None, reason="this build has no engine for GPUs")
class TestEngine:
    def test_exchanges_values(self):
        run(_COMMON + _ENGINE)

    def test_names_who_is_missing(self):
        first, _ = run(_COMMON + _MISSING)
        assert "MISSING jax_fusco: process 1 did not come to an exchange within 1 s" in first.stdout


def test_one_process_needs_no_store():
    assert job_store() is None
