"""Processes that share one GPU and meet there: CUDA IPC, staged operands, what failures leave."""

from __future__ import annotations

import launch
import pytest

COMMON = """
import os, sys, time
import jax
from helpers import P
from shuffles import check, mesh_of

me = join()
ranks = len(jax.devices())
assert ranks == jax.process_count() and len(jax.local_devices()) == 1
assert jax.devices()[0].platform == "gpu"
"""

SHUFFLES = """
for capacity in (None, 9):
    for repeat in range(3):
        options = {} if capacity is None else {"capacity": capacity}
        check("fused", mesh_of(data=1, expert=ranks), P("data", "expert"), 1, ranks, **options)
check("fused", mesh_of(expert=1, data=ranks), P("data", "expert"), ranks, 1)  # each by itself
"""

LATE = """
os.environ["JAX_FUSCO_TIMEOUT_S"] = "3"
mesh = mesh_of(data=1, expert=ranks)
check("fused", mesh, P("data", "expert"), 1, ranks)
if me == 1:
    time.sleep(1)  # late, but in time
check("fused", mesh, P("data", "expert"), 1, ranks)
"""

LOST = """
os.environ["JAX_FUSCO_TIMEOUT_S"] = "2"
mesh = mesh_of(data=1, expert=ranks)
check("fused", mesh, P("data", "expert"), 1, ranks)
if me == 1:
    print("GONE", flush=True)
    os._exit(0)
for attempt in range(3):
    try:
        check("fused", mesh, P("data", "expert"), 1, ranks)
    except jax.errors.JaxRuntimeError as error:
        print("RAISED", str(error).replace(chr(10), " "), flush=True)
        os._exit(0)  # the job's own farewell would wait for the lost process
    except AssertionError:
        print("WRONG", flush=True)  # NaN: the failure is raised by the next execution
"""


def run(code: str, processes: int) -> list[launch.Done]:
    """On the first GPU, of which each process takes a part."""
    env = {
        "JAX_PLATFORMS": "cuda",
        "CUDA_VISIBLE_DEVICES": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    return launch.run(COMMON + code, processes=processes, env=env, timeout=80)


@pytest.mark.parametrize("processes", [2, 3])
def test_a_shuffle_across_processes(processes):
    run(SHUFFLES, processes)


def test_a_late_process_is_waited_for():
    run(LATE, 2)


def test_a_lost_process_is_named():
    staying, gone = run(LOST, 2)
    assert "GONE" in gone.stdout
    assert "RAISED" in staying.stdout, staying.stdout
    assert "process 1" in staying.stdout
