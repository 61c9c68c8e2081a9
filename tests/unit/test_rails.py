"""Rails: against literal loops over rows, and properties that hold for any counts."""

from __future__ import annotations

import itertools

import hypothesis
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jax_fusco import rails


@st.composite
def counts_of_rows(draw: st.DrawFn) -> np.ndarray:
    nodes, ranks = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    largest = draw(st.sampled_from([1, 5, 300]))
    counts = draw(hnp.arrays(np.int64, (nodes, ranks, nodes), elements=st.integers(0, largest)))
    counts[np.arange(nodes), :, np.arange(nodes)] = 0
    return counts


def literal_balanced(counts):
    nodes, ranks, _ = counts.shape
    moved = np.zeros((nodes, nodes, ranks, ranks), np.int64)
    for s, n in itertools.product(range(nodes), repeat=2):
        i = 0
        for owner in range(ranks):
            for _ in range(counts[s, owner, n]):
                moved[s, n, owner, (i + s + n) % ranks] += 1
                i += 1
    return moved


@hypothesis.given(counts_of_rows())
def test_balanced_is_the_literal_loop(counts):
    counts = np.minimum(counts, 40)
    got = rails.assign(counts, "balanced")
    np.testing.assert_array_equal(got.moved, literal_balanced(counts))


@hypothesis.given(counts_of_rows())
def test_balanced_differs_by_one_row_at_most(counts):
    got = rails.assign(counts)
    sent = got.sent
    assert (sent.max(2) - sent.min(2)).max(initial=0) <= 1
    # What a forwarder receives from a node is what its rail there sends.
    np.testing.assert_array_equal(got.ingress, sent.sum(0))
    # The remainder starts at rail s + n.
    remainder = counts.sum(1) % counts.shape[1]
    for s, n in itertools.product(range(counts.shape[0]), repeat=2):
        ranks = counts.shape[1]
        extra = {(s + n + r) % ranks for r in range(remainder[s, n])}
        assert set(np.flatnonzero(sent[s, n] > counts[s, :, n].sum() // ranks)) == extra


@hypothesis.given(counts_of_rows(), st.sampled_from(sorted(rails.STRATEGIES)))
def test_every_row_is_sent_once(counts, strategy):
    got = rails.assign(counts, strategy)
    np.testing.assert_array_equal(got.moved.sum(3), counts.transpose(0, 2, 1))
    assert got.egress.sum() == got.ingress.sum() == counts.sum()
    np.testing.assert_array_equal(got.ingress.sum(1), counts.sum((0, 1)))
    # A forwarder of a pair of nodes has one sender.
    every = np.broadcast_to(np.arange(counts.shape[1]), got.forwarder.shape)
    np.testing.assert_array_equal(np.sort(got.forwarder, axis=2), every)
    assert (got.pulled >= 0).all()


def test_remainders_do_not_pile_up_on_one_rail():
    """One row more than even to each of eight nodes: seven rails carry one of them each."""
    counts = np.zeros((8, 8, 8), np.int64)
    counts[:, 0, :] = 8 * 100 + 1
    counts[np.arange(8), :, np.arange(8)] = 0
    got = rails.assign(counts)
    assert sorted(np.unique(got.egress)) == [700, 701]
    assert sorted(np.unique(got.ingress)) == [700, 701]


@hypothesis.given(counts_of_rows())
def test_balanced_totals_differ_by_a_row_for_each_other_node(counts):
    got = rails.assign(counts)
    for load in (got.egress, got.ingress):
        assert (load.max(1) - load.min(1)).max() <= counts.shape[0] - 1


def test_fixed_keeps_owners():
    counts = np.arange(2 * 3 * 2).reshape(2, 3, 2)
    counts[np.arange(2), :, np.arange(2)] = 0
    got = rails.assign(counts, "fixed")
    np.testing.assert_array_equal(got.egress, counts.sum(2))
    assert not got.pulled.any()


def test_fusco_by_hand():
    # Node 0 sends 5, 9, 1 and node 1 sends 7, 2, 4: orders (1, 0, 2) and (0, 2, 1), the second
    # shifted by one: (1, 0, 2). So 1 pairs with 1, 0 with 0, 2 with 2.
    counts = np.zeros((2, 3, 2), np.int64)
    counts[0, :, 1], counts[1, :, 0] = (5, 9, 1), (7, 2, 4)
    got = rails.assign(counts, "fusco")
    assert got.forwarder[0, 1].tolist() == [0, 1, 2]
    assert got.ingress.tolist() == [[7, 2, 4], [5, 9, 1]]
    # Node 1 sends 4, 7, 2: order (1, 0, 2), shifted (2, 1, 0); positions of node 0: 1, 0, 2.
    counts[1, :, 0] = (4, 7, 2)
    got = rails.assign(counts, "fusco")
    assert got.forwarder[0, 1].tolist() == [1, 2, 0]
    assert got.forwarder[1, 0].tolist() == [2, 0, 1]
    assert got.ingress.tolist() == [[7, 2, 4], [1, 5, 9]]


def test_lpt_evens_out_pieces():
    counts = np.zeros((2, 4, 2), np.int64)
    counts[0, :, 1] = (8, 0, 0, 0)
    counts[1, :, 0] = (3, 3, 2, 1)
    got = rails.assign(counts, "lpt")
    assert sorted(got.egress[1]) == [1, 2, 3, 3]
    assert sorted(got.ingress[1]) == [0, 0, 0, 8]


@pytest.mark.parametrize("ranks", [4, 8])
def test_rows_go_to_the_rail_that_the_row_function_names(ranks):
    position = np.arange(23)
    rail = rails.balanced_rail(position, 3, 2, ranks)
    assert rail.tolist() == [(i + 5) % ranks for i in range(23)]


def test_spread():
    assert rails.spread(np.zeros((2, 3))) == 1
    assert rails.spread(np.array([[1, 1], [9, 3], [0, 0]])) == 1.5


@pytest.mark.parametrize(
    ("counts", "strategy", "error", "message"),
    [
        (
            np.zeros((1, 1, 1)),
            "fixed",
            TypeError,
            "counts: got dtype float64, need an integer dtype",
        ),
        (
            np.zeros((2, 3, 4), int),
            "fixed",
            ValueError,
            "counts: got shape (2, 3, 4), need [nodes, ranks of a node, nodes]",
        ),
        (
            np.ones((2, 3, 2), int),
            "fixed",
            ValueError,
            "counts: got negative rows, or rows to their own node, need rows that cross nodes",
        ),
        (
            np.zeros((2, 3, 2), int),
            "best",
            ValueError,
            "strategy: got 'best', need one of balanced, fixed, fusco, lpt",
        ),
    ],
)
def test_refusals(counts, strategy, error, message):
    with pytest.raises(error) as caught:
        rails.assign(counts, strategy)
    assert str(caught.value) == message
