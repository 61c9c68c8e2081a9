"""Grouped matmuls against literal loops: small integers, so that every sum is exact and every
result has one right value, to the bit."""

from __future__ import annotations

import functools
import os
import platform
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROWS, P, make_mesh, run_python, sharded
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.test_util import check_grads

import jax_fusco as jf

IMPLEMENTATIONS = ("xla", "blas")
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
DTYPES = ("bfloat16", "float16", "float32")


def by_hand(rows, kernel, sizes, source, merge, weights, num_rows):
    """The result in float64 and, for each assignment, its product."""
    count = len(rows) if source is None else len(source)
    products = np.zeros((count, kernel.shape[2]))
    out = np.zeros((count if num_rows is None else num_rows, kernel.shape[2]))
    a = 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            read = a if source is None else source[a]
            if read >= 0:
                for i in range(kernel.shape[1]):
                    products[a] += rows[read, i] * kernel[group, i]
            write = a if merge is None else merge[a]
            if read >= 0 and write >= 0:
                out[write] += (1 if weights is None else weights[a]) * products[a]
            a += 1
    return out, products


def backward_by_hand(rows, kernel, sizes, source, merge, weights, products, g):
    """Cotangents of rows, kernel and weights."""
    d_rows, d_kernel = np.zeros(rows.shape), np.zeros(kernel.shape)
    d_weights = np.zeros(len(products))
    a = 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            read = a if source is None else source[a]
            write = a if merge is None else merge[a]
            if read >= 0 and write >= 0:
                weight = 1 if weights is None else weights[a]
                d_rows[read] += weight * (kernel[group] @ g[write])
                d_kernel[group] += np.outer(rows[read], weight * g[write])
                d_weights[a] = g[write] @ products[a]
            a += 1
    return d_rows, d_kernel, d_weights


class Case:
    """Random small integers; indices and weights where asked for, NaN where nobody may look."""

    def __init__(self, seed, dtype, sizes, tail, n, m, *, source=False, merge=False, weights=False):
        rng = np.random.default_rng(seed)
        self.dtype, self.sizes = jnp.dtype(dtype), np.asarray(sizes, np.int32)
        total = int(self.sizes.sum())
        self.total, count = total, total + tail
        self.num_rows = int(rng.integers(1, 9)) if merge else None
        num_read = int(rng.integers(1, 9)) if source else count

        def integers(*shape):
            return rng.integers(-2, 3, shape).astype(np.float64)

        self.rows, self.kernel = integers(num_read, n), integers(len(sizes), n, m)
        self.g = integers(count if self.num_rows is None else self.num_rows, m)
        self.source = self.merge = self.weights = None
        if source:
            self.source = rng.integers(-1, num_read, count).astype(np.int32)
            self.source[total:] = rng.integers(-5, 100, tail)  # never looked at
        else:
            self.rows[total:] = np.nan
        if merge:
            self.merge = rng.integers(-1, self.num_rows, count).astype(np.int32)
            self.merge[total:] = rng.integers(-5, 100, tail)
        else:
            self.g[total:] = np.nan
        if weights:
            self.weights = rng.choice([-1.0, 0.5, 1.0, 2.0], count)
            self.weights[total:] = np.nan
            for index in (self.source, self.merge):
                if index is not None:
                    self.weights[index < 0] = np.nan

    def options(self):
        given = {"source": self.source, "merge": self.merge, "num_rows": self.num_rows}
        return {name: value for name, value in given.items() if value is not None}

    def function(self, implementation):
        def run(rows, kernel, weights):
            return jf.grouped_matmul(
                rows,
                kernel,
                jnp.asarray(self.sizes),
                merge_weights=weights,
                implementation=implementation,
                **self.options(),
            )

        return run

    def arguments(self):
        weights = None if self.weights is None else jnp.asarray(self.weights, jnp.float32)
        return jnp.asarray(self.rows, self.dtype), jnp.asarray(self.kernel, self.dtype), weights

    def check(self, implementation):
        """Result and gradients, to the bit."""
        indices = (self.sizes, self.source, self.merge, self.weights)
        rows, g = np.nan_to_num(self.rows), np.nan_to_num(self.g)
        out, products = by_hand(rows, self.kernel, *indices, self.num_rows)
        expected = backward_by_hand(rows, self.kernel, *indices, products, g)

        def both_ways(rows, kernel, weights, g):
            result, pull = jax.vjp(self.function(implementation), rows, kernel, weights)
            return result, pull(g)

        found, cotangents = jax.jit(both_ways)(*self.arguments(), jnp.asarray(self.g, self.dtype))
        pairs = [(found, out, self.dtype), (cotangents[0], expected[0], self.dtype)]
        pairs.append((cotangents[1], expected[1], self.dtype))
        if self.weights is not None:
            pairs.append((cotangents[2], expected[2], np.float32))
        for x, y, dtype in pairs:
            assert x.dtype == dtype
            np.testing.assert_array_equal(np.asarray(x), y.astype(dtype))


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"source": True}, {"merge": True}, {"merge": True, "weights": True},
     {"source": True, "merge": True}, {"source": True, "merge": True, "weights": True}],
    ids=lambda options: "-".join(options) or "plain",
)  # fmt: skip
def test_result_and_gradients(implementation, dtype, options):
    Case(0, dtype, [3, 0, 7, 1], 4, 17, 33, **options).check(implementation)


@pytest.mark.parametrize("implementation", ["blas", None])
@pytest.mark.parametrize("flags", [(0, 0, 0), (1, 0, 0), (0, 1, 1), (1, 1, 0), (1, 1, 1)])
def test_gradients_of_gradients_by_finite_differences(implementation, flags):
    source, merge, weights = flags
    case = Case(0, "float32", [3, 0, 4], 2, 3, 2, source=source, merge=merge, weights=weights)
    arguments = [0.3 * jnp.nan_to_num(x) for x in case.arguments() if x is not None]

    def run(rows, kernel, weights=None):
        return jnp.sin(case.function(implementation)(rows, kernel, weights))

    check_grads(jax.jit(run), arguments, order=3, modes=["rev"], atol=0.03, rtol=0.03, eps=1e-2)


@given(
    st.integers(0, 2**20),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 6), min_size=1, max_size=3),
    st.integers(0, 3),
    st.sampled_from([(1, 1), (3, 20)]),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
@settings(max_examples=40)
def test_any_case(seed, dtype, sizes, tail, shape, flags):
    source, merge, weights = flags
    case = Case(
        seed, dtype, sizes, tail, *shape, source=source, merge=merge, weights=merge and weights
    )
    case.check("blas")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("indexed", [False, True])
def test_sizes_beyond_one_tile(dtype, indexed):
    """Several tiles along rows, columns and depth, none of a whole size."""
    rng = np.random.default_rng(3)
    sizes, n, m, num_rows = [5, 300, 0, 600], 401, 1045, 77
    count = sum(sizes) + 9
    options = {}
    if indexed:
        options = {
            "source": rng.integers(-1, 50, count).astype(np.int32),
            "merge": rng.integers(-1, num_rows, count).astype(np.int32),
            "num_rows": num_rows,
            "merge_weights": rng.choice([0.5, 1, 2], count).astype(np.float32),
        }
    rows = rng.integers(-2, 3, (50 if indexed else count, n)).astype(dtype)
    kernel = rng.integers(-2, 3, (len(sizes), n, m)).astype(dtype)
    g = rng.integers(-2, 3, (num_rows if indexed else count, m)).astype(dtype)
    g *= rng.random(g.shape) < 0.02  # "xla" rounds each part of a row's gradient

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, rows, kernel):
        function = functools.partial(
            jf.grouped_matmul,
            group_sizes=jnp.asarray(sizes, jnp.int32),
            implementation=implementation,
            **options,
        )
        result, pull = jax.vjp(function, rows, kernel)
        return result, *pull(g)

    for x, y in zip(run("blas", rows, kernel), run("xla", rows, kernel), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@both
def test_merges_are_rounded_once(implementation):
    rows = jnp.full((3, 1), 1, jnp.bfloat16)
    kernel = jnp.asarray([[[256.0]], [[1.0]], [[1.0]]], jnp.bfloat16)
    sizes, merge = jnp.ones(3, jnp.int32), jnp.zeros(3, jnp.int32)
    out = jf.grouped_matmul(
        rows, kernel, sizes, merge=merge, num_rows=1, implementation=implementation
    )
    assert out == 258  # 256 + 1 is 256 in bfloat16


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nan_stays_where_it_is(implementation, dtype):
    """A NaN in a row reaches that row of the result, and its group's gradients, alone."""
    rows = jnp.ones((6, 4), dtype).at[1, 2].set(np.nan)
    kernel, sizes = jnp.ones((2, 4, 5), dtype), jnp.asarray([3, 3], jnp.int32)

    def total(rows, kernel):
        out = jf.grouped_matmul(rows, kernel, sizes, implementation=implementation)
        return out.astype(jnp.float32).sum(), out

    (d_rows, d_kernel), out = jax.grad(total, (0, 1), has_aux=True)(rows, kernel)
    assert np.isnan(np.asarray(out, np.float32)).any(1).tolist() == [False, True] + [False] * 4
    assert np.isfinite(np.asarray(d_rows, np.float32)).all()
    assert np.isnan(np.asarray(d_kernel, np.float32)).any((1, 2)).tolist() == [True, False]


@both
def test_nothing_at_all(implementation):
    kernel = jnp.ones((2, 4, 5))
    none, sizes = jnp.zeros(0, jnp.int32), jnp.zeros(2, jnp.int32)
    run = functools.partial(jf.grouped_matmul, implementation=implementation)
    assert run(jnp.ones((0, 4)), kernel, sizes).shape == (0, 5)
    assert run(jnp.ones((3, 4)), kernel, sizes, source=none).shape == (0, 5)
    np.testing.assert_array_equal(run(jnp.ones((3, 4)), kernel, sizes), np.zeros((3, 5)))
    merged = run(jnp.ones((3, 4)), kernel, sizes, merge=jnp.zeros(3, jnp.int32), num_rows=2)
    np.testing.assert_array_equal(merged, np.zeros((2, 5)))
    deep = run(jnp.ones((3, 0)), jnp.ones((2, 0, 5)), jnp.asarray([1, 2], jnp.int32))
    np.testing.assert_array_equal(deep, np.zeros((3, 5)))
    sources = jnp.full(3, -1, jnp.int32)
    empty = run(jnp.ones((0, 4)), kernel, jnp.asarray([3, 0], jnp.int32), source=sources)
    np.testing.assert_array_equal(empty, np.zeros((3, 5)))


def by_transform(transform, implementation):
    """Loss and gradients of a small case under a transform of the function."""
    case = Case(5, "float32", [3, 4, 2], 2, 6, 7, source=True, merge=True, weights=True)

    def loss(rows, kernel, weights):
        return (transform(case.function(implementation))(rows, kernel, weights) ** 2).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*case.arguments())


def scanned(function):
    def run(rows, kernel, weights):
        def step(carry, _):
            return carry + function(rows, kernel, weights), None

        start = jnp.zeros_like(function(rows, kernel, weights))
        return lax.scan(step, start, length=3)[0] / 3

    return run


def mapped(function):
    return lambda *args: jax.vmap(function)(*(jnp.stack([x, x]) for x in args))[1]


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint, scanned, mapped])
def test_transforms(implementation, transform):
    if implementation == "xla" and transform is mapped:
        with pytest.raises(NotImplementedError, match=r"under jax\.vmap use implementation='blas'"):
            by_transform(transform, implementation)
        return
    for x, y in zip(
        jax.tree.leaves(by_transform(transform, implementation)),
        jax.tree.leaves(by_transform(lambda f: f, "xla")),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@both
@pytest.mark.parametrize("check_vma", [False, True])
def test_under_shard_map(implementation, check_vma):
    """Rows of each rank, one kernel for all: its gradient is summed over the ranks."""
    ranks, rng = 4, np.random.default_rng(7)
    rows = rng.integers(-2, 3, (ranks * 6, 5)).astype(np.float32)
    kernel = rng.integers(-2, 3, (2, 5, 3)).astype(np.float32)
    sizes = np.asarray([[2, 3], [0, 6], [5, 0], [0, 0]], np.int32).reshape(-1)

    def local(rows, kernel, sizes):
        out = jf.grouped_matmul(rows, kernel, sizes, implementation=implementation)
        return lax.psum((out**2).sum(), "expert")

    run = sharded(
        local, make_mesh(ranks), in_specs=(ROWS, P(), ROWS), out_specs=P(), check_vma=check_vma
    )
    value, (d_rows, d_kernel) = jax.value_and_grad(run, (0, 1))(rows, kernel, sizes)
    expected, d_expected = 0.0, np.zeros(kernel.shape)
    for rank in range(ranks):
        part, each = rows[rank * 6 :][:6].astype(float), sizes[2 * rank :][:2]
        out, products = by_hand(part, kernel, each, None, None, None, None)
        back = backward_by_hand(part, kernel, each, None, None, None, products, 2 * out)
        expected += (out**2).sum()
        d_expected += back[1]
        np.testing.assert_array_equal(d_rows[rank * 6 :][:6], back[0])
    assert value == expected
    np.testing.assert_array_equal(d_kernel, d_expected)


def test_partly_manual_mesh():
    """Axes that the shard_map leaves to the compiler do not repeat or mix the products."""
    mesh = make_mesh({"data": 2, "expert": 2})

    def local(rows, kernel, sizes):
        return jf.grouped_matmul(rows, kernel, sizes, implementation="blas")

    run = sharded(local, mesh, axis_names={"expert"}, in_specs=(ROWS, P(), ROWS))
    rows = jnp.arange(24, dtype=jnp.float32).reshape(8, 3)
    kernel, sizes = jnp.ones((1, 3, 2)), jnp.asarray([4, 4], jnp.int32)
    np.testing.assert_array_equal(run(rows, kernel, sizes), rows @ kernel[0])


CHECKSUM = """
import hashlib
import jax, jax.numpy as jnp, numpy as np
import jax_fusco as jf
rng = np.random.default_rng(0)
count = 900
index = rng.integers(-1, 70, count).astype(np.int32)
digest = hashlib.sha256()
for dtype in ("bfloat16", "float32"):
    rows, kernel, g = (rng.standard_normal(s).astype(dtype) for s in ((70, 500), (3, 500, 600),
                                                                      (70, 600)))
    weights = rng.random(count, dtype=np.float32)
    def run(rows, kernel, weights):
        return jf.grouped_matmul(rows, kernel, jnp.asarray([800, 3, 90], jnp.int32), source=index,
                                 merge=index[::-1].copy(), merge_weights=weights, num_rows=70,
                                 implementation="blas")
    out, pull = jax.vjp(run, rows, kernel, weights)
    for x in (out, *pull(g)):
        digest.update(np.asarray(x).tobytes())
print(digest.hexdigest())
"""


def test_threads_do_not_change_bits():
    digests = set()
    for threads in ("1", "2", "5"):
        run = run_python(CHECKSUM, env={**os.environ, "JAX_FUSCO_THREADS": threads})
        assert run.returncode == 0, run.stderr
        digests.add(run.stdout.split()[-1])
    assert len(digests) == 1


def test_default_is_blas_on_cpu_devices():
    case = Case(1, "float32", [2, 3], 0, 4, 4)
    lowered = jax.jit(case.function(None)).lower(*case.arguments()).as_text()
    assert "jax_fusco_grouped_matmul" in lowered
    exact = Case(1, "float64", [2, 3], 0, 4, 4)
    with jax.enable_x64(True):
        lowered = jax.jit(exact.function(None)).lower(*exact.arguments()).as_text()
    assert "jax_fusco_grouped_matmul" not in lowered


def test_the_blas_refuses_float64():
    rows, kernel = np.ones((4, 3)), np.ones((2, 3, 5))
    with jax.enable_x64(True), pytest.raises(ValueError, match="'blas'") as caught:
        jf.grouped_matmul(rows, kernel, SIZES, implementation="blas")
    assert str(caught.value) == (
        "implementation: got 'blas', need bfloat16, float16 or float32 rows (got float64), "
        "use 'xla'"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": [2, -1]}, "group_sizes[1] is -1, it must be at least 0."),
        ({"sizes": [2, 9]}, "group_sizes add up to 11, there are 4 assignments."),
        ({"source": [0, 1, 4, 0]}, "source[2] is 4, which does not exist (of 4 rows)."),
        ({"merge": [0, 9, 0, 0]}, "merge[1] is 9, which does not exist (of 2 rows)."),
    ],
)
def test_what_the_program_computed_is_checked(changes, message):
    options = {k: jnp.asarray(v, jnp.int32) for k, v in changes.items() if k != "sizes"}
    if "merge" in options:
        options["num_rows"] = 2
    sizes = jnp.asarray(changes.get("sizes", [2, 2]), jnp.int32)
    with pytest.raises(Exception, match="jax_fusco_grouped_matmul: ") as caught:
        jax.block_until_ready(
            jf.grouped_matmul(
                jnp.ones((4, 3)), jnp.ones((2, 3, 5)), sizes, implementation="blas", **options
            )
        )
    assert message in str(caught.value)


ROWS_4, KERNEL, SIZES = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.ones(2, jnp.int32)
FOUR = jnp.zeros(4, jnp.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rows": "rows"}, TypeError, "rows: got str, need an array"),
        (
            {"rows": FOUR[:, None]},
            TypeError,
            "rows: got dtype int32, need a floating dtype of 2 bytes or more",
        ),
        ({"rows": ROWS_4[0]}, ValueError, "rows: got shape (3,), need [rows, n]"),
        (
            {"kernel": KERNEL.astype(jnp.bfloat16)},
            TypeError,
            "kernel: got dtype bfloat16, need float32 as rows",
        ),
        ({"kernel": KERNEL[0]}, ValueError, "kernel: got shape (3, 5), need [groups, 3, m]"),
        (
            {"kernel": jnp.ones((2, 4, 5))},
            ValueError,
            "kernel: got shape (2, 4, 5), need [groups, 3, m]",
        ),
        (
            {"group_sizes": jnp.ones(2)},
            TypeError,
            "group_sizes: got dtype float32, need int32",
        ),
        (
            {"group_sizes": FOUR},
            ValueError,
            "kernel: got 2 groups, need 4 as group_sizes has (inside jax.shard_map those of this "
            "rank's experts)",
        ),
        ({"source": ROWS_4}, TypeError, "source: got dtype float32, need int32"),
        (
            {"source": FOUR[:, None]},
            ValueError,
            "source: got shape (4, 1), need one dimension, one entry for each assignment",
        ),
        (
            {"merge": FOUR[:3], "num_rows": 2},
            ValueError,
            "merge: got shape (3,), need 4 entries, one for each assignment",
        ),
        (
            {"merge": FOUR},
            ValueError,
            "num_rows: got None, need the rows of the result with merge",
        ),
        (
            {"merge": FOUR, "num_rows": -1},
            ValueError,
            "num_rows: got -1, need an integer of at least 0",
        ),
        ({"num_rows": 3}, ValueError, "num_rows: got 3, need None without merge"),
        (
            {"merge_weights": jnp.ones(4)},
            ValueError,
            "merge_weights: got weights without merge, need None or merge too",
        ),
        (
            {"merge": FOUR, "num_rows": 2, "merge_weights": FOUR},
            TypeError,
            "merge_weights: got dtype int32, need a floating dtype",
        ),
        (
            {"merge": FOUR, "num_rows": 2, "merge_weights": jnp.ones(3)},
            ValueError,
            "merge_weights: got shape (3,), need 4 entries, one for each assignment",
        ),
        (
            {"implementation": "cublas"},
            ValueError,
            "implementation: got 'cublas', need 'xla', 'blas', 'tokamax', or None",
        ),
        (
            {"rows": ROWS_4.astype(jnp.float8_e4m3fn)},
            TypeError,
            "rows: got dtype float8_e4m3fn, need a floating dtype of 2 bytes or more",
        ),
    ],
)
def test_errors(changes, error, message):
    arguments = {"rows": ROWS_4, "kernel": KERNEL, "group_sizes": SIZES} | changes
    with pytest.raises(error) as caught:
        jf.grouped_matmul(**arguments)
    assert str(caught.value) == message


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 kernels")
def test_kernels_are_those_of_the_processor_whatever_others_are_told():
    def kernels(others, isa=""):
        env = {"OPENBLAS_CORETYPE": others, "JAX_FUSCO_ISA": isa}
        run = run_python("from jax_fusco import blas; print(blas.kernels())", env=env)
        return run.stdout.strip()

    assert kernels("Nehalem") == kernels("Prescott") != ""
    assert kernels("Nehalem", "avx2") == "Haswell"


def test_without_a_blas(monkeypatch):
    monkeypatch.setattr("jax_fusco.blas.is_installed", lambda: False)
    case = Case(1, "float32", [2, 3], 0, 4, 4)
    case.check(None)
    with pytest.raises(ValueError, match="need pip install scipy-openblas32, or use 'xla'"):
        case.check("blas")


def test_tokamax_is_masked(monkeypatch):
    """Whatever its kernels leave in rows past the groups, forward and backward, stays there."""
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(ValueError, match="need pip install tokamax"):
        Case(2, "float32", [2, 3], 2, 4, 4).check("tokamax")

    def ragged_dot(x, kernel, sizes, preferred_element_type):
        past = (jnp.arange(x.shape[0]) >= sizes.sum())[:, None]
        y = lax.ragged_dot(x, kernel, sizes, preferred_element_type=preferred_element_type)
        return jnp.where(past, jnp.nan, y)

    fake = types.ModuleType("tokamax")
    fake.ragged_dot = ragged_dot
    monkeypatch.setitem(sys.modules, "tokamax", fake)
    for options in ({}, {"source": True, "merge": True, "weights": True}):
        Case(2, "float32", [2, 3], 2, 4, 4, **options).check("tokamax")


def test_bits_of_the_engine_are_those_of_every_run():
    case = Case(9, "bfloat16", [40, 0, 3], 5, 64, 96, source=True, merge=True, weights=True)
    run = jax.jit(case.function("blas"))
    first = np.asarray(run(*case.arguments())).tobytes()
    assert all(np.asarray(run(*case.arguments())).tobytes() == first for _ in range(5))
