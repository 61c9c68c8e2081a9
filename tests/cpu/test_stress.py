"""Many shuffles in flight: independent, dependent through XLA's own collectives, and for long."""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import routings
from helpers import P, assert_same_bits, cases, make_mesh, per_rank, sharded

import jax_fusco as jf


def round_trip(x, ids, implementation, num_experts):
    """A shuffle that undoes itself: each token comes back k times."""
    plan = jf.make_plan(
        ids, axis_name="expert", num_experts=num_experts, implementation=implementation
    )
    return jf.combine(jf.dispatch(x, plan), None, plan)


@cases("num_ranks", [4, 16], xla=[16])
def test_independent_shuffles_in_one_program(implementation, num_ranks):
    """A hundred with the engine (fewer with plain XLA, which compiles them slowly)."""
    count = {("fused", 16): 100, ("fused", 4): 30}.get((implementation, num_ranks), 3)
    rng = np.random.default_rng(0)
    experts = num_ranks * 2
    ids = np.stack([routings.distinct(rng, num_ranks, 3, 2, experts) for _ in range(count)], axis=1)
    x = rng.standard_normal((num_ranks, count, 3, 4)).astype("f4")

    def local(x, ids):
        return jnp.stack([round_trip(x[i], ids[i], implementation, experts) for i in range(count)])

    run = per_rank(local, num_ranks)
    for _ in range(5):
        assert_same_bits(run(x, ids), x + x)


def shuffles_and_psums(implementation, num_ranks, count, in_a_scan):
    experts = num_ranks * 2

    def step(x, ids):
        back = round_trip(x, ids, implementation, experts)
        # Nothing can go on before every rank's rows are back, and the next shuffle needs the sum.
        return back / 2 + jax.lax.psum(back, "expert") / (4 * num_ranks)

    def local(x, ids):
        if in_a_scan:
            return jax.lax.scan(lambda x, ids: (step(x, ids), None), x, ids)[0]
        for i in range(count):
            x = step(x, ids[i])
        return x

    return per_rank(local, num_ranks)


@cases(
    "num_ranks,in_a_scan",
    [(4, False), (8, False), (16, False), (4, True), (16, True)],
    xla=[(16, True)],  # no rendezvous of ours there: it shows that the test is right
)
def test_each_shuffle_followed_by_a_psum_that_depends_on_it(implementation, num_ranks, in_a_scan):
    count = 24
    rng = np.random.default_rng(0)
    ids = np.stack(
        [routings.distinct(rng, num_ranks, 3, 2, num_ranks * 2) for _ in range(count)], axis=1
    )
    x = rng.standard_normal((num_ranks, 3, 4)).astype("f4")
    want = x.astype("f8")
    for _ in range(count):
        want = want + want.sum(0) / (2 * num_ranks)
    run = shuffles_and_psums(implementation, num_ranks, count, in_a_scan)
    for _ in range(3):
        np.testing.assert_allclose(run(x, ids), want, rtol=2e-5)


def test_several_groups_race_through_one_program():
    """Eight pairs, each with its own number of shuffles in a loop: groups share no counter."""
    rng = np.random.default_rng(0)
    ids = np.stack([routings.distinct(rng, 2, 3, 2, 4) for _ in range(8)])
    x = rng.standard_normal((8, 2, 3, 4)).astype("f4")

    def local(x, ids):
        data = jax.lax.axis_index("data")
        return jax.lax.fori_loop(
            0, data + 1, lambda _, x: round_trip(x, ids[0, 0], "fused", 4), x[0, 0]
        )[None, None]

    spec = P("data", "expert")
    run = sharded(local, make_mesh({"data": 8, "expert": 2}), in_specs=spec, out_specs=spec)
    want = x * 2.0 ** np.arange(1, 9).reshape(8, 1, 1, 1).astype("f4")
    for _ in range(10):
        assert_same_bits(run(x, ids), want)


def test_a_function_called_twice_in_a_program():
    """A jitted function inlined at two sites: the sites do not share a rendezvous."""
    rng = np.random.default_rng(0)
    ids = routings.distinct(rng, 8, 4, 2, 16)
    x, z = rng.standard_normal((2, 8, 4, 5)).astype("f4")
    once = jax.jit(functools.partial(round_trip, implementation="fused", num_experts=16))

    def local(x, z, ids):
        return once(x, ids), once(z, ids)

    run = per_rank(local, 8)
    for _ in range(10):
        jax.tree.map(assert_same_bits, run(x, z, ids), (x + x, z + z))


def test_programs_in_flight_at_once():
    """Runs are queued without waiting; each run is a rendezvous of its own."""
    rng = np.random.default_rng(0)
    ids = routings.distinct(rng, 8, 4, 2, 16)
    x = rng.standard_normal((12, 8, 4, 5)).astype("f4")
    run = per_rank(functools.partial(round_trip, implementation="fused", num_experts=16), 8)
    for got, given in zip([run(a, ids) for a in x], x, strict=True):
        assert_same_bits(got, given + given)


def test_two_threads_run_programs_of_their_own():
    rng = np.random.default_rng(0)
    ids = routings.distinct(rng, 4, 4, 2, 8)

    def work(seed):
        order = [0, 1, 2, 3] if seed == 0 else [7, 5, 6, 4]
        mesh = make_mesh(8, order=list(range(8)))
        devices = np.asarray(mesh.devices.ravel()[order])
        run = per_rank(
            functools.partial(round_trip, implementation="fused", num_experts=8),
            jax.sharding.Mesh(devices, ("expert",)),
        )
        x = np.random.default_rng(seed).standard_normal((4, 4, 5)).astype("f4")
        for _ in range(20):
            assert_same_bits(run(x, ids), x + x)
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, [0, 1]))


@pytest.mark.timeout(120)
def test_soak_of_a_thousand_steps():
    """Routings and token counts change every step; every step is checked, in under a minute."""
    num_ranks, experts, k, d = 8, 16, 2, 3

    def local(ids, x, weights):
        plan = jf.make_plan(
            ids, axis_name="expert", num_experts=experts, capacity=24, implementation="fused"
        )
        return plan.num_dropped, plan.slot, jf.combine(jf.dispatch(x, plan), weights, plan)

    run = per_rank(local, num_ranks)
    rng = np.random.default_rng(0)
    start = time.monotonic()
    pending = []
    for step in range(1000):
        tokens = (1, 4, 9)[step % 3]
        routing = routings.ALL[step % len(routings.ALL)]
        ids = routing(rng, num_ranks, tokens, k, experts)
        x = rng.standard_normal((num_ranks, tokens, d)).astype("f4")
        weights = rng.random(ids.shape, np.float32)
        pending.append((ids, x, weights, run(ids, x, weights)))
        if len(pending) == 20:  # few enough launches in flight
            for ids, x, weights, (dropped, slot, out) in jax.block_until_ready(pending):
                slot = np.asarray(slot)
                local_ids = (ids >= 0) & (ids < experts)
                assert np.asarray(dropped).sum() == (local_ids & (slot < 0)).sum()
                assert (slot[~local_ids] < 0).all()
                total = (weights * (slot >= 0)).sum(-1, dtype="f8")
                np.testing.assert_allclose(out, x * total[..., None], rtol=1e-5, atol=1e-6)
            pending = []
    assert not pending
    assert time.monotonic() - start < 60, "a step takes far too long"


def test_shuffles_larger_than_a_page():
    """Enough bytes for huge pages, several workers and long copies; checked row by row."""
    rng = np.random.default_rng(0)
    num_ranks, tokens, k, experts, d = 4, 512, 8, 32, 1024
    ids = routings.distinct(rng, num_ranks, tokens, k, experts)
    x = rng.integers(-128, 128, (num_ranks, tokens, d)).astype(jnp.bfloat16)

    def local(x, ids):
        plan = jf.make_plan(
            ids, axis_name="expert", num_experts=experts, alignment=8, implementation="fused"
        )
        rows = jf.dispatch(x, plan)
        return plan.slot, rows, jf.combine(rows, None, plan, out_dtype=jnp.float32)

    plan = oracle.make_plan(ids, experts, None, 8)
    slot, rows, out = per_rank(local, num_ranks)(x, ids)
    assert_same_bits(slot, plan.slot)
    assert_same_bits(rows, oracle.dispatch(x, plan))
    assert_same_bits(out, x.astype("f4") * k)
