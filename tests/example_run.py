"""A small run of examples/train_moe_lm.py, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

SCRIPT = Path(__file__).parents[1] / "examples" / "train_moe_lm.py"
STEPS = 60
# Room for everything, so that another mesh drops no other assignments.
TINY = [
    *("--layers=1", "--width=32", "--heads=2", "--experts=8", "--expert-width=32", "--dropout=0.1"),
    *("--context=32", "--batch=8", "--eval-every=20", "--eval-batches=1", "--sample-bytes=24"),
    *("--warmup=4", "--learning-rate=0.01", "--dropless", "--max-minutes=0"),
    f"--steps={STEPS}",
]


def write_text(folder: Path) -> Path:
    """Small, predictable files."""
    for i in range(20):
        lines = [f"def f{i}_{j}(x):\n    return x + {j}\n" for j in range(20)]
        (folder / f"m{i:02}.py").write_text("\n".join(lines))
    return folder


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in metrics(output) if "loss" in line]


def checkpoint(output: Path) -> dict[str, np.ndarray]:
    """The arrays of the last checkpoint by their paths."""
    folder = (output / "checkpoints" / str(STEPS) / "state").absolute()
    with ocp.StandardCheckpointer() as reader:
        shapes = reader.metadata(folder).item_metadata
        empty = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
        leaves = jax.tree.leaves_with_path(reader.restore(folder, empty))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
