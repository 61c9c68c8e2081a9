"""Shuffles over processes, each a node of CPU devices: the engine inside, gloo between."""

from __future__ import annotations

import pytest
from launch import run

_CODE = """
import sys, functools
import jax, numpy as np
import oracle, routings
from helpers import P, assert_same_bits, sharded
import jax_fusco as jf

join()
nodes, ranks = int(sys.argv[1]), int(sys.argv[2])
T, K, D, EXPERTS = 9, 3, 5, 16
rng = np.random.default_rng(0)
rank_count = nodes * ranks
assert len(jax.devices()) == rank_count and len(jax.local_devices()) == ranks


def check(sizes, axis_name, capacity, dtype, **options):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(tuple(sizes.values())), tuple(sizes))
    topology = jf.Topology.detect(mesh, axis_name, **options)
    assert topology.shape(mesh.shape) == (nodes, ranks), topology.describe()
    spec = P(axis_name)
    ids = routings.masked(rng, rank_count, T, K, EXPERTS)
    x = rng.standard_normal((rank_count, T, D)).astype("f4").astype(dtype)
    weights = rng.random(ids.shape, np.float32)

    def local(ids, x, weights):
        def layer(x, weights):
            plan = jf.make_plan(ids[0], axis_name=axis_name, num_experts=EXPERTS, alignment=2,
                                capacity=capacity, topology=topology)
            assert plan.implementation == "fused"
            rows = jf.dispatch(x, plan)
            return jf.combine(rows * 2, weights, plan), (plan.slot, rows)

        out, pull, (slot, rows) = jax.vjp(layer, x[0], weights[0], has_aux=True)
        return tuple(a[None] for a in (slot, rows, out, *pull(out)))

    sharding = jax.sharding.NamedSharding(mesh, spec)
    place = lambda a: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])
    run = sharded(local, mesh, in_specs=spec, out_specs=spec)
    got = jax.block_until_ready(run(*map(place, (ids, x, weights))))
    plan = oracle.make_plan(ids, EXPERTS, capacity, 2)
    rows = oracle.dispatch(x, plan)
    out = oracle.combine_two_level(rows * 2, weights, plan, ranks, np.dtype(dtype))
    dy, dw = oracle.combine_gradient(out, rows * 2, weights, plan)
    dx = oracle.combine_two_level(dy * 2, None, plan, ranks, np.dtype(dtype))
    for value, want in zip(got, (plan.slot, rows, out, dx, dw), strict=True):
        for shard in value.addressable_shards:
            mine = want[shard.index[0]]
            if want is dw:
                np.testing.assert_allclose(np.asarray(shard.data), mine, rtol=2e-4, atol=1e-4)
            else:
                assert_same_bits(shard.data, mine)


check({"node": nodes, "expert": ranks}, ("node", "expert"), None, np.float32)
check({"expert": rank_count}, "expert", 16, jax.numpy.bfloat16)
print("checked")
"""


@pytest.mark.parametrize(("nodes", "ranks"), [(2, 4), (4, 2)])
def test_shuffles_over_processes_are_those_of_the_oracle(nodes, ranks):
    for done in run(_CODE, processes=nodes, devices=ranks, arguments=[str(nodes), str(ranks)]):
        assert done.stdout.endswith("checked\n")
