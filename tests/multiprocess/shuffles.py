"""A shuffle with its gradients over the devices of several processes, against the oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import oracle
import routings
from helpers import assert_same_bits, sharded

import jax_fusco as jf

T, K, D, EXPERTS = 5, 2, 3, 24  # for 1, 2, 3, 4 or 8 ranks


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    devices = np.asarray(jax.devices()).reshape(tuple(sizes.values()))
    return jax.sharding.Mesh(devices, tuple(sizes))


def place(mesh: jax.sharding.Mesh, spec: Any, array: np.ndarray) -> jax.Array:
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@functools.cache
def program(
    implementation: Any, mesh: jax.sharding.Mesh, spec: Any, **options: Any
) -> Callable[..., Any]:
    """(ids, x, weights) -> slots, rows, sums and gradients, compiled once for each process."""

    def local(ids, x, weights):
        def layer(x, weights):
            plan = jf.make_plan(
                ids[0, 0],
                axis_name="expert",
                num_experts=EXPERTS,
                alignment=2,
                implementation=implementation,
                **options,
            )
            rows = jf.dispatch(x, plan)
            return jf.combine(rows * 2, weights, plan), (plan.slot, rows)

        out, pull, (slot, rows) = jax.vjp(layer, x[0, 0], weights[0, 0], has_aux=True)
        results = slot, rows, out, *pull(out)
        return tuple(a[None, None] for a in results)

    return sharded(local, mesh, in_specs=spec, out_specs=spec)


def check(
    implementation: Any, mesh: jax.sharding.Mesh, spec: Any, groups: int, ranks: int, **options: Any
) -> None:
    """Forward and gradients of every group against the oracle, on the shards here."""
    rng = np.random.default_rng(0)
    ids = np.stack([routings.masked(rng, ranks, T, K, EXPERTS) for _ in range(groups)])
    x = rng.standard_normal((groups, ranks, T, D)).astype("f4")
    weights = rng.random(ids.shape, np.float32)
    run = program(implementation, mesh, spec, **options)
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
