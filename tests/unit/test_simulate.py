"""The simulator: fair shares, pipelines by hand, expectations, the fit, the command."""

from __future__ import annotations

import dataclasses
import json
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import run_python
from hypothesis import strategies as st

pytest.importorskip("simpy")

from jax_fusco.cli import main
from jax_fusco.simulate import fit, published, study, traffic
from jax_fusco.simulate.cluster import CONSTANTS, FUSCO_CLUSTER, Cluster
from jax_fusco.simulate.network import Chain, Stage, Transfer, duration, max_min_rates
from jax_fusco.simulate.ways import WAYS, Links, ours, seconds


def test_max_min_by_hand():
    # Two flows share link 0 of 10; one of them also crosses link 1 of 2.
    usage = np.array([[1, 0], [1, 1]])
    assert max_min_rates(usage, np.array([10.0, 2.0])).tolist() == [8, 2]
    # Three alike flows on one link; a flow on no link.
    assert max_min_rates(np.array([[3], [0]]), np.array([6.0])).tolist() == [2, math.inf]


@hypothesis.given(
    hnp.arrays(np.int64, st.tuples(st.integers(1, 5), st.just(4)), elements=st.integers(0, 3)),
    hnp.arrays(np.float64, 4, elements=st.floats(1, 100)),
)
def test_max_min_is_max_min(usage, capacity):
    """No link is overfull, and each flow has a full link where none is faster."""
    rates = max_min_rates(usage, capacity)
    used = usage.any(1)
    load = usage[used].T @ rates[used]
    assert (load <= capacity * (1 + 1e-9)).all()
    for flow in np.flatnonzero(used):
        full = (usage[flow] > 0) & (load >= capacity * (1 - 1e-9))
        fastest = [rates[used & (usage[:, c] > 0)].max() for c in np.flatnonzero(full)]
        assert fastest
        assert rates[flow] >= min(fastest) * (1 - 1e-9)


def stage(link, size, latency=0.0):
    usage = np.zeros(2)
    usage[link] = 1
    return Stage("", (Transfer(usage, size),), latency)


def test_pipeline_by_hand():
    capacity = np.array([1.0, 2.0])
    first, second = stage(0, 8), stage(1, 8)
    assert duration([[Chain((first,))], [Chain((second,))]], capacity) == pytest.approx(8 + 4)
    assert duration([[Chain((first, second))]], capacity) == pytest.approx(12)
    # Four slices: the wire never stops, and one slice of the second stage follows.
    assert duration([[Chain((first, second), 4)]], capacity) == pytest.approx(8 + 1)
    # Each slice waits for its messages.
    late = stage(0, 8, 0.5)
    assert duration([[Chain((late, second), 4)]], capacity) == pytest.approx(8 + 2 + 1)


def test_transfers_shorter_than_the_clock_can_tell_arrive():
    capacity = np.array([1.0, 1.0])
    # Seconds that pass in steps a clock at 1e6 does not have.
    late, short = stage(0, 1e6), stage(1, 1e-12)
    assert duration([[Chain((late,))], [Chain((short,), 3)]], capacity) == pytest.approx(1e6)


def test_side_by_side_shares_a_link():
    capacity = np.array([1.0, 1.0])
    chains = [Chain((stage(0, 2),)), Chain((stage(0, 6),))]
    # Both at a half until 4, then the longer alone for its other 4.
    assert duration([chains], capacity) == pytest.approx(8)
    assert duration([[Chain((stage(0, 0),))]], capacity) == 0


@pytest.mark.parametrize("groups", [None, 1, 2])
def test_expected_distinct_nodes_and_ranks(groups):
    nodes, ranks, experts, k = 4, 2, 32, 3
    rng = np.random.default_rng(0)
    tokens = 20000
    used = rng.permuted(np.tile(np.arange(nodes), (tokens, 1)), axis=1)[:, : groups or nodes]
    allowed = (used[:, :, None] * 8 + np.arange(8)).reshape(tokens, -1)
    chosen = rng.permuted(allowed, axis=1)[:, :k]
    got = traffic.chosen(nodes, ranks, experts, k, groups)
    for width, value in ((8, got[0]), (4, got[1])):
        seen = np.mean([len(set(row)) for row in (chosen // width).tolist()])
        assert value == pytest.approx(seen, rel=0.02)


def test_a_routing_counts_as_its_expectation():
    rng = np.random.default_rng(1)
    ids = np.argsort(rng.random((8, 3000, 16)), axis=2)[:, :, :3]
    counted = traffic.from_routing(ids, 4, 2, 16, classes=1)
    expected = traffic.expected(4, 2, 3000, 16, 3)
    exact = traffic.from_routing(ids, 4, 2, 16)
    assert exact.count.tolist() == [1, 1, 1, 1]
    for name in ("tokens", "pairs", "rows"):
        want = getattr(expected, name)
        np.testing.assert_allclose(getattr(exact, name).mean(), want.mean(), rtol=0.02)
        assert getattr(counted, name).shape == (1, 1)
    assert exact.spread["balanced"] < 1.01


def test_a_hot_node_receives_its_share():
    made = traffic.expected(8, 8, 100, 256, 8, groups=4, skew=1.5)
    even = traffic.expected(8, 8, 100, 256, 8, groups=4)
    received = made.received(made.rows)
    assert received[0] == pytest.approx(1.5 * even.received(even.rows)[0])
    assert made.sent(made.rows) == pytest.approx([800, 800])


def test_direct_exchange_takes_what_its_busiest_nic_takes():
    cluster = dataclasses.replace(FUSCO_CLUSTER, copy=1e9, nvlink_latency=0, nic_latency=0)
    for skew in (1.0, 1.6):
        made = traffic.expected(8, 8, 1000, 256, 8, groups=4, skew=skew)
        nic = cluster.nic * 10 / 8 * 1e9
        bytes_out = 8000 * skew * 7 / 8 * 1000
        got = seconds("no planner", made, cluster, 1000)
        assert got == pytest.approx(2 * bytes_out / nic, rel=0.02)


def test_classes_of_nodes_are_exact():
    """One class of nodes takes as long as the same nodes as classes of one."""
    together = traffic.expected(4, 8, 500, 64, 4)
    shape = (4, 4)
    apart = traffic.Traffic(
        np.ones(4, int),
        *(np.broadcast_to(m, shape) for m in (together.tokens, together.pairs, together.rows)),
    )
    for oversubscription in (1.0, 3.0):
        cluster = Cluster(4, oversubscription=oversubscription)
        for way in ("NCCL", "FUSCO", "ours"):
            one, many = (seconds(way, t, cluster, 4096) for t in (together, apart))
            assert one == pytest.approx(many, rel=1e-6), way


def test_one_node_needs_no_network():
    made = traffic.expected(1, 8, 500, 64, 4)
    slow = Cluster(1, nic=1e-6)
    for way in (*WAYS, "ours"):
        assert seconds(way, made, slow, 4096) < 1
    assert len(ours(Links(made, slow, 4096))) == 2


def test_slower_constants_never_help():
    made = published.workload("imbalanced", 4096)
    base = Cluster(8)
    fast = {way: seconds(way, made, base, 1e4) for way in (*WAYS, "ours")}
    for name in CONSTANTS:
        factor = 4 if name.endswith("latency") else 0.25
        worse = dataclasses.replace(base, **{name: getattr(base, name) * factor})
        for way in ("NCCL", "DeepEP", "FUSCO", "ours"):
            assert seconds(way, made, worse, 1e4) >= fast[way] * 0.999


def test_the_fit_finds_constants_that_made_the_times():
    truth = dataclasses.replace(
        FUSCO_CLUSTER, nvlink=300.0, nic=30.0, copy=900.0, nvlink_latency=80.0, nic_latency=20.0
    )
    cells = [c for c in published.CELLS if c.tokens in (4096, 16384)]
    times = fit.predict(truth, cells)
    made = [
        dataclasses.replace(c, milliseconds=float(t)) for c, t in zip(cells, times, strict=True)
    ]
    found = fit.fit(made)
    for name in CONSTANTS:
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.05), name


def test_published_cells():
    assert len(published.CELLS) == 45
    found = {(c.routing, c.tokens, c.way): c.milliseconds for c in published.CELLS}
    assert found["single node", 32768, "FUSCO"] == 71.5
    assert found["imbalanced", 16384, "no balancer"] == 181.5


def test_rails_table_reaches_its_target():
    entries = study.rails_table(nodes=(2, 8), ranks=(4,), tokens=1024)
    for entry in entries:
        if entry["least"] >= 256:
            assert max(entry["balanced"]) <= 1.02, entry
    assert {entry["family"] for entry in entries} == set(study.families(2, 4, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": 0}, "nodes: got 0, need at least 1 or more than 0"),
        ({"nic": 0.0}, "nic: got 0.0, need at least 1 or more than 0"),
        ({"oversubscription": 0.5}, "oversubscription: got 0.5, need at least 1 or more than 0"),
        ({"nic_latency": -1.0}, "nic_latency: got -1.0, need at least 1 or more than 0"),
    ],
)
def test_clusters_that_cannot_be(change, message):
    with pytest.raises(ValueError, match="need") as caught:
        Cluster(**({"nodes": 2} | change))
    assert str(caught.value) == message


def run(*arguments):
    return CliRunner().invoke(main, ["simulate", *map(str, arguments)])


def test_command(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(study, "NODES", (2,))
    monkeypatch.setattr(published, "ROUTINGS", ("real",))
    monkeypatch.setattr(published, "LENGTHS", (4096,))
    monkeypatch.setattr(study.rails_table, "__defaults__", ((2,), (4,), 64, lambda: None))
    done = run("--gpus", 64, "--gpus", 128, "--tokens", 512, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "out" / "simulate.json").read_text())
    assert [point["gpus"] for point in written["scale"]] == [64, 128, 64, 128]
    # What docs/simulator.md says of the fit.
    assert written["fit"]["within"] >= 35
    assert json.loads((tmp_path / "out" / "simulate_rails.json").read_text())
    assert (tmp_path / "out" / "simulate.png").stat().st_size > 1000


def test_replay(tmp_path):
    ids = np.random.default_rng(0).integers(0, 16, (8, 64, 2))
    np.savez(tmp_path / "routing.npz", expert_ids=ids, num_experts=16)
    done = run("--routing", tmp_path / "routing.npz", "--gpus-per-node", 4, "--row-bytes", 4096)
    assert done.exit_code == 0, done.output
    assert "2 nodes of 4 GPUs" in done.output
    assert [p.name for p in tmp_path.iterdir()] == ["routing.npz"]


def test_replay_of_rows_that_take_no_time_to_speak_of(tmp_path):
    ids = np.random.default_rng(0).integers(0, 16, (8, 64, 4))
    np.savez(tmp_path / "routing.npz", expert_ids=ids, num_experts=16)
    done = run("--routing", tmp_path / "routing.npz", "--gpus-per-node", 4, "--row-bytes", 100)
    assert done.exit_code == 0, done.output


def test_refusals(tmp_path):
    out = tmp_path / "out"
    for number in ("nan", "inf"):
        done = run("--oversubscription", number, "--out", out)
        assert done.output.splitlines()[-1] == (
            f"Error: Invalid value for '--oversubscription': got {number}, need a finite number"
        )
    done = run("--out", "/dev/null/out")
    assert done.output == (
        "Error: --out: got /dev/null/out, need a folder to write to (Not a directory)\n"
    )
    done = run("--gpus", 12, "--out", out)
    assert done.output == "Error: --gpus: got 12, need a multiple of the 8 GPUs of a node\n"
    path = tmp_path / "routing.npz"
    np.savez(path, expert_ids=np.zeros((4, 3, 1), int))
    done = run("--routing", path, "--gpus-per-node", 2, "--num-experts", 6, "--out", out)
    assert done.output == "Error: num_experts: got 6, need a multiple of the number of ranks (4)\n"
    for option in ("--gpus", "--tokens"):
        done = run("--routing", path, "--num-experts", 4, option, 8)
        assert done.output == f"Error: {option}: got it beside --routing, which has its own\n"
    done = run("--routing", path, "--num-experts", 4, "--out", out)
    assert done.output == (
        "Error: --gpus-per-node: got 8, need a divisor of the 4 ranks of the routing\n"
    )
    assert not out.exists()


def test_without_simpy_the_command_says_what_to_install():
    done = run_python(
        "import sys; sys.modules['simpy'] = None\n"
        "from jax_fusco.cli import main\n"
        "sys.argv = ['jax-fusco', 'simulate']\n"
        "main()"
    )
    assert done.returncode == 1
    assert "need pip install 'jax-fusco[simulate]'" in done.stderr
