"""Two processes of four CPU devices each, joined by jax.distributed and gloo."""

from __future__ import annotations

import sys

import pytest
from launch import run

_COMMON = """
import jax
from helpers import P, rows_in_slices
from shuffles import check, mesh_of

join()
assert jax.process_count() == 2 and len(jax.devices()) == 8 and len(jax.local_devices()) == 4
"""

_ACROSS = """
check(None, mesh_of(data=1, expert=8), P("data", "expert"), 1, 8)  # picks what reaches
check(("fused", "xla"), mesh_of(expert=8, data=1), P("data", "expert"), 1, 8, capacity=12)
check("xla", mesh_of(expert=4, data=2), P("data", "expert"), 2, 4)  # both groups span both
with rows_in_slices():
    check("xla", mesh_of(expert=4, data=2), P("data", "expert"), 2, 4, capacity=7)
"""

_WITHIN = """
check("xla", mesh_of(data=2, expert=4), P("data", "expert"), 2, 4)
check("fused", mesh_of(data=2, expert=4), P("data", "expert"), 2, 4)
check("fused", mesh_of(data=4, expert=2), P("data", "expert"), 4, 2, capacity=9)
"""

_REFUSED = """
try:
    check("fused", mesh_of(data=1, expert=8), P("data", "expert"), 1, 8)
except ValueError as error:
    print("REFUSED", str(error).partition(chr(10))[0])
# Which process a mesh's devices belong to is unknown while tracing: this one must not hang either.
import os
os.environ["JAX_FUSCO_TIMEOUT_S"] = "2"
try:
    check("fused", mesh_of(expert=4, data=2), P("data", "expert"), 2, 4)
except jax.errors.JaxRuntimeError as error:
    print("TIMED OUT", str(error).replace(chr(10), " "))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="gloo needs a POSIX system")
class TestTwoProcesses:
    def test_an_expert_group_across_processes(self):
        run(_COMMON + _ACROSS)

    def test_expert_groups_within_a_process(self):
        run(_COMMON + _WITHIN)

    def test_the_engine_refuses_a_group_across_processes(self):
        for process, missing in zip(
            run(_COMMON + _REFUSED), ("ranks 2, 3", "ranks 0, 1"), strict=True
        ):
            assert "REFUSED implementation: got 'fused', need " in process.stdout
            assert f"{missing} did not come within 2" in process.stderr
            assert "TIMED OUT" in process.stdout
