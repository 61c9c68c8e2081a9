"""The oracle is itself checked, against exact fractions and against the words of the rule."""

import itertools
import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
from hypothesis import given

_FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def _round_to_float32(value: Fraction) -> float:
    """Nearest float32, ties to even, by integer arithmetic alone."""
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    ulp = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(magnitude / ulp) * ulp  # round() of a Fraction goes to even
    if rounded >= Fraction(2) ** 128:
        return math.copysign(math.inf, value)
    return math.copysign(float(rounded), value)


def _check_fma(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = oracle.fma32(np.float32([a]), np.float32([b]), np.float32([c]))[0]
    assert float(got) == _round_to_float32(exact)


@given(_FLOATS, _FLOATS, _FLOATS)
@hypothesis.settings(max_examples=500)
def test_fma32_equals_fractions(a: float, b: float, c: float) -> None:
    _check_fma(a, b, c)


@given(
    st.integers(-(2**24), 2**24),
    st.integers(-(2**24), 2**24),
    st.integers(-(2**24), 2**24),
    st.integers(-60, 60),
)
@hypothesis.settings(max_examples=500)
def test_fma32_equals_fractions_near_ties(a: int, b: int, c: int, shift: int) -> None:
    # Full significands at every relative exponent: where rounding twice would go wrong.
    _check_fma(float(a), float(b), math.ldexp(c, shift))


def test_fma32_differs_from_rounding_twice() -> None:
    # The product is 2**-24 - 2**-60, so the sum lies just below the middle of two float32. In
    # float64 it falls on the middle, and a tie goes to the wrong one.
    a, b = np.float32(2**-12 * (1 + 2**-18)), np.float32(2**-12 * (1 - 2**-18))
    c = np.float32(1 + 2**-23)
    assert np.float32(np.float64(a) * np.float64(b) + np.float64(c)) == np.float32(1 + 2**-22)
    assert oracle.fma32(a, b, c) == c


def test_fma32_keeps_infinities_and_nan() -> None:
    one, inf, nan = np.float32(1), np.float32(np.inf), np.float32(np.nan)
    assert oracle.fma32(one, inf, one) == np.inf
    assert np.isnan(oracle.fma32(one, inf, -inf))
    assert np.isnan(oracle.fma32(one, nan, one))
    big = np.float32(3e38)
    assert oracle.fma32(big, big, one) == np.inf


@given(st.floats(-1e10, 1e10), st.floats(-1e10, 1e10), st.floats(-1e10, 1e10))
def test_fma64_is_within_half_an_ulp(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = float(oracle.fma64(np.float64(a), np.float64(b), np.float64(c)))
    assert abs(Fraction(got) - exact) <= Fraction(math.ulp(got)) / 2


_COUNTS = st.integers(1, 3).flatmap(
    lambda local: st.integers(1, 3).flatmap(
        lambda ranks: st.lists(
            st.lists(st.integers(0, 6), min_size=ranks, max_size=ranks),
            min_size=local,
            max_size=local,
        )
    )
)


@given(_COUNTS, st.integers(0, 40), st.sampled_from([1, 2, 4]))
def test_water_fill_follows_the_rule(counts_: list, capacity: int, alignment: int) -> None:
    counts = np.asarray(counts_)
    kept = oracle.water_fill(counts, capacity, alignment)

    def rows(cells: np.ndarray) -> int:
        return sum(math.ceil(c.sum() / alignment) * alignment for c in cells)

    assert rows(kept) <= capacity
    assert (kept <= counts).all()
    if rows(counts) <= capacity:
        assert (kept == counts).all()
        return
    # The level: the highest that fits. Above it, no cell has more than one row.
    levels = [l for l in range(counts.max() + 1) if rows(np.minimum(counts, l)) <= capacity]
    level = max(levels)
    assert (kept >= np.minimum(counts, level)).all()
    assert (kept <= level + 1).all()
    # Nothing is cut that would still fit, and no cell is cut below one that is smaller.
    for cell in zip(*np.nonzero(kept < np.minimum(counts, level + 1)), strict=True):
        more = kept.copy()
        more[cell] += 1
        later = [c for c in itertools.product(*map(range, counts.shape)) if c > cell]
        for c in later:  # undo what came after it in buffer order
            more[c] = min(counts[c], level)
        assert rows(more) > capacity
    for a, b in itertools.permutations(itertools.product(*map(range, counts.shape)), 2):
        if kept[a] < counts[a] and counts[b] <= counts[a]:
            assert kept[b] <= kept[a] + 1


def test_plan_of_a_routing_written_by_hand() -> None:
    # Two ranks, four experts; rank 0 owns 0 and 1.
    ids = np.array([[[0, 2], [1, 0], [0, -1]], [[0, 3], [3, 3], [7, -2]]], np.int32)
    plan = oracle.make_plan(ids, 4, alignment=2, capacity=6)
    # Cells of rank 0: expert 0 from rank 0: 3, from rank 1: 1; expert 1 from rank 0: 1. 4 + 2 rows.
    assert plan.group_sizes.tolist() == [[4, 2], [2, 4]]
    assert plan.expert_counts.tolist() == [[4, 1], [1, 3]]
    assert plan.slot.tolist() == [[[0, 0], [4, 1], [2, -1]], [[3, 2], [3, 4], [-1, -1]]]
    assert plan.owner.tolist() == [[[0, 1], [0, 0], [0, -1]], [[0, 1], [1, 1], [-1, -1]]]
    assert plan.num_dropped.tolist() == [0, 0]
    assert plan.num_invalid.tolist() == [0, 2]
    tight = oracle.make_plan(ids, 4, capacity=3)
    # Rank 0, level 1: one row of each cell. Rank 1: expert 2 one row, expert 3 from rank 1 two.
    assert tight.expert_counts.tolist() == [[2, 1], [1, 2]]
    assert tight.slot.tolist() == [[[0, 0], [2, -1], [-1, -1]], [[1, 1], [2, -1], [-1, -1]]]
    assert tight.num_dropped.tolist() == [2, 1]


@pytest.mark.parametrize(("capacity", "kept"), [(0, [0, 0]), (1, [1, 0]), (5, [3, 2])])
def test_rows_above_the_level_go_in_buffer_order(capacity: int, kept: list[int]) -> None:
    assert oracle.water_fill(np.array([[4], [4]]), capacity, 1).ravel().tolist() == kept
