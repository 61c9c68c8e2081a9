"""jax-fusco placement: what it reads, prints, writes and refuses."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from click.testing import CliRunner

import jax_fusco as jf
from jax_fusco.cli import main


def routing(seed: int = 0, tokens: int = 900) -> tuple[np.ndarray, np.ndarray]:
    """(ids [4, tokens, 2], logits [4, tokens, 8]): experts e and 7 - e go together."""
    rng = np.random.default_rng(seed)
    logits = rng.gumbel(size=(4, tokens, 8)).astype(np.float32)
    pair = rng.integers(0, 4, (4, tokens, 1))
    for expert in (pair, 7 - pair):
        np.put_along_axis(logits, expert, np.take_along_axis(logits, expert, 2) + 4, 2)
    return np.argsort(-logits, axis=2)[:, :, :2].astype(np.int32), logits


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, ["placement", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.output


def refusal(*arguments: object) -> str:
    done = CliRunner().invoke(main, ["placement", *map(str, arguments)])
    assert done.exit_code == 1
    return done.output.removeprefix("Error: ").strip()


def test_a_routing_with_logits(tmp_path: pathlib.Path):
    pytest.importorskip("matplotlib")
    ids, logits = routing()
    np.savez(tmp_path / "routing.npz", expert_ids=ids, num_experts=8, logits=logits)
    out = tmp_path / "out"
    printed = run(tmp_path / "routing.npz", "--ranks-per-node", 2, "--row-bytes", 100, "--out", out)
    assert "3600 tokens to 2 of 8 experts each; nodes: 2 of 2 ranks" in printed
    assert "search, at most 1 rank, by similarity" in printed
    report = json.loads((out / "report.json").read_text())
    traffic = {name: each["ranks_per_token"][0] for name, each in report["traffic"].items()}
    assert traffic["search"] < 1.4 < 1.7 < traffic["today"]
    assert traffic["search, at most 1 rank, by router"] == pytest.approx(1)
    assert report["traffic"]["today"]["bytes_per_token"]["wire"][0] == pytest.approx(
        50 * report["traffic"]["today"]["nodes_per_token"][0]
    )
    placement = jf.Placement.from_file(out / "placement.json")
    ranks = placement.rank_of_expert
    assert (ranks[:4] == ranks[:3:-1]).all()
    assert report["expert_of_slot"]["search"] == placement.expert_of_slot.tolist()
    assert (out / "placement.png").stat().st_size > 10_000


def test_statistics_of_layers(tmp_path: pathlib.Path):
    stats = jf.RoutingStats.zeros(8, 2)
    stats = stats.update(routing()[0], 0).update(np.arange(3000).reshape(-1, 1) % 8, 1)
    stats.save(tmp_path / "stats.npz")
    assert refusal(tmp_path / "stats.npz") == (
        f"--ranks: got nothing, and {tmp_path / 'stats.npz'} has no ranks, need a number"
    )
    out = tmp_path / "out"
    printed = run(tmp_path / "stats.npz", "--ranks", 4, "--out", out, "--method", "occult")
    assert "in 2 layers" in printed
    placement = jf.Placement.from_file(out / "placement.json")
    assert placement.layer(1).is_identity
    assert not placement.layer(0).is_identity


def test_replicas_and_groups(tmp_path: pathlib.Path):
    path = tmp_path / "routing.npz"
    np.savez(path, expert_ids=routing()[0])
    out = tmp_path / "out"
    run(path, "--num-experts", 8, "--slots", 3, "--out", out)
    assert jf.Placement.from_file(out / "placement.json").num_slots == 3
    assert "Nothing to gain: leave the experts where they are" in run(
        path, "--num-experts", 8, "--groups", 4
    )


def test_rows_are_no_bytes_and_ids_that_name_nothing_are_counted(tmp_path: pathlib.Path):
    path = tmp_path / "routing.npz"
    ids = routing()[0]
    ids[0, :7, 0] = 8
    ids[1, :5, 1] = -1
    np.savez(path, expert_ids=ids, num_experts=8)
    printed = run(path, "--method", "occult", "--load-weight", 0)
    assert "8 experts each (12 ids name none);" in printed
    assert "One dispatch, rows per token" in printed
    assert " B " not in printed
    assert " B " in run(path, "--row-bytes", 2)


def test_refusals(tmp_path: pathlib.Path):
    path = tmp_path / "routing.npz"
    ids, logits = routing()
    assert refusal(path).endswith(
        "need an npz file with expert_ids, or one that RoutingStats.save wrote"
    )
    np.savez(path, expert_ids=ids)
    assert refusal(path) == (
        f"--num-experts: got nothing, and {path} has no num_experts, need a number"
    )
    np.savez(path, expert_ids=ids, num_experts=8, logits=logits[:, :, :5])
    assert refusal(path) == (
        f"{path}: got logits of float32 (4, 900, 5), need a floating dtype and (4, 900, 8)"
    )
    np.savez(path, expert_ids=ids, num_experts=8)
    assert refusal(path, "--out", "/dev/null/out") == (
        "--out: got /dev/null/out, need a folder to write to (Not a directory)"
    )
    done = CliRunner().invoke(main, ["placement", str(path), "--load-weight", "nan"])
    assert done.output.splitlines()[-1] == (
        "Error: Invalid value for '--load-weight': got nan, need a finite number"
    )
    assert refusal(path, "--ranks", 3) == (
        "num_experts: got 8, need a multiple of the number of ranks (3)"
    )
    assert refusal(path, "--slots", 1) == (
        "num_slots: got 1, need at least 2 for 8 experts on 4 ranks"
    )
    assert refusal(path, "--num-experts", 4) == f"--num-experts: got 4, need the 8 that {path} says"
    np.savez(path, token_limbs=np.zeros(2, np.uint32))
    assert "got no array named load_limbs" in refusal(path)
