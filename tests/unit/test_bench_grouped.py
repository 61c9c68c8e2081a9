"""The benchmark of grouped matmuls: its cases, its check, its files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from jax_fusco.bench import grouped
from jax_fusco.bench.shapes import SHAPES, Shape
from jax_fusco.cli import main


@pytest.mark.parametrize("kind", grouped.GROUPS)
def test_groups_hold_all_rows(kind):
    sizes = grouped.group_sizes(kind, 5, 103)
    assert sizes.sum() == 103
    assert sizes.dtype == np.int32
    assert (sizes.max() > 2 * sizes.min()) == (kind == "zipf")


def test_unknown_shape():
    outcome = CliRunner().invoke(main, ["bench-grouped-matmul", "--shape", "gpt-2"])
    assert outcome.exit_code == 1
    assert outcome.output == f"Error: --shape: got 'gpt-2', need one of {', '.join(SHAPES)}\n"


def test_wrong_results_end_the_benchmark(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", Shape("tiny", 8, 4, 2, 6, 64))
    monkeypatch.setattr("jax_fusco.grouped_matmul", lambda rows, kernel, sizes: rows @ kernel[0])
    with pytest.raises(RuntimeError, match="forward: group 1 is off by"):
        grouped.run_case(grouped.Spec("tiny", "first", "float32", 2, 32), 1)


def test_command_writes_what_it_measured(monkeypatch, tmp_path):
    monkeypatch.setitem(SHAPES, "tiny", Shape("tiny", 8, 4, 2, 6, 64))
    arguments = [
        "--shape",
        "tiny",
        "--dtype",
        "float32",
        "--experts",
        "2",
        "--rows",
        "64",
        "--repeats",
        "1",
    ]
    outcome = CliRunner().invoke(main, ["bench-grouped-matmul", *arguments, "--out", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    assert "tiny, second product: 64 rows x [2, 6, 8], float32" in outcome.output
    found = json.loads((tmp_path / "grouped_matmul.json").read_text())
    assert [case["spec"]["product"] for case in found["cases"]] == ["first", "second"]
    for case in found["cases"]:
        assert list(case["ops"]) == list(grouped.OPS)
        for result in case["ops"].values():
            assert set(result["gflops"]) == {"dense", "balanced", "zipf", "ragged_dot"}
    assert (tmp_path / "grouped_matmul.png").stat().st_size > 1000
