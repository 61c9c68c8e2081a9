"""Two processes of four CPU devices each, joined by jax.distributed and gloo."""

from __future__ import annotations

import sys

import pytest
from launch import run

_COMMON = """
import jax, numpy as np
import oracle, routings
from helpers import P, assert_same_bits, sharded
import jax_fusco as jf

join()
assert jax.process_count() == 2 and len(jax.devices()) == 8 and len(jax.local_devices()) == 4

T, K, D, EXPERTS = 5, 2, 3, 16


def mesh_of(**sizes):
    devices = np.asarray(jax.devices()).reshape(tuple(sizes.values()))
    return jax.sharding.Mesh(devices, tuple(sizes))


def place(mesh, spec, array):
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def check(implementation, mesh, spec, groups, ranks, **options):
    \"\"\"Forward and gradients of every group against the oracle, on the shards here.\"\"\"
    rng = np.random.default_rng(0)
    ids = np.stack([routings.masked(rng, ranks, T, K, EXPERTS) for _ in range(groups)])
    x = rng.standard_normal((groups, ranks, T, D)).astype("f4")
    weights = rng.random(ids.shape, np.float32)

    def local(ids, x, weights):
        def layer(x, weights):
            plan = jf.make_plan(ids[0, 0], axis_name="expert", num_experts=EXPERTS, alignment=2,
                                implementation=implementation, **options)
            rows = jf.dispatch(x, plan)
            return jf.combine(rows * 2, weights, plan), (plan.slot, rows)

        out, pull, (slot, rows) = jax.vjp(layer, x[0, 0], weights[0, 0], has_aux=True)
        results = slot, rows, out, *pull(out)
        return tuple(a[None, None] for a in results)

    run = sharded(local, mesh, in_specs=spec, out_specs=spec)
    got = jax.block_until_ready(run(*(place(mesh, spec, a) for a in (ids, x, weights))))
    for g in range(groups):
        plan = oracle.make_plan(ids[g], EXPERTS, options.get("capacity"), 2)
        rows = oracle.dispatch(x[g], plan)
        out = oracle.combine(rows * 2, weights[g], plan)
        dy, dw = oracle.combine_gradient(out, rows * 2, weights[g], plan)
        dx = oracle.dispatch_gradient(dy * 2, plan, x.dtype)
        for value, want in zip(got, (plan.slot, rows, out, dx, dw), strict=True):
            for shard in value.addressable_shards:
                if shard.index[0].start == g:
                    mine, theirs = np.asarray(shard.data)[0], want[shard.index[1]]
                    if want is dw:
                        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
                    else:
                        assert_same_bits(mine, theirs)
"""

_ACROSS = """
check(None, mesh_of(data=1, expert=8), P("data", "expert"), 1, 8)  # picks what reaches
check(("fused", "xla"), mesh_of(expert=8, data=1), P("data", "expert"), 1, 8, capacity=12)
check("xla", mesh_of(expert=4, data=2), P("data", "expert"), 2, 4)  # both groups span both
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
