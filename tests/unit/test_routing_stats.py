"""RoutingStats against literal loops over tokens; its arithmetic, its sample, its refusals."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import P, make_mesh
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_fusco as jf

Stats = jf.RoutingStats


def literal(ids: np.ndarray, experts: int) -> tuple[int, np.ndarray, np.ndarray]:
    """(tokens, load, coactivation) of a routing, token by token."""
    tokens, load = 0, np.zeros(experts, int)
    together = np.zeros((experts, experts), int)
    for token in rows(ids):
        valid = [int(e) for e in token if 0 <= e < experts]
        tokens += bool(valid)
        for e in valid:
            load[e] += 1
        for e in set(valid):
            for f in set(valid):
                together[e, f] += 1
    return tokens, load, together


def check(stats: Stats, ids: np.ndarray) -> None:
    tokens, load, together = literal(ids, stats.num_experts)
    assert stats.tokens == tokens
    np.testing.assert_array_equal(stats.load, load)
    np.testing.assert_array_equal(stats.coactivation, together)
    assert float(stats.sample_weight.sum()) == tokens
    known = {frozenset(e for e in t if 0 <= e < stats.num_experts) for t in rows(ids)}
    weight = np.asarray(stats.sample_weight)
    for slot, one in enumerate(stats.sets):
        members = frozenset(np.flatnonzero(one).tolist())
        assert (members in known) if weight[slot] else not members


def rows(ids: np.ndarray) -> list[list[int]]:
    return ids.reshape(-1, ids.shape[-1]).tolist() if ids.size else []


routings = st.integers(1, 40).flatmap(
    lambda experts: st.tuples(
        st.just(experts),
        st.lists(st.sampled_from([0, 1, 7, 30]), min_size=1, max_size=3),
        st.integers(1, 4),
        st.integers(0, 2**32 - 1),
        st.integers(1, 9),
    )
)


@settings(max_examples=8)
@given(routings)
def test_updates_and_merges_against_literal_loops(case):
    experts, lengths, k, seed, samples = case
    rng = np.random.default_rng(seed)
    parts = [rng.integers(-2, experts + 2, (length, k)) for length in lengths]
    one = Stats.zeros(experts, num_samples=samples)
    other = one
    for index, ids in enumerate(parts):
        if index % 2:
            other = other.update(ids)
        else:
            one = one.update(jnp.asarray(ids, jnp.int32))
    everything = np.concatenate(parts)
    check(one.merge(other), everything)
    check(
        functools.reduce(Stats.update, parts, Stats.zeros(experts, num_samples=samples)), everything
    )


@pytest.mark.parametrize("shape", [(3,), (7, 3), (2, 5, 3), (2, 0, 3), (4, 0)])
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint32])
def test_any_leading_shape_and_dtype(shape, dtype):
    ids = np.random.default_rng(0).integers(0, 6, shape).astype(dtype)
    check(Stats.zeros(6, num_samples=5).update(ids), ids.astype(int))


def test_ids_beyond_int32_count_nothing():
    assert Stats.zeros(4).update(np.array([[2**32 + 1, -(2**32) + 1]])).tokens == 0


def test_counts_carry_past_32_bits():
    half = Stats.zeros(2, num_samples=1).update(np.array([[0, 1]]))
    for _ in range(40):
        half = half.merge(half)
    assert (half.tokens, half.load.tolist()) == (2**40, [2**40] * 2)
    assert (half.coactivation == 2**40).all()


def test_layers_in_a_scan_one_by_one_and_all_at_once():
    ids = np.random.default_rng(0).integers(-1, 6, (3, 4, 5, 2))
    zeros = Stats.zeros(6, 3, num_samples=8)

    @jax.jit
    def scan(stats, ids):
        return jax.lax.scan(
            lambda stats, one: (stats.update(one[1], one[0]), None), stats, (jnp.arange(3), ids)
        )[0]

    found = [scan(zeros, ids), zeros.update(ids), zeros.update(jnp.asarray(ids))]
    found.append(functools.reduce(lambda s, i: s.update(ids[i], i), range(3), zeros))
    for stats in found:
        assert stats.num_layers == 3
        for index in range(3):
            check(stats.layer(index), ids[index])
    merged = found[0].merge(found[1])
    assert merged.tokens.tolist() == (2 * found[0].tokens).tolist()


def test_ranks_of_a_mesh():
    """Inside a shard_map each rank counts its own; sharded ids in a plain jit count for all."""
    ids = np.random.default_rng(0).integers(0, 8, (32, 2)).astype(np.int32)
    mesh = make_mesh(4)
    zeros = Stats.zeros(8, num_samples=16)

    def local(ids):
        return jax.tree.map(lambda a: a[None], zeros.update(ids))

    per_rank = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    )(ids)
    ranks = [jax.tree.map(lambda a: np.asarray(a)[r], per_rank) for r in range(4)]  # noqa: B023
    check(functools.reduce(Stats.merge, ranks), ids)
    sharded = jax.device_put(ids, jax.NamedSharding(mesh, P("expert")))
    check(jax.jit(Stats.update)(zeros, sharded), ids)


@pytest.mark.parametrize("layer", [None, 1])
def test_ids_sharded_over_explicit_axes(layer):
    """As under Auto axes: in a jit and out of it, by layer and all at once."""
    ids = np.random.default_rng(0).integers(-1, 8, (2, 8, 6, 2)).astype(np.int32)
    ids = ids if layer is None else ids[layer]
    mesh = make_mesh({"data": 2, "expert": 2}, axis_type=jax.sharding.AxisType.Explicit)
    zeros = Stats.zeros(8, 2, num_samples=16)
    spec = P(*(None,) * (ids.ndim - 3), "data", "expert")
    sharded = jax.device_put(ids, jax.NamedSharding(mesh, spec))
    want = zeros.update(ids, layer)
    found = [zeros.update(sharded, layer)]
    with jax.set_mesh(mesh):
        found.append(jax.jit(lambda stats, ids: stats.update(ids, layer))(zeros, sharded))
    for stats in found:
        jax.tree.map(np.testing.assert_array_equal, stats, want)


def test_the_sample_is_uniform():
    """Tokens of a rare kind, early, late and in large and small updates, stay as rare."""
    rng = np.random.default_rng(0)
    parts = [np.where(rng.random((n, 1)) < 0.2, 1, 0) for n in (700, 3, 9000, 50, 2500, 1, 4000)]
    parts[0][:], parts[4][:] = 2, 3
    stats = functools.reduce(Stats.update, parts, Stats.zeros(4, num_samples=2048))
    weight = np.asarray(stats.sample_weight)
    assert (weight > 0).all()
    shares = weight @ stats.sets / weight.sum()
    want = stats.load / stats.load.sum()
    np.testing.assert_allclose(shares, want, atol=4 * (0.25 / 2048) ** 0.5)


def test_merging_equal_ranks_keeps_the_sample_uniform():
    """Ranks that count in step draw different tokens, or their merger would not be a sample."""
    rng = np.random.default_rng(1)
    ranks = [
        Stats.zeros(2, num_samples=1024).update((rng.random((4096, 1)) < 0.3).astype(int))
        for _ in range(8)
    ]
    merged = functools.reduce(Stats.merge, ranks)
    np.testing.assert_allclose(merged.sets.mean(0), merged.load / merged.tokens, atol=0.06)


def test_updates_go_on_in_the_slot_where_the_last_one_stopped():
    stats, ids = Stats.zeros(8, num_samples=8), np.arange(8)[:, None]
    for tokens in (ids[:3], ids[3:6], ids[6:]):
        stats = stats.update(tokens)
    np.testing.assert_array_equal(stats.sample_weight, np.ones(8))
    np.testing.assert_array_equal(stats.sets, np.eye(8))


def test_a_checkpoint_and_a_file_keep_everything(tmp_path: pathlib.Path):
    stats = Stats.zeros(5, 2, num_samples=4).update(np.arange(12).reshape(2, 3, 2) % 5)
    stats.save(tmp_path / "stats.of.a.run")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", stats)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", jax.eval_shape(lambda: stats))
    for other in (Stats.from_file(tmp_path / "stats.of.a.run"), restored):
        assert jax.tree.structure(other) == jax.tree.structure(stats)
        jax.tree.map(np.testing.assert_array_equal, other, stats)


def test_bad_files(tmp_path: pathlib.Path):
    need = "need an npz file that RoutingStats.save wrote"
    path = tmp_path / "stats.npz"

    def error() -> str:
        with pytest.raises(ValueError, match=r"stats\.npz") as info:
            Stats.from_file(path)
        return str(info.value).removeprefix(f"{path}: ")

    assert error().endswith(need)
    np.savez(path, token_limbs=np.array([{}], dtype=object))
    assert error() == (
        f"got no readable routing statistics (Object arrays cannot be loaded when "
        f"allow_pickle=False), {need}"
    )
    np.savez(path, token_limbs=np.zeros(2, np.uint32))
    assert error() == f"got no array named load_limbs, {need}"
    good = Stats.zeros(4, num_samples=2)
    arrays = {name: np.asarray(array) for name, array in vars(good).items()}
    np.savez(path, **{**arrays, "num_experts": np.zeros(2)})
    assert error() == f"got num_experts or sample_weight of another shape, {need}"
    np.savez(path, **{**arrays, "num_experts": 5})
    assert error() == "got load_limbs of uint32 (4, 2), need uint32 (5, 2)"


def test_errors():
    stats, layered = Stats.zeros(4), Stats.zeros(4, 2)
    ids = np.zeros((3, 2), int)
    cases = [
        (ValueError, lambda: Stats.zeros(0), "num_experts: got 0, need an integer of at least 1"),
        (
            TypeError,
            lambda: Stats.zeros(4, 1.5),  # type: ignore[arg-type]
            "num_layers: got 1.5, need an integer of at least 1",
        ),
        (
            TypeError,
            lambda: stats.update(ids * 1.0),
            "expert_ids: got dtype float64, need an integer dtype",
        ),
        (
            ValueError,
            lambda: stats.update(np.array(1)),
            "expert_ids: got a scalar, need [..., experts per token]",
        ),
        (
            ValueError,
            lambda: stats.update(np.broadcast_to(ids[:1], (2**24 + 1, 2))),
            "expert_ids: got shape (16777217, 2), need at most 16777216 tokens an update",
        ),
        (
            ValueError,
            lambda: stats.update(ids, 0),
            "layer: got 0, need None for statistics without layers",
        ),
        (
            ValueError,
            lambda: layered.update(ids),
            "expert_ids: got shape (3, 2), need [2, ..., experts per token] for all layers at "
            "once, or a layer",
        ),
        (
            ValueError,
            lambda: layered.update(ids, 2),
            "layer: got 2, need one of the 2 layers from 0",
        ),
        (TypeError, lambda: stats.merge(3), "other: got int, need RoutingStats"),
        (
            ValueError,
            lambda: stats.merge(Stats.zeros(8, 2)),
            "other: got statistics of 8 experts in 2 layers with 4096 samples, need 4 experts "
            "with 4096 samples",
        ),
        (ValueError, lambda: stats.layer(0), "index: got 0, need one of no layers"),
        (ValueError, lambda: layered.layer(2), "index: got 2, need one of 2 layers"),
    ]
    for kind, call, message in cases:
        with pytest.raises(kind) as info:
            call()
        assert str(info.value) == message
