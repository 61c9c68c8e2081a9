"""Gathers whose results take over arrays that hold something already, against a literal loop."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROWS, assert_same_bits, both, make_mesh, per_rank, place
from jax import lax

from jax_fusco import ffi, reference
from jax_fusco.mesh import checked_axes, expert_axis, vary

MOVERS = {"xla": reference.gather_rows, "fused": ffi.gather_rows}


def by_hand(rows, source_rank, source, into, fanout):
    """Every argument has a leading axis of ranks; `into` is a tuple of arrays, as the result is."""
    out = [np.array(array) for array in into]
    for rank, m in np.ndindex(*source.shape):
        for result, operand in zip(out, rows, strict=True):
            if source[rank, m] >= 0:
                result[rank, m] = operand[source_rank[rank, m], source[rank, m] // fanout]
            elif source[rank, m] == -1:
                result[rank, m] = 0
    return tuple(out)


def random_arrays(rng, ranks, count, rows):
    """An array of each dtype in `rows` (dtype, shape of a row), of any bits but NaN's."""
    arrays = []
    for dtype, shape in rows:
        dtype = np.dtype(dtype)
        bits = rng.integers(0, 120, (ranks, count, *shape, dtype.itemsize), np.uint8)
        value = bits[..., 0] % 2 == 1 if dtype.kind == "b" else bits.view(dtype)[..., 0]
        arrays.append(value)
    return tuple(arrays)


def random_sources(rng, ranks, count, num_rows, fanout, kept=1 / 3):
    """Rows of each rank that are gathered, cleared (-1) and left (-2)."""
    source = rng.integers(0, max(count * fanout, 1), (ranks, num_rows)).astype(np.int32)
    source[(rng.random(source.shape) < 0.2) | (count == 0)] = -1
    source[rng.random(source.shape) < kept] = -2
    rank = np.where(source < 0, source, rng.integers(0, ranks, source.shape)).astype(np.int32)
    return rank, source


@functools.cache
def program(implementation, ranks, fanout, axis_name="expert"):
    def run(rows, source_rank, source, into):
        axis = expert_axis(axis_name)
        return MOVERS[implementation](
            rows, source_rank, source, axis=axis, fanout=fanout, zero_tail=False, into=into
        )

    return per_rank(run, ranks)


def check(implementation, rows, source_rank, source, into, fanout=1):
    got = program(implementation, len(source), fanout)(rows, source_rank, source, into)
    want = by_hand(rows, source_rank, source, into, fanout)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


DTYPES = (
    ("float32", (5,)),
    ("bool", (3,)),
    ("complex64", (2, 2)),
    ("int8", (7,)),
    ("float16", (1,)),
    ("int32", ()),
    ("uint8", (4, 0)),
)


@both
@pytest.mark.parametrize("fanout", [1, 3])
@pytest.mark.parametrize("ranks", [1, 4])
def test_arrays_of_several_dtypes(implementation, ranks, fanout):
    rng = np.random.default_rng(0)
    for _ in range(5):
        rows = random_arrays(rng, ranks, 9, DTYPES)
        into = random_arrays(rng, ranks, 40, DTYPES)
        check(implementation, rows, *random_sources(rng, ranks, 9, 40, fanout), into, fanout)


@both
@pytest.mark.parametrize(
    ("count", "num_rows"), [(0, 6), (6, 0), (0, 0)], ids=["no operand", "no result", "neither"]
)
def test_empty_sizes(implementation, count, num_rows):
    rng = np.random.default_rng(1)
    rows = random_arrays(rng, 2, count, DTYPES)
    into = random_arrays(rng, 2, num_rows, DTYPES)
    check(implementation, rows, *random_sources(rng, 2, count, num_rows, 1), into)
    check(implementation, (), *random_sources(rng, 2, count, num_rows, 1), ())


@both
@pytest.mark.parametrize("value", [-1, -2])
def test_rows_that_are_all_cleared_or_all_kept(implementation, value):
    rng = np.random.default_rng(2)
    rows = random_arrays(rng, 2, 5, DTYPES)
    into = random_arrays(rng, 2, 8, DTYPES)
    nothing = np.full((2, 8), value, np.int32)
    check(implementation, rows, nothing, nothing, into)


@both
def test_kept_rows_keep_the_bits_of_nan(implementation):
    bits = np.random.default_rng(3).integers(0, 2**32, (2, 8, 6), np.uint32)
    bits |= np.uint32(0x7F800001)
    rows = (np.zeros((2, 3, 6), np.float32),)
    rank, source = random_sources(np.random.default_rng(4), 2, 3, 8, 1, kept=0.6)
    (got,) = program(implementation, 2, 1)(rows, rank, source, (bits.view(np.float32),))
    kept = source == -2
    assert kept.any()
    np.testing.assert_array_equal(np.asarray(got).view(np.uint32)[kept], bits[kept])


def test_more_arrays_than_one_call_takes():
    rng = np.random.default_rng(5)
    dtypes = [("int8", (i % 3,)) for i in range(2 * ffi.MAX_ARRAYS + 3)]
    rows, into = (random_arrays(rng, 2, count, dtypes) for count in (5, 9))
    check("fused", rows, *random_sources(rng, 2, 5, 9, 1), into)


@pytest.mark.parametrize("kept", [0.06, 0.5, 0.94])
@pytest.mark.parametrize("threads", ["1", "3"])
def test_results_that_several_workers_write_past_the_caches(monkeypatch, kept, threads):
    monkeypatch.setenv("JAX_FUSCO_THREADS", threads)
    rng = np.random.default_rng(6)
    shapes = (("float32", (1024,)), ("uint8", (1000,)))
    rows, into = (random_arrays(rng, 2, count, shapes) for count in (64, 5000))
    check("fused", rows, *random_sources(rng, 2, 64, 5000, 2, kept), into, 2)


SLICES = 5


def slices(implementation, slice_of_row, rows, source_rank, source, into, count):
    """The rows of slices 0 to count - 1, slice by slice into the same arrays."""
    axis = expert_axis("expert")

    def move(i, buffers):
        mine = slice_of_row == i
        return MOVERS[implementation](
            rows,
            jnp.where(mine, source_rank, -2),
            jnp.where(mine, source, -2),
            axis=axis,
            fanout=1,
            zero_tail=False,
            into=buffers,
        )

    return lax.fori_loop(0, count, move, vary(into, checked_axes(axis)))


@both
def test_a_loop_fills_the_buffers_that_it_carries(implementation):
    """With a trip count known only when it runs, and a buffer whose memory is never copied."""
    rng = np.random.default_rng(7)
    ranks, num_rows, shapes = 4, 50, (("float32", (6,)), ("bool", (3,)))
    rows = random_arrays(rng, ranks, 9, shapes)
    into = random_arrays(rng, ranks, num_rows, shapes)
    source_rank, source = random_sources(rng, ranks, 9, num_rows, 1, kept=0.1)
    slice_of_row = rng.integers(0, SLICES, source.shape)
    run = per_rank(functools.partial(slices, implementation), ranks)
    for count in (0, 1, SLICES):
        counts = np.full(ranks, count, np.int32)
        got = run(slice_of_row, rows, source_rank, source, into, counts)
        masked = np.where(slice_of_row < count, source, -2)
        for a, b in zip(got, by_hand(rows, source_rank, masked, into, 1), strict=True):
            assert_same_bits(a, b)


def operations(text, holds, shape):
    """Names of the operations of a shape in the one computation of compiled HLO with a text."""
    (found,) = (c for c in re.split(r"\n\}\n", text) if holds in c)
    assert not found.lstrip().startswith("ENTRY")
    results = [line.split(" = ", 1)[1] for line in found.splitlines() if " = " in line]
    return [re.search(r"\} ([\w-]+)\(", r)[1] for r in results if r.startswith(shape)], found


def test_the_compiler_copies_no_carried_buffer():
    num_rows, shape = 48, (37,)
    run = per_rank(functools.partial(slices, "fused"), 2)
    arguments = (
        np.zeros((2, num_rows), np.int32),
        (np.zeros((2, 5, *shape), np.float32),),
        *(np.zeros((2, num_rows), np.int32),) * 2,
        (np.zeros((2, num_rows, *shape), np.float32),),
        np.zeros(2, np.int32),
    )
    text = run.lower(*arguments).compile().as_text()
    buffer = f"f32[{num_rows},{shape[0]}]"
    target = 'custom_call_target="jax_fusco_gather_rows"'
    mover, computation = operations(text, target, buffer)
    assert sorted(mover) == ["custom-call", "parameter"]
    # What the loop's body has of the buffer's shape: its parameter's part, and the call.
    name = computation.lstrip().split()[0]
    body, _ = operations(text, f"to_apply={name}", buffer)
    assert sorted(body) == ["call", "get-tuple-element"]


@both
def test_arguments_that_are_used_again_keep_their_values(implementation):
    """The memory is taken over only where nobody else reads it."""
    rng = np.random.default_rng(8)
    rows = random_arrays(rng, 2, 5, DTYPES[:2])
    into = random_arrays(rng, 2, 8, DTYPES[:2])
    rank, source = random_sources(rng, 2, 5, 8, 1)

    def twice(rows, source_rank, source, into):
        axis = expert_axis("expert")
        move = functools.partial(
            MOVERS[implementation], rows, axis=axis, fanout=1, zero_tail=False, into=into
        )
        nothing = jnp.full_like(source, -2)
        return move(source_rank, source), move(nothing, nothing), into

    moved, kept, unchanged = per_rank(twice, 2)(rows, rank, source, into)
    for a, b in zip(moved, by_hand(rows, rank, source, into, 1), strict=True):
        assert_same_bits(a, b)
    for a, b, c in zip(kept, unchanged, into, strict=True):
        assert_same_bits(a, c)
        assert_same_bits(b, c)


@both
@pytest.mark.parametrize("donate", [False, True])
def test_rows_that_are_their_own_destination(implementation, donate):
    """Peers still read what the results would overwrite: the compiler has to part the two."""
    rng = np.random.default_rng(11)
    (x,) = random_arrays(rng, 2, 3000, [("float32", (7,))])
    rank, source = random_sources(rng, 2, 3000, 3000, 1)

    def run(x, source_rank, source):
        return MOVERS[implementation](
            (x,),
            source_rank,
            source,
            axis=expert_axis("expert"),
            fanout=1,
            zero_tail=False,
            into=(x,),
        )

    function = jax.jit(per_rank(run, 2), donate_argnums=0 if donate else ())
    (there,) = place(make_mesh(2), ROWS, x)
    (got,) = function(there, rank, source)
    assert_same_bits(got, by_hand((x,), rank, source, (x,), 1)[0])


def test_an_axis_that_the_compiler_keeps_for_itself():
    """In a partly manual mesh every replica fills a buffer of its own."""
    rng = np.random.default_rng(9)
    rows = random_arrays(rng, 2, 5, DTYPES[:1])
    into = random_arrays(rng, 2, 8, DTYPES[:1])
    rank, source = random_sources(rng, 2, 5, 8, 1)

    def run(rows, source_rank, source, into):
        axis = expert_axis("expert")
        return ffi.gather_rows(
            rows, source_rank, source, axis=axis, fanout=1, zero_tail=False, into=into
        )

    mesh = make_mesh({"data": 2, "expert": 2})
    (got,) = per_rank(run, mesh, axis_names={"expert"})(rows, rank, source, into)
    assert_same_bits(got, by_hand(rows, rank, source, into, 1)[0])


def test_a_source_that_does_not_exist_is_an_error():
    rng = np.random.default_rng(10)
    rows = random_arrays(rng, 2, 5, DTYPES[:1])
    into = random_arrays(rng, 2, 8, DTYPES[:1])
    rank, source = random_sources(rng, 2, 5, 8, 1)
    source[1, 3], rank[1, 3] = 5, 0
    with pytest.raises(jax.errors.JaxRuntimeError, match="comes from source 5 of rank 0, which do"):
        jax.block_until_ready(program("fused", 2, 1)(rows, rank, source, into))


S, X, Y = np.zeros(4, np.int32), np.zeros((3, 5), np.float32), np.zeros((4, 5), np.float32)


@pytest.mark.parametrize(
    ("arrays", "results", "zero_tail", "aliases", "message"),
    [
        ((X, Y), [Y], 0, {}, "each result must share the memory of its into"),
        ((X, Y), [Y], 1, {6: 0}, "into needs zero_tail to be 0"),
        ((X, Y[:3]), [Y], 0, {}, "each into must have the shape and type of its result"),
        ((X, Y[:, :4]), [Y], 0, {}, "each into must have the shape and type of its result"),
        ((X, Y.view(np.int32)), [Y], 0, {}, "each into must have the shape and type of its result"),
        ((X, X, Y), [Y, Y], 0, {7: 0}, "one result for each rows operand, or for each with its"),
        ((X, Y, Y), [Y], 0, {6: 0}, "one result for each rows operand, or for each with its"),
        ((X,), [], 0, {}, "one result for each rows operand, or for each with its"),
    ],
)
def test_calls_that_this_version_does_not_make(arrays, results, zero_tail, aliases, message):
    """Nothing but this keeps such a call from writing over arrays of somebody else."""
    ffi.register()
    # Without results only an effect keeps a call in the program.
    run = jax.ffi.ffi_call(
        "jax_fusco_gather_rows",
        [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in results],
        input_output_aliases=aliases,
        has_side_effect=not results,
    )
    zero = np.int32(0)
    attributes = {"num_ranks": 1, "fanout": 1, "zero_tail": zero_tail}
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(
            jax.jit(lambda *o: run(zero, zero, S, S, S, *o, **attributes))(*arrays)
        )


@both
def test_what_cannot_be_taken_over_is_refused(implementation):
    def run(x, source, into, zero_tail):
        return MOVERS[implementation](
            (x,), source, source, axis=expert_axis(None), fanout=1, zero_tail=zero_tail, into=into
        )

    x, source = jnp.ones((3, 2)), jnp.zeros(4, jnp.int32)
    with pytest.raises(AssertionError):
        run(x, source, (jnp.ones((4, 2)),), True)
    with pytest.raises(AssertionError):
        run(x, source, (), False)
