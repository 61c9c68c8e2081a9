"""The benchmark's rivals against literal NumPy loops, its routings, its report and its command."""

from __future__ import annotations

import itertools
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from jax_fusco.bench import limit, measure, picture, presets, report, routing
from jax_fusco.bench.cases import OPS, Case, Fusco, Spec
from jax_fusco.bench.check import Oracle, WrongResult
from jax_fusco.bench.rivals import Padded, Ring, Rival, Shuffle, Sizes, family_of, rivals_for
from jax_fusco.bench.shapes import SHAPES, Shape
from jax_fusco.bench.worker import Worker
from jax_fusco.cli import main

TINY = Shape("tiny", 6, 8, 3, 8, 20)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def make_case(name: str, devices: int = 4, tokens: int = 5) -> Case:
    return Case(Spec("tiny", devices, tokens, name, tuple(OPS)))


def every_rival(sizes: Sizes) -> list[Rival]:
    return list(dict.fromkeys(rival for op in OPS for rival in rivals_for(op, sizes)))


def literal_dispatch(case: Case) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows of every rank's groups, and group sizes: by expert, then source rank, token and j."""
    s, x = case.sizes, np.asarray(case.x).astype(np.float32)
    buffers, sizes = [], []
    for rank in range(s.ranks):
        rows = []
        for expert in range(rank * s.local_experts, (rank + 1) * s.local_experts):
            before = len(rows)
            for token, experts in enumerate(case.host_ids):
                rows += [x[token] for e in experts if e == expert]
            sizes.append(len(rows) - before)
        buffers.append(np.array(rows).reshape(-1, s.features))
    return buffers, np.array(sizes)


def literal_combine(case: Case) -> np.ndarray:
    """Weighted sums of each token's rows of `case.y`, in float64."""
    s, y = case.sizes, np.asarray(case.y).astype(np.float64)
    weights, out = np.asarray(case.weights), np.zeros(case.x.shape)
    for rank in range(s.ranks):
        row = rank * s.capacity
        for expert in range(rank * s.local_experts, (rank + 1) * s.local_experts):
            for token, experts in enumerate(case.host_ids):
                for j in np.flatnonzero(experts == expert):
                    out[token] += weights[token, j] * y[row]
                    row += 1
    return out


def close(got: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(got).astype(np.float64), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", routing.ROUTINGS)
@pytest.mark.usefixtures("tiny")
def test_everyone_shuffles_like_the_literal_loops(name: str) -> None:
    case = make_case(name)
    buffers, group_sizes = literal_dispatch(case)
    combined = literal_combine(case)
    plans: dict[type, Any] = {}
    for shuffle in (Fusco(case.sizes, "zero", "xla"), Ring(case.sizes), Padded(case.sizes)):
        plans[type(shuffle)] = plan = case.function("plan", shuffle)(case.ids)
        np.testing.assert_array_equal(case.jit(shuffle.group_sizes)(plan), group_sizes)
    # Formulations differ in how they are compiled, not in what they do with a routing.
    for op in ("dispatch", "combine"):
        rivals = rivals_for(op, case.sizes) if name == "zipf" else rivals_for("plan", case.sizes)
        shuffles: list[Shuffle] = [Fusco(case.sizes, "zero", "xla"), *rivals]
        for shuffle in shuffles:
            arguments = case.arguments(op, plans[type(shuffle)])
            got = np.asarray(case.function(op, shuffle)(*arguments)).astype(np.float32)
            if op == "combine":
                close(got, combined)
                continue
            for rank, expected in enumerate(buffers):
                first = rank * case.sizes.capacity
                np.testing.assert_array_equal(got[first : first + len(expected)], expected)


@pytest.mark.usefixtures("tiny")
def test_gradients_of_rivals_are_those_of_the_sum() -> None:
    case = make_case("uniform")
    x, g = (np.asarray(a).astype(np.float64) for a in (case.x, case.g))
    weights = np.asarray(case.weights)
    total = weights.sum(1, keepdims=True)
    dots = np.broadcast_to((x * g).sum(1, keepdims=True), weights.shape)
    for rival in rivals_for("train", case.sizes):
        train = case.function("train", rival)
        out, dx, dweights = train(*case.arguments("train", None))
        close(out, x * total)
        close(dx, g * total)
        close(dweights, dots)


@pytest.mark.usefixtures("tiny")
def test_oracle_accepts_right_and_refuses_wrong_results() -> None:
    case = make_case("uniform")
    oracle, ring = Oracle(case), Ring(case.sizes)
    plan = case.function("plan", ring)(case.ids)
    for op in ("dispatch", "combine", "forward"):
        result = case.function(op, ring)(*case.arguments(op, plan))
        oracle.check(op, ring, result, plan)
        with pytest.raises(WrongResult, match="ring/rows/gather/psum_scatter: "):
            oracle.check(op, ring, case.put(np.roll(np.asarray(result), 1, 0)), plan)
    with pytest.raises(WrongResult, match="group sizes"):
        oracle.groups("ring", plan.group_sizes + 1)
    results = case.function("train", ring)(*case.arguments("train", plan))
    oracle.check("train", ring, results, plan)
    for i, what in enumerate(("outputs", "gradient of x", "gradient of weights")):
        wrong = [*results]
        wrong[i] = case.put(np.roll(np.asarray(results[i]), 1, 0))
        with pytest.raises(WrongResult, match=what):
            oracle.check("train", ring, wrong, plan)


@pytest.mark.usefixtures("tiny")
def test_wrong_results_end_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker compares what it times, every contestant's plan and result."""
    case = make_case("uniform")
    worker, right = Worker(case), case.function

    def turned(op: str, shuffle: Shuffle) -> Any:
        step: Any = right(op, shuffle)
        if op == "plan" or isinstance(shuffle, Fusco):
            return step
        return lambda *arguments: case.put(np.roll(np.asarray(step(*arguments)), 1, 0))

    with monkeypatch.context() as patch:
        patch.setattr(case, "function", turned)
        with pytest.raises(WrongResult, match=r"ring.*: dispatched rows"):
            list(worker.run("dispatch"))
    worker.plans.clear()
    monkeypatch.setattr(Ring, "group_sizes", lambda self, plan: plan.group_sizes + 1)
    with pytest.raises(WrongResult, match=r"ring.*: group sizes"):
        list(worker.run("dispatch"))
    worker.limit.close()


@pytest.mark.usefixtures("tiny")
def test_stand_in_keeps_the_rows_in_memory() -> None:
    """XLA would otherwise merge a rival's gathers, and time a shuffle that makes no rows."""
    case = make_case("uniform")
    step: Any = case.function("forward", Padded(case.sizes))
    text = step.lower(*case.arguments("forward", None)).compile().as_text()
    assert " while(" in text


@pytest.mark.usefixtures("tiny")
def test_layer_is_the_same_for_everyone() -> None:
    case = make_case("uniform")
    oracle = Oracle(case)
    for shuffle in (Fusco(case.sizes, "zero", "xla"), Ring(case.sizes), Padded(case.sizes)):
        result = case.function("layer", shuffle)(*case.arguments("layer", None))
        oracle.check("layer", shuffle, result, None)
        with pytest.raises(WrongResult, match="outputs of the layer"):
            oracle.check("layer", shuffle, case.put(np.roll(np.asarray(result), 1, 0)), None)
        assert np.all(np.isfinite(np.asarray(result).astype(np.float32)))


def test_routings() -> None:
    rng = np.random.default_rng(0)
    for make in routing.ROUTINGS.values():
        ids = make(rng, 64, 4, 32, 4)
        assert ids.shape == (64, 4)
        assert ids.dtype == np.int32
        assert all(len(set(row)) == 4 for row in ids)
        assert ids.min() >= 0
        assert ids.max() < 32
    assert routing.one_rank(rng, 64, 4, 32, 4).max() < 8
    skewed = np.bincount(routing.zipf(rng, 4096, 2, 32, 4).ravel(), minlength=32)
    assert skewed.max() > 4 * np.median(skewed)
    load, pairs = routing.loads(np.array([[0, 1], [2, 3], [0, 3], [0, 0]]), 4, 2)
    np.testing.assert_array_equal(pairs, [[2, 2], [3, 1]])
    np.testing.assert_array_equal(load, [5, 3])


@pytest.mark.parametrize("tokens", [100, 1 << 17, (1 << 17) + 128, 5 * 5760])
def test_copies_write_every_byte(tokens: int) -> None:
    copies = limit.CopyLimit(tokens, 3)
    try:
        for op in ("dispatch", "combine", "forward", "train"):
            assert copies.seconds(op) > 0
            assert copies.seconds(op, "once") > 0
        for key, ways in limit.COPIES.items():
            for block, copy in itertools.product((1000, 1 << 20), ways):
                assert np.all(copies.copy(key, copy, block) == 1)
    finally:
        copies.close()


def test_contestants_run_in_turn() -> None:
    order: list[str] = []

    def runner(name: str) -> Any:
        return lambda: order.append(name) or 0.001 * len(order)

    def before() -> None:
        order.append("-")

    timings = measure.in_turn({name: runner(name) for name in "abc"}, 2, before)
    turns = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert sorted(turns[:3]) == sorted(turns[3:]) == ["a-a", "b-b", "c-c"]
    ends = [3 * i + 3 for i, turn in enumerate(turns) if turn == "a-a"]
    assert timings["a"].runs == pytest.approx(ends)
    assert timings["a"].median == pytest.approx(sum(ends) / 2)


def test_added_memory_sees_the_result() -> None:
    added = measure.added_memory(lambda: jnp.ones(1 << 23), ())
    assert added is None or added > (1 << 24)


def test_families() -> None:
    sizes = Sizes(4, 5, 3, 8, 6, 16, 8)
    assert {family_of(r.name) for r in every_rival(sizes)} == {
        "ring",
        "padded",
        "ring/helped",
        "padded/helped",
    }
    assert family_of("jax_fusco/zero") == "jax_fusco/zero"


def result(**medians: float) -> dict[str, Any]:
    timings = {
        name.replace("__", "/"): measure.Timing((value,)).to_json()
        for name, value in medians.items()
    }
    return {"timings": timings, "tried_ms": {}, "memory": {"peak_ratio": {"jax_fusco": 1.01}}}


def test_summary_counts_the_best_of_each_family(tmp_path: pathlib.Path) -> None:
    spec = vars(presets.quick_cases()[0])
    dispatch = result(jax_fusco=10.0, ring__a=50.0, ring__b=40.0, padded__a=60.0, limit=9.0)
    case = {"spec": spec, "ops": {"plan": result(jax_fusco=0.2), "dispatch": dispatch}}
    short = report.summary(case)
    assert short["dispatch"] == {
        "ours_ms": 10.0,
        "over_ring": 4.0,
        "over_padded": 6.0,
        "of_limit": 0.9,
        "peak_over_needed": 1.01,
    }
    assert short["plan"]["of_dispatch"] == 0.02
    assert json.dumps(report.document([case], "command"))
    pytest.importorskip("matplotlib")
    assert picture.draw([case], tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "gpt"], "--shape: got 'gpt', need one of qwen3-30b-a3b, "),
        (["--routing", "best"], "--routing: got 'best', need one of uniform, zipf, one-rank"),
        (["--op", "sort"], "--op: got 'sort', need one of plan, dispatch, "),
        (["--devices", "3"], "--devices: got 3, need a divisor of the 128 experts of "),
        (["--tokens", "0"], "--tokens: got 0, need at least 1 token a device"),
        (["--implementation", "best"], "--implementation: got 'best', need fused or xla"),
        (["--quick", "--op", "plan"], "--quick: got other choices too, need it alone"),
    ],
)
def test_bad_choices_are_one_sentence(arguments: list[str], message: str) -> None:
    outcome = CliRunner().invoke(main, ["bench", *arguments])
    assert outcome.exit_code == 1
    assert outcome.output.startswith(f"Error: {message}")
    assert len(outcome.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("factor", "reason"),
    [
        ("-1", "-1.0 is not in the range x>0."),
        ("0", "0.0 is not in the range x>0."),
        ("nan", "got nan, need a finite number"),
    ],
)
def test_capacities_that_cannot_be_start_nothing(
    factor: str, reason: str, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out"
    outcome = CliRunner().invoke(main, ["bench", "--capacity-factor", factor, "--out", str(out)])
    assert outcome.exit_code == 2
    assert outcome.output.splitlines()[-1] == (
        f"Error: Invalid value for '--capacity-factor': {reason}"
    )
    assert not out.exists()


@pytest.mark.parametrize("command", ["bench", "bench-grouped-matmul"])
def test_a_folder_that_cannot_be_made_is_said_first(command: str) -> None:
    outcome = CliRunner().invoke(main, [command, "--out", "/dev/null/out"])
    assert outcome.exit_code == 1
    assert outcome.output == (
        "Error: --out: got /dev/null/out, need a folder to write to (Not a directory)\n"
    )


def test_help_lists_every_name() -> None:
    outcome = CliRunner().invoke(main, ["bench", "--help"])
    assert outcome.exit_code == 0
    for name in (*SHAPES, *routing.ROUTINGS, *OPS):
        assert name in outcome.output


def test_import_starts_no_backend() -> None:
    code = (
        "import jax_fusco.bench.run, jax_fusco.bench.worker, jax_fusco.cli\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    root = pathlib.Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=120)


def test_a_small_run_writes_its_results(tmp_path: pathlib.Path) -> None:
    arguments = "--shape olmoe-1b-7b --tokens 4 --op dispatch --repeats 1 --implementation xla"
    outcome = CliRunner().invoke(main, ["bench", *arguments.split(), "--out", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    written = json.loads((tmp_path / "results.json").read_text())
    assert set(written) == {"command", "date", "machine", "environment", "versions", "cases"}
    (case,) = written["cases"]
    assert case["spec"]["tokens"] == 4
    assert case["rows"] == 4 * 4 * 8
    timings = case["ops"]["dispatch"]["timings"]
    assert {family_of(name) for name in timings} == {
        "jax_fusco",
        "jax_fusco/zero",
        "ring",
        "padded",
    }
    assert len(jax.devices()) >= 4  # this process keeps its own devices
