"""One picture of a run: how long each way to shuffle takes beside ours."""

from __future__ import annotations

import pathlib
from typing import Any

from jax_fusco.bench.report import best

BARS = {
    "limit": ("memory copy of the same bytes", "#b0b0b0"),
    "jax_fusco": ("jax_fusco", "#1b7837"),
    "ring": ("ring: all-gather, reduce-scatter", "#5e9fd1"),
    "padded": ("sort, padded all_to_all, sort", "#d6604d"),
}
OPS = {
    "dispatch": "dispatch",
    "combine": "combine",
    "forward": "forward",
    "train": "forward +\nbackward",
}


def draw(cases: list[dict[str, Any]], path: pathlib.Path) -> bool:
    """Writes bars of the time relative to jax_fusco, a panel for each case with several operations
    (else for each case). False where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    wide = [case for case in cases if len(set(case["ops"]) & set(OPS)) > 2] or cases
    wide = [case for case in wide if set(case["ops"]) & set(OPS)][:6]
    if not wide:
        return True
    columns = min(2, len(wide))
    lines = -(-len(wide) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(6.2 * columns, 3.6 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(wide) :]:
        axis.set_visible(False)
    for axis, case in zip(axes.flat, wide, strict=False):
        _panel(axis, case)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle("Moving MoE tokens to their experts and back: time, jax_fusco = 1 (labels: ms)")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def _panel(axis: Any, case: dict[str, Any]) -> None:
    spec = case["spec"]
    ops = [op for op in OPS if op in case["ops"]]
    width = 0.8 / len(BARS)
    for place, (family, (label, color)) in enumerate(BARS.items()):
        heights, positions, texts = [], [], []
        for index, op in enumerate(ops):
            timings = case["ops"][op]["timings"]
            found, ours = best(timings, family), best(timings, "jax_fusco")
            if found and ours:
                heights.append(found[1] / ours[1])
                positions.append(index + (place - (len(BARS) - 1) / 2) * width)
                texts.append(f"{found[1]:.0f}" if found[1] >= 10 else f"{found[1]:.2g}")
        bars = axis.bar(positions, heights, width, color=color, label=label)
        axis.bar_label(bars, texts, fontsize=8, padding=1)
    axis.axhline(1, color="#1b7837", linewidth=0.6, linestyle=":")
    axis.set_xticks(range(len(ops)), [OPS[op] for op in ops])
    axis.set_title(
        f"{spec['shape']}, {spec['devices']} devices x {spec['tokens']} tokens, {spec['routing']}",
        fontsize=10,
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.12)
