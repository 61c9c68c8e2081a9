"""The ledger against literal loops over tokens; its file format, its command, its refusals."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import oracle
import pytest
from click.testing import CliRunner

import jax_fusco as jf
from jax_fusco import ledger_report
from jax_fusco.cli import main

SHAPES = [(1, 4), (2, 2), (3, 2), (2, 4), (4, 1)]


def routing(nodes, local, tokens=13, k=3, experts=None, seed=0):
    rng = np.random.default_rng(seed)
    experts = experts or 2 * nodes * local
    ids = rng.integers(-1, experts, (nodes * local, tokens, k))
    ids[0, 0] = -1
    return ids.astype(np.int32), experts


def link(source, destination, local):
    if source == destination:
        return "rank"
    return "node" if source // local == destination // local else "wire"


def literal(ids, local, experts, name):
    """Rows by link, and rows over each rank's NIC, of every single transfer."""
    ranks = len(ids)
    nodes, here = ranks // local, experts // ranks
    hops = []
    need = {}  # (source node, destination node) -> [(owner, ranks that need the token)]
    for source in range(ranks):
        for token in ids[source]:
            owners = [int(e) // here for e in token if e >= 0]
            if name == "flat":
                hops += [(source, d) for d in set(owners)]
            for node in {d // local for d in owners}:
                wanted = [d for d in owners if d // local == node]
                need.setdefault((source // local, node), []).append((source, wanted))
    if name == "ours":
        for (home, node), rows in need.items():
            for i, (source, wanted) in enumerate(rows):
                if home == node:
                    hops += [(source, d) for d in set(wanted)]
                    continue
                rail = (i + home + node) % local
                hops.append((source, home * local + rail))
                hops.append((home * local + rail, node * local + rail))
                hops += [(node * local + rail, d) for d in set(wanted)]
    found = {"rank": 0, "node": 0, "wire": 0}
    egress = np.zeros(ranks, int)
    for source, destination in hops:
        kind = link(source, destination, local)
        found[kind] += 1
        egress[source] += kind == "wire"
    assert nodes * local == ranks
    return found, egress


@pytest.mark.parametrize(("nodes", "local"), SHAPES)
@pytest.mark.parametrize("name", ["flat", "ours"])
def test_against_literal_loops(nodes, local, name):
    ids, experts = routing(nodes, local)
    found = jf.ledger(ids, (nodes, local), num_experts=experts, row_bytes=10, slice_rows=1)
    rows, egress = literal(ids, local, experts, name)
    assert found.ways[name].rows == rows
    if name == "flat":
        np.testing.assert_array_equal(found.ways[name].egress, egress)


@pytest.mark.parametrize(("nodes", "local"), SHAPES)
def test_totals(nodes, local):
    ids, experts = routing(nodes, local)
    found = jf.ledger(ids, (nodes, local), num_experts=experts, row_bytes=10, slice_rows=4)
    here = experts // (nodes * local)
    assert found.assignments == (ids >= 0).sum()
    pairs = {(r, t, e // here) for (r, t, _), e in np.ndenumerate(ids) if e >= 0}
    visits = {(r, t, d // local) for r, t, d in pairs}
    assert (found.rank_rows, found.node_rows) == (len(pairs), len(visits))
    assert found.lower_bound == sum(r // local != n for r, _, n in visits)
    ours, fusco = found.ways["ours"], found.ways["fusco"]
    assert ours.rows["wire"] == fusco.rows["wire"] == found.lower_bound
    assert fusco.padding == 0
    # FUSCO hands on one row an assignment.
    assert fusco.rows["node"] + fusco.rows["rank"] >= found.assignments
    assert ours.wire == ours.egress.sum() == ours.ingress.sum()
    assert (ours.wire % 4, len(set(ours.egress))) == (0, 1)
    ring = found.ways["ring"]
    ranks = nodes * local
    assert ring.rows["node"] + ring.rows["wire"] == ranks * (ranks - 1) * ids.shape[1]
    padded = found.ways["padded"]
    real = sum(padded.rows.values())
    assert real == found.assignments
    assert padded.wire % (ranks * ranks - nodes * local * local or 1) == 0
    assert found.num_invalid == 0


def test_fusco_by_hand():
    # Two nodes of two ranks, one expert a rank. Rank 0 sends a token to ranks 2 and 3, rank 1 one
    # to rank 2: one and one row cross, from 0 to a forwarder and from 1 to the other.
    ids = np.full((4, 1, 2), -1)
    ids[0, 0], ids[1, 0, 0] = (2, 3), 2
    found = jf.ledger(ids, (2, 2), num_experts=4, row_bytes=1).ways["fusco"]
    assert found.rows["wire"] == 2
    assert found.rows["rank"] + found.rows["node"] == 3
    assert found.egress.tolist() == [1, 1, 0, 0]
    assert found.ingress.tolist() == [0, 0, 1, 1]


def test_invalid_ids_move_nothing():
    ids = np.array([[[7, -2, 0]], [[-1, 4, 9]]])
    found = jf.ledger(ids, (2, 1), num_experts=4, row_bytes=1)
    assert (found.num_invalid, found.assignments, found.lower_bound) == (4, 1, 0)


def test_topologies_mean_the_same():
    ids, experts = routing(2, 4)
    rows = {"num_experts": experts, "row_bytes": 8}
    expected = ledger_report.document(jf.ledger(ids, (2, 4), **rows))
    one = jf.ledger(ids, jf.Topology(None, "expert", 4), **rows)
    two = jf.ledger(ids, jf.Topology(), axis_sizes={"node": 2, "expert": 4}, **rows)
    assert ledger_report.document(one) == ledger_report.document(two) == expected


def test_qwen3_on_eight_nodes_is_near_the_lower_bound():
    """128 experts, top 8, uniform: the wire carries at most 15 % more than must cross."""
    rng = np.random.default_rng(0)
    ids = np.argpartition(rng.random((64, 512, 128), np.float32), 8, axis=2)[:, :, :8]
    found = jf.ledger(ids, (8, 8), num_experts=128, row_bytes=4096, slice_rows=16)
    assert found.lower_bound <= found.ways["ours"].wire <= 1.15 * found.lower_bound
    assert found.ways["ours"].rows["wire"] == found.lower_bound


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"expert_ids": np.zeros((2, 3, 1))},
            TypeError,
            "expert_ids: got dtype float64, need an integer dtype",
        ),
        (
            {"expert_ids": np.zeros((2, 3), int)},
            ValueError,
            "expert_ids: got shape (2, 3), need [ranks, tokens, experts per token]",
        ),
        ({"topology": (3, 2)}, ValueError, "expert_ids: got 4 ranks, need 6 (3 nodes of 2)"),
        (
            {"topology": 4},
            TypeError,
            "topology: got 4, need a Topology or (nodes, ranks of a node)",
        ),
        (
            {"topology": jf.Topology()},
            ValueError,
            "axis_sizes: got None, need mesh.shape for a topology of two axes",
        ),
        (
            {"topology": jf.Topology(None, "expert", 3)},
            ValueError,
            "expert_ids: got 4 ranks, need a multiple of the 3 ranks of a node",
        ),
        (
            {"num_experts": 6},
            ValueError,
            "num_experts: got 6, need a multiple of the number of ranks (4)",
        ),
        ({"row_bytes": 0}, ValueError, "row_bytes: got 0, need an integer of at least 1"),
        ({"slice_rows": 0}, ValueError, "slice_rows: got 0, need an integer of at least 1"),
    ],
)
def test_refusals(arguments, error, message):
    given = {
        "expert_ids": np.zeros((4, 3, 1), int),
        "topology": (2, 2),
        "num_experts": 4,
        "row_bytes": 1,
    } | arguments
    with pytest.raises(error) as caught:
        jf.ledger(given.pop("expert_ids"), given.pop("topology"), **given)
    assert str(caught.value) == message


def run(*arguments):
    return CliRunner().invoke(main, ["ledger", *map(str, arguments)])


def test_command(tmp_path: pathlib.Path):
    pytest.importorskip("matplotlib")
    ids, experts = routing(2, 2)
    np.savez(tmp_path / "routing.npz", expert_ids=ids, num_experts=experts)
    out = tmp_path / "out"
    done = run(tmp_path / "routing.npz", "--ranks-per-node", 2, "--row-bytes", 64, "--out", out)
    assert done.exit_code == 0, done.output
    assert "2 nodes of 2 ranks" in done.output
    written = json.loads((out / "ledger.json").read_text())
    expected = jf.ledger(ids, (2, 2), num_experts=experts, row_bytes=64)
    assert written == ledger_report.document(expected)
    assert (out / "ledger.png").stat().st_size > 1000
    # Without --out the table is all.
    before = sorted(tmp_path.rglob("*"))
    done = run(tmp_path / "routing.npz", "--ranks-per-node", 2, "--row-bytes", 64)
    assert done.exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("nodes", "local"), SHAPES)
def test_placements_are_what_plans_make_of_them(nodes, local, tmp_path):
    """Crowded experts with copies on some ranks, absent ids and one that is no expert's."""
    ids, experts = routing(nodes, local, tokens=23)
    ids = np.where(ids >= 0, ids**2 // experts, ids)
    ids[-1, -1, 0] = 3 * experts
    ranks = nodes * local
    rng = np.random.default_rng(1)
    slots = rng.permutation([*range(experts), *rng.integers(0, 3, ranks)])
    placement = jf.Placement.of_slots(slots, num_experts=experts, num_ranks=ranks)
    rows = {"row_bytes": 8, "slice_rows": 3}
    found = jf.ledger(ids, (nodes, local), num_experts=experts, placement=placement, **rows)
    want = oracle.place(ids, slots, experts, local)
    want = jf.ledger(want, (nodes, local), num_experts=len(slots), **rows)
    assert found.num_invalid == want.num_invalid == 1
    assert ledger_report.document(found) == ledger_report.document(want)
    np.savez(tmp_path / "routing.npz", expert_ids=ids, num_experts=experts)
    placement.save(tmp_path / "placement.json")
    command = [tmp_path / "routing.npz", "--ranks-per-node", local, "--row-bytes", 8]
    command += ["--slice-rows", 3, "--placement", tmp_path / "placement.json"]
    done = run(*command, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert written == ledger_report.document(want)


def test_placements_that_do_not_fit(tmp_path):
    ids, experts = routing(2, 2)
    other = jf.Placement.identity(experts, 2)
    message = "placement: got one for 2 ranks, need one for the 4 ranks here"
    with pytest.raises(ValueError, match=message):
        jf.ledger(ids, (2, 2), num_experts=experts, row_bytes=1, placement=other)
    np.savez(tmp_path / "routing.npz", expert_ids=ids, num_experts=experts)
    other.save(tmp_path / "placement.json")
    command = tmp_path / "routing.npz", "--ranks-per-node", 2, "--row-bytes", 8, "--placement"
    done = run(*command, tmp_path / "placement.json")
    assert (done.exit_code, done.output) == (1, f"Error: {message}\n")
    done = run(*command, tmp_path / "routing.npz")
    assert done.exit_code == 1
    assert "need a JSON file that Placement.save wrote" in done.output

    layers = tmp_path / "layers.json"
    one = jf.Placement.identity(experts, 4)
    jf.Placement.of_slots([one.expert_of_slot] * 2, num_experts=experts, num_ranks=4).save(layers)
    done = run(*command, layers)
    assert done.output == f"Error: --layer: got nothing, need one of the 2 layers of {layers}\n"
    assert run(*command, layers, "--layer", 1).exit_code == 0
    done = run(*command, layers, "--layer", 2)
    assert done.output == "Error: index: got 2, need one of 2 layers\n"
    done = run(*command[:-1], "--layer", 0)
    assert done.output == "Error: --layer: got 0 and no --placement, need both or none\n"


NEED = "need an npz file with integer expert_ids [ranks, tokens, experts per token]"


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"ids": np.zeros((2, 3, 1), int)}, f"got no array named expert_ids, {NEED}"),
        ({"expert_ids": np.zeros((2, 3), int)}, f"got expert_ids of int64 (2, 3), {NEED}"),
        (
            {"expert_ids": np.zeros((2, 3, 1))},
            f"got expert_ids of float64 (2, 3, 1), {NEED}",
        ),
        ({"expert_ids": np.zeros((0, 3, 1), int)}, f"got expert_ids of int64 (0, 3, 1), {NEED}"),
        (
            {"expert_ids": np.zeros((2, 3, 1), int), "num_experts": np.zeros(2, int)},
            "got num_experts of int64 (2,), need one integer",
        ),
        (
            {"expert_ids": np.array([[[None]]], object)},
            f"got no readable routing (Object arrays cannot be loaded when allow_pickle=False), "
            f"{NEED}",
        ),
    ],
)
def test_files_that_hold_something_else(tmp_path, arrays, reason):
    path, out = tmp_path / "routing.npz", tmp_path / "out"
    np.savez(path, **arrays)
    done = run(path, "--ranks-per-node", 2, "--row-bytes", 64, "--out", out, "--num-experts", 4)
    assert (done.exit_code, done.output) == (1, f"Error: {path}: {reason}\n")
    assert not out.exists()


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped", "npy"])
def test_corrupt_files(tmp_path, damage):
    path, out = tmp_path / "routing.npz", tmp_path / "out"
    np.savez_compressed(path, expert_ids=np.arange(600).reshape(2, 100, 3) % 4)
    good = path.read_bytes()
    middle = len(good) // 2
    if damage == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros((2, 3, 1), int))
    else:
        bad = {
            "empty": b"",
            "text": b"no routing\n",
            "truncated": good[:middle],
            "flipped": good[: middle - 20]
            + bytes(255 - b for b in good[middle - 20 : middle + 20])
            + good[middle + 20 :],
        }
        path.write_bytes(bad[damage])
    done = run(path, "--ranks-per-node", 2, "--row-bytes", 64, "--num-experts", 4, "--out", out)
    assert done.exit_code == 1
    assert done.output.startswith(f"Error: {path}: got no readable routing (")
    assert done.output.endswith(f"), {NEED}\n")
    if damage not in ("truncated", "flipped"):
        assert "(it is no npz file)" in done.output
    assert done.output.count("\n") == 1
    assert not out.exists()


def test_commands_own_refusals(tmp_path):
    path = tmp_path / "routing.npz"
    np.savez(path, expert_ids=np.zeros((4, 3, 1), int))
    sizes = ("--ranks-per-node", 2, "--row-bytes", 8, "--num-experts", 4)
    done = run(path, *sizes, "--out", "/dev/null/out")
    assert done.output == (
        "Error: --out: got /dev/null/out, need a folder to write to (Not a directory)\n"
    )
    done = run(path, "--ranks-per-node", 2, "--row-bytes", 8)
    assert done.output == (
        f"Error: --num-experts: got nothing, and {path} has no num_experts, need a number\n"
    )
    np.savez(tmp_path / "says.npz", expert_ids=np.zeros((4, 3, 1), int), num_experts=8)
    done = run(tmp_path / "says.npz", *sizes)
    assert done.output == (
        f"Error: --num-experts: got 4, need the 8 that {tmp_path / 'says.npz'} says\n"
    )
    done = run(path, "--ranks-per-node", 3, "--row-bytes", 8, "--num-experts", 4)
    assert done.output == (
        "Error: --ranks-per-node: got 3, need a divisor of the 4 ranks of the routing\n"
    )
    done = run(tmp_path / "none.npz", "--ranks-per-node", 2, "--row-bytes", 8)
    assert done.exit_code == 1
    assert "none.npz: got no readable routing" in done.output
