"""Times grouped matmuls in turn with one dense product of as many operations, and with
`jax.lax.ragged_dot`."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

import jax_fusco as jf
from jax_fusco import blas
from jax_fusco.bench import measure, report
from jax_fusco.bench.shapes import SHAPES

OPS = ("forward", "d rows", "d kernel")
GROUPS = ("balanced", "zipf")
RAGGED_SHARE = 8
"""XLA:CPU multiplies every row with every expert in `ragged_dot`: it gets a part of the rows."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """One product of an expert layer: the first (`n` features to both projections) or second."""

    shape: str
    product: str
    dtype: str
    experts: int
    rows: int

    @property
    def sizes(self) -> tuple[int, int]:
        """(n, m) of one kernel."""
        model = SHAPES[self.shape]
        if self.product == "first":
            return model.features, 2 * model.expert_features
        return model.expert_features, model.features

    @property
    def title(self) -> str:
        n, m = self.sizes
        return (
            f"{self.shape}, {self.product} product: {self.rows} rows x [{self.experts}, {n}, {m}], "
            f"{self.dtype}"
        )


def specs(
    shapes: Sequence[str], dtypes: Sequence[str], experts: Sequence[int], rows: int
) -> list[Spec]:
    """Both products of every combination."""
    for name in shapes:
        if name not in SHAPES:
            raise ValueError(f"--shape: got {name!r}, need one of {', '.join(SHAPES)}")
    return [
        Spec(shape, product, dtype, count, rows)
        for shape in shapes
        for count in experts
        for dtype in dtypes
        for product in ("first", "second")
    ]


def group_sizes(kind: str, experts: int, rows: int) -> np.ndarray:
    """Equal groups, or the n-th in proportion to 1/n, in a shuffled order."""
    share = np.ones(experts) if kind == "balanced" else 1 / np.arange(1, experts + 1)
    sizes = np.floor(share / share.sum() * rows).astype(np.int32)
    sizes[0] += rows - sizes.sum()
    return np.random.default_rng(0).permutation(sizes)


def _dense(op: str) -> Callable[..., jax.Array]:
    contract = {"forward": ((1,), (0,)), "d rows": ((1,), (1,)), "d kernel": ((0,), (0,))}[op]
    return jax.jit(lambda a, b: lax.dot_general(a, b, (contract, ((), ()))))


def _grouped(op: str, product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def run(rows: Any, kernel: Any, g: Any, sizes: Any) -> jax.Array:
        if op == "forward":
            return product(rows, kernel, sizes)
        if op == "d rows":
            return jax.vjp(lambda rows: product(rows, kernel, sizes), rows)[1](g)[0]
        return jax.vjp(lambda kernel: product(rows, kernel, sizes), kernel)[1](g)[0]

    return jax.jit(run)


def _check(op: str, out: jax.Array, rows: Any, kernel: Any, g: Any, sizes: np.ndarray) -> None:
    """Compares a column of each group with NumPy."""
    begin = 0
    for group, size in enumerate(sizes):
        part = slice(begin, begin + size)
        x, k, d = (np.asarray(v, np.float32) for v in (rows[part], kernel[group], g[part]))
        if op == "d kernel":
            found, expected = out[group, :, 0], x.T @ d[:, 0]
        else:
            found = out[part, 0]
            expected = x @ k[:, 0] if op == "forward" else d @ k[0]
        scale = np.abs(expected).max(initial=1e-6)
        error = np.abs(np.asarray(found, np.float32) - expected).max(initial=0) / scale
        if not error < 1e-2:
            raise RuntimeError(f"{op}: group {group} is off by {error:.3g} of its largest value")
        begin += size


def run_case(spec: Spec, repeats: int) -> dict[str, Any]:
    """Times the three products of one case: GF/s of each contestant, and ours over the others."""
    n, m = spec.sizes
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32), spec.dtype)

    rows, g, kernel = normal(spec.rows, n), normal(spec.rows, m), normal(spec.experts, n, m)
    few = max(spec.experts, spec.rows // RAGGED_SHARE)
    flops = 2.0 * spec.rows * n * m
    result: dict[str, Any] = {"spec": {**vars(spec), "n": n, "m": m}, "ops": {}}
    for op in OPS:
        pair = {"forward": (rows, kernel[0]), "d rows": (g, kernel[0]), "d kernel": (rows, g)}[op]
        calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {"dense": (_dense(op), pair)}
        ours = _grouped(op, jf.grouped_matmul)
        for kind in GROUPS:
            sizes = group_sizes(kind, spec.experts, spec.rows)
            _check(op, ours(rows, kernel, g, jnp.asarray(sizes)), rows, kernel, g, sizes)
            calls[kind] = ours, (rows, kernel, g, jnp.asarray(sizes))
        few_sizes = jnp.asarray(group_sizes("balanced", spec.experts, few))
        ragged = _grouped(op, lax.ragged_dot), (rows[:few], kernel, g[:few], few_sizes)
        for step, arguments in (*calls.values(), ragged):
            jax.block_until_ready(step(*arguments))
        timings = measure.in_turn(
            {name: functools.partial(measure.seconds, *call) for name, call in calls.items()},
            repeats,
            lambda: None,
        )
        rate = {name: flops / timing.median / 1e6 for name, timing in timings.items()}
        rate["ragged_dot"] = flops * few / spec.rows / measure.seconds(*ragged) / 1e9
        result["ops"][op] = {
            "gflops": {name: round(value, 1) for name, value in rate.items()},
            "timings": {name: timing.to_json() for name, timing in timings.items()},
            "over_dense": {kind: round(_ratio(timings, kind), 3) for kind in GROUPS},
        }
    return result


def _ratio(timings: dict[str, measure.Timing], kind: str) -> float:
    """Median over the rounds of the dense product's time over ours of the same round."""
    pairs = zip(timings["dense"].runs, timings[kind].runs, strict=True)
    return float(np.median([dense / ours for dense, ours in pairs]))


def run(cases: Sequence[Spec], repeats: int, out: pathlib.Path, command: str) -> None:
    """Times `cases`; writes grouped_matmul.json and grouped_matmul.png."""
    console = Console(width=None if Console().is_terminal else 120)
    found: list[dict[str, Any]] = []
    out.mkdir(parents=True, exist_ok=True)
    for spec in cases:
        found.append(run_case(spec, repeats))
        console.print(_table(spec.title, found[-1]))
        document = report.document([], command) | {
            "cases": found,
            "openblas": blas.kernels(),
            "load": os.getloadavg()[0],
        }
        (out / "grouped_matmul.json").write_text(json.dumps(document, indent=1) + "\n")
    if not _draw(found, out / "grouped_matmul.png"):
        console.print("Install jax-fusco[bench] for the picture")


def _table(title: str, case: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("GF/s, median", no_wrap=True)
    for head in ("dense", *GROUPS, "ragged_dot", *(f"{kind}/dense" for kind in GROUPS)):
        table.add_column(head, justify="right", no_wrap=True)
    for op, result in case["ops"].items():
        rates = [f"{result['gflops'][name]:.0f}" for name in ("dense", *GROUPS, "ragged_dot")]
        table.add_row(op, *rates, *(f"{result['over_dense'][kind]:.2f}" for kind in GROUPS))
    return table


def _draw(cases: list[dict[str, Any]], path: pathlib.Path) -> bool:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    bars = {
        "dense": ("one dense product", "#b0b0b0"),
        "balanced": ("jax_fusco, equal groups", "#1b7837"),
        "zipf": ("jax_fusco, Zipf groups", "#7fbf7b"),
        "ragged_dot": ("jax.lax.ragged_dot", "#d6604d"),
    }
    lines = -(-len(cases) // 2)
    figure, axes = pyplot.subplots(
        lines, 2, figsize=(12, 3.2 * lines), squeeze=False, layout="constrained"
    )
    for axis, case in zip(axes.flat, cases, strict=False):
        for place, (name, (label, color)) in enumerate(bars.items()):
            heights = [case["ops"][op]["gflops"][name] for op in OPS]
            positions = [index + (place - 1.5) * 0.2 for index in range(len(OPS))]
            axis.bar_label(
                axis.bar(positions, heights, 0.2, color=color, label=label), fmt="%.0f", fontsize=8
            )
        spec = case["spec"]
        axis.set_title(
            f"{spec['shape']}, [{spec['experts']}, {spec['n']}, {spec['m']}], {spec['dtype']}",
            fontsize=10,
        )
        axis.set_xticks(range(len(OPS)), OPS)
        axis.set_ylabel("GF/s")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
