"""The benchmark of experts' places: what it counts, what it compares, its files, its refusals."""

from __future__ import annotations

import json
import pathlib
from types import SimpleNamespace

import click
import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import expert_layer  # type: ignore[import-not-found]
    import expert_traffic  # type: ignore[import-not-found]

    return SimpleNamespace(layer=expert_layer, traffic=expert_traffic)


def test_rows_of_plans_are_those_of_a_literal_count(bench):
    ids = np.random.default_rng(0).integers(-1, 8, (4, 20, 3)).astype(np.int32)
    want = {kind: {"sent": 0, "self": 0} for kind in ("assignment", "token")}
    for rank, tokens in enumerate(ids):
        for token in tokens:
            owners = [int(e) // 2 for e in token if e >= 0]
            for kind, there in (("assignment", owners), ("token", set(owners))):
                for owner in there:
                    want[kind]["self" if owner == rank else "sent"] += 1 / 80
    found = bench.layer.count_rows(ids, 8)
    for kind, numbers in want.items():
        assert found[kind] == pytest.approx(numbers)


def test_a_study_of_planted_experts(bench, tmp_path):
    routed = bench.layer.drawn("planted", 4, 256, experts=16, k=3)
    facts, cases = bench.layer.study(routed, 8, 4, 1)
    assert list(cases) == list(bench.layer.CASES)
    ranks = [case["ranks_per_token"] for case in cases.values()]
    assert ranks[1] < 1.05 * facts["planted_ranks_per_token"] < 0.7 * ranks[0]
    assert ranks[4] == 1 < ranks[3] <= min(2, ranks[1])
    assert not cases["today"]["moved"]
    assert cases["placed"]["moved"]
    for case in cases.values():
        rows = case["rows"]["token"]
        assert rows["sent"] + rows["self"] == pytest.approx(case["ranks_per_token"])
        assert all(len(each) == 1 for each in case["milliseconds"].values())
    row = {"shape": "tiny", "ranks": 8, "routing": "zipf", "bytes": {"assignment": 2, "token": 1}}
    rows = [{**row, "rows": cases["today"]["rows"]}]
    bench.traffic.report(rows, {"planted": (facts, cases)})
    bench.traffic.draw(rows, {"planted": (facts, cases)}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    json.dumps((facts, cases))


def test_experts_without_structure_stay(bench):
    cases = bench.layer.cases_of(bench.layer.drawn("unstructured", 4, 256, experts=16, k=3))
    for name in ("placed", "placed for ranks alone"):
        assert cases[name]["slots"].tolist() == list(range(16))


def test_results_that_differ_end_it(bench):
    routed = bench.layer.drawn("planted", 2, 16, experts=4, k=2)
    cases = bench.layer.cases_of(routed)
    layer = bench.layer.Layer(routed, bench.layer.fullest(cases), 8, 4)
    for case in cases.values():
        case["arguments"] = layer.arguments(case["ids"], case["weights"], case["slots"])
    bench.layer.compare(layer, cases)
    wrong = cases["placed"]["ids"] ^ 1
    cases["placed"]["arguments"] = layer.arguments(
        wrong, cases["placed"]["weights"], cases["placed"]["slots"]
    )
    with pytest.raises(AssertionError, match=r"placed: moved: differs by"):
        bench.layer.compare(layer, cases)


def test_a_routing_that_does_not_fit(bench, tmp_path):
    need = "need what examples/place_moe_lm.py writes"
    path = tmp_path / "routing.npz"
    np.savez(path, expert_ids=np.zeros((4, 8, 2), np.int32))
    with pytest.raises(click.ClickException) as error:
        bench.layer.recorded(path, 4, 4)
    assert error.value.message == f"--routing: {path} holds no expert_ids and logits, {need}"
    np.savez(path, expert_ids=np.zeros((4, 8, 2), np.int32), logits=np.zeros((4, 8, 6)))
    assert bench.layer.recorded(path, 4, 4).scores.shape == (4, 4, 6)
    with pytest.raises(click.ClickException) as error:
        bench.layer.recorded(path, 5, 4)
    assert error.value.message == ("--routing: got logits (4, 8, 6), need [4, 10 or more, experts]")
