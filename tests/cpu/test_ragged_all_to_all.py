"""ragged_all_to_all against a literal loop, with gradients and groups, and in JAX's own name."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import P, assert_same_bits, both, make_mesh, per_rank, run_python, sharded

import jax_fusco as jf


def tables(rng, ranks, each=1, groups=None, largest=4, room=3):
    """Random slices in random places, that do not overlap: the four integer arrays [R, S]."""
    groups = groups or [list(range(ranks))]
    size = len(groups[0])
    slices = size * each
    send = rng.integers(0, largest + 1, (ranks, slices))
    send[rng.random((ranks, slices)) < 0.2] = 0
    # Operand rows are free to overlap, but results are not: each receiver lays out what arrives.
    gaps = rng.integers(0, room, (ranks, slices))
    input_offsets = np.cumsum(send + gaps, axis=1) - send
    recv, output_offsets = np.zeros_like(send), np.zeros_like(send)
    out_rows = 0
    for group in groups:
        for target_position, target in enumerate(group):
            row = 0
            order = rng.permutation(slices)
            for arrival in order:
                source = group[arrival // each]
                s = target_position * each + arrival % each
                row += int(rng.integers(0, room))
                recv[target, arrival] = send[source, s]
                output_offsets[source, s] = row
                row += int(send[source, s])
            out_rows = max(out_rows, row)
    in_rows = int((input_offsets + send).max(initial=0)) + 1
    return (input_offsets, send, output_offsets, recv), in_rows, out_rows + 2


def arrays(rng, ranks, in_rows, out_rows, shape=(3,), dtype="f4"):
    operand = rng.standard_normal((ranks, in_rows, *shape)).astype(dtype)
    return operand, rng.standard_normal((ranks, out_rows, *shape)).astype(dtype)


def exchange(implementation, **options):
    return functools.partial(
        jf.ragged_all_to_all, axis_name="expert", implementation=implementation, **options
    )


@both
@pytest.mark.parametrize(("ranks", "each"), [(1, 1), (1, 3), (2, 1), (4, 2), (8, 1), (16, 1)])
def test_slices_land_where_they_belong(implementation, ranks, each):
    run = per_rank(exchange(implementation), ranks)
    rng = np.random.default_rng(ranks)
    shape = None
    for _ in range(4):
        four, in_rows, out_rows = tables(rng, ranks, each)
        shape = shape or (in_rows + 30, out_rows + 60)  # one compilation for all draws
        operand, output = arrays(rng, ranks, *shape)
        got = run(operand, output, *(t.astype(np.int32) for t in four))
        assert_same_bits(got, oracle.ragged_all_to_all(operand, output, *four))


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float16", "uint32"])
def test_payload_dtypes(implementation, dtype):
    rng = np.random.default_rng(0)
    four, in_rows, out_rows = tables(rng, 4)
    operand, output = (
        (a * 10).astype(jnp.dtype(dtype)) for a in map(np.abs, arrays(rng, 4, in_rows, out_rows))
    )
    got = per_rank(exchange(implementation), 4)(operand, output, *(t.astype("i4") for t in four))
    assert_same_bits(got, oracle.ragged_all_to_all(operand, output, *four))


@both
def test_vmap_over_rows_of_the_same_tables(implementation):
    rng = np.random.default_rng(0)
    four, in_rows, out_rows = tables(rng, 4)
    operand, output = arrays(rng, 4, in_rows, out_rows, (3, 2))

    def run(operand, output, *four):
        def one(operand, output):
            return exchange(implementation)(operand, output, *four)

        return jax.vmap(one, in_axes=1, out_axes=1)(operand, output)

    got = per_rank(run, 4)(operand, output, *(t.astype("i4") for t in four))
    assert_same_bits(got, oracle.ragged_all_to_all(operand, output, *four))


@both
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_row_shapes(implementation, shape):
    rng = np.random.default_rng(0)
    four, in_rows, out_rows = tables(rng, 4)
    operand, output = arrays(rng, 4, in_rows, out_rows, shape)
    got = per_rank(exchange(implementation), 4)(operand, output, *(t.astype("i4") for t in four))
    assert_same_bits(got, oracle.ragged_all_to_all(operand, output, *four))


@both
@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[3, 0], [1, 2]], [[2, 0, 3, 1]]])
def test_axis_index_groups(implementation, groups):
    rng = np.random.default_rng(0)
    four, in_rows, out_rows = tables(rng, 4, groups=groups)
    operand, output = arrays(rng, 4, in_rows, out_rows)
    run = per_rank(exchange(implementation, axis_index_groups=groups), 4, check_vma=False)
    got = run(operand, output, *(t.astype("i4") for t in four))
    assert_same_bits(got, oracle.ragged_all_to_all(operand, output, *four, groups=groups))


@both
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients(implementation, check_vma):
    rng = np.random.default_rng(0)
    four, in_rows, out_rows = tables(rng, 4, each=2)
    operand, output = arrays(rng, 4, in_rows, out_rows)
    g = rng.standard_normal(output.shape).astype("f4")

    def local(operand, output, g, *four):
        run = exchange(implementation)
        return jax.vjp(lambda a, b: run(a, b, *four), operand, output)[1](g)

    got = per_rank(local, 4, check_vma=check_vma)(
        operand, output, g, *(t.astype("i4") for t in four)
    )
    # Where each row of a result comes from, by moving its number through the loop.
    number = np.arange(operand[..., 0].size).reshape(4, -1)
    source = oracle.ragged_all_to_all(number, np.full(output.shape[:2], -1), *four)
    want = np.zeros_like(operand).reshape(-1, 3)
    np.add.at(want, source[source >= 0], g[source >= 0])
    assert_same_bits(got[0], want.reshape(operand.shape))
    assert_same_bits(got[1], np.where((source >= 0)[..., None], np.float32(0), g))


@both
@pytest.mark.parametrize("groups", [None, [[3, 0], [1, 2]]])
def test_in_a_larger_mesh(implementation, groups):
    mesh = make_mesh({"expert": 4, "data": 2}, order=[1, 0, 3, 2, 5, 4, 7, 6])
    rng = np.random.default_rng(0)
    both_groups = [tables(rng, 4, groups=groups) for _ in range(2)]
    in_rows, out_rows = (max(g[i] for g in both_groups) for i in (1, 2))
    four = [np.stack(t).astype("i4") for t in zip(*(g[0] for g in both_groups), strict=True)]
    operand, output = zip(*(arrays(rng, 4, in_rows, out_rows) for _ in range(2)), strict=True)
    operand, output = np.stack(operand), np.stack(output)

    def local(*arguments):
        run = exchange(implementation, axis_index_groups=groups)
        return run(*(a[0, 0] for a in arguments))[None, None]

    spec = P("data", "expert")
    got = np.asarray(sharded(local, mesh, in_specs=spec, out_specs=spec)(operand, output, *four))
    for data in range(2):
        each = (t[data] for t in four)
        want = oracle.ragged_all_to_all(operand[data], output[data], *each, groups=groups)
        assert_same_bits(got[data], want)


@both
def test_the_output_given_is_not_changed(implementation):
    rng = np.random.default_rng(0)
    four, in_rows, out_rows = tables(rng, 2)
    operand, output = arrays(rng, 2, in_rows, out_rows)

    def local(operand, output, *four):
        result = exchange(implementation)(operand, output, *four)
        return result, output * 2

    result, doubled = per_rank(local, 2)(operand, output, *(t.astype("i4") for t in four))
    assert_same_bits(doubled, output * 2)
    assert_same_bits(result, oracle.ragged_all_to_all(operand, output, *four))


@both
def test_gradients_of_gradients(implementation):
    """Of `sum(out**3)`: `6 x` for the sum of gradients, of the rows that are sent."""
    sizes, in_rows, out_rows = tables(np.random.default_rng(5), 2)
    operand, output = arrays(np.random.default_rng(6), 2, in_rows, out_rows)
    run = per_rank(exchange(implementation), 2)

    def sum_of_gradients(operand, output):
        gradients = jax.grad(lambda *a: (run(*a, *sizes) ** 3).sum(), (0, 1))(operand, output)
        return sum(g.sum() for g in gradients)

    d_operand, d_output = jax.jit(jax.grad(sum_of_gradients, (0, 1)))(operand, output)
    sent, kept = np.zeros_like(operand), np.ones_like(output)
    for rank, slice_ in np.ndindex(sizes[0].shape):
        first = sizes[0][rank, slice_]
        sent[rank, first : first + sizes[1][rank, slice_]] = 1
        first, target = sizes[2][rank, slice_], slice_
        kept[target, first : first + sizes[1][rank, slice_]] = 0
    np.testing.assert_allclose(d_operand, 6 * operand * sent, rtol=1e-6)
    np.testing.assert_allclose(d_output, 6 * output * kept, rtol=1e-6)


@both
def test_chained_exchanges_in_a_scan(implementation):
    rng = np.random.default_rng(0)
    draws = [tables(rng, 4) for _ in range(3)]
    rows = max(max(d[1], d[2]) for d in draws)
    operand, output = arrays(rng, 4, rows, rows)
    steps = [np.stack(t, axis=1).astype("i4") for t in zip(*(d[0] for d in draws), strict=True)]

    def local(operand, output, *steps):
        def step(carry, four):
            operand, output = carry
            return (exchange(implementation)(operand, output, *four), operand), None

        return jax.lax.scan(step, (operand, output), steps)[0]

    got = per_rank(local, 4)(operand, output, *steps)
    for four, _, _ in draws:
        operand, output = oracle.ragged_all_to_all(operand, output, *four), operand
    jax.tree.map(assert_same_bits, got, (operand, output))


def test_in_the_name_of_jax():
    """With JAX's name bound to ours, neither implementation calls itself."""
    code = """
import jax, numpy as np
import jax_fusco as jf
jax.lax.ragged_all_to_all = jf.ragged_all_to_all
for implementation in (None, "xla"):
    def local(operand, output, offsets, sizes, to):
        options = {} if implementation is None else {"implementation": implementation}
        return jax.lax.ragged_all_to_all(
            operand, output, offsets, sizes, to, sizes, axis_name="expert", **options)
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("expert")
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))
    one = np.ones(4, np.int32)
    got = run(np.arange(4.0), np.zeros(4), np.array([0, 1, 0, 1], np.int32), one,
              np.array([0, 0, 1, 1], np.int32))
    assert got.tolist() == [0, 2, 1, 3], got
# On other platforms the fallback is JAX's own operation, and not ours under its name.
abstract = jax.sharding.AbstractMesh((2,), ("expert",), axis_types=mesh.axis_types)
shapes = [jax.ShapeDtypeStruct((4,), dtype) for dtype in "ffiii"]
traced = jax.jit(jax.shard_map(local, mesh=abstract, in_specs=spec, out_specs=spec)).trace(*shapes)
assert "ragged_all_to_all" in traced.lower(lowering_platforms=("cuda",)).as_text()
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("implementation", ["fused"])
@pytest.mark.parametrize(
    ("input_offset", "size", "output_offset"),
    [(0, 5, 0), (3, 2, 0), (0, 2, 3), (-1, 1, 0), (0, 1, -1), (0, -1, 0), (2**31 - 1, 1, 0)],
)
def test_an_update_that_does_not_fit_is_an_error(implementation, input_offset, size, output_offset):
    """Buffers have 4 rows. Nothing outside is touched; the message names the rank."""
    one = np.zeros((2, 2), np.int32)
    offsets, sizes, to = one.copy(), one.copy(), one.copy()
    offsets[1, 0], sizes[1, 0], to[1, 0] = input_offset, size, output_offset
    recv = sizes.T.copy()
    run = per_rank(exchange(implementation), 2)
    operand = output = np.zeros((2, 4, 3), np.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"rank 1"):
        jax.block_until_ready(run(operand, output, offsets, sizes, to, recv))
    good = run(operand, output, one, one, one, one)
    assert_same_bits(good, output)
