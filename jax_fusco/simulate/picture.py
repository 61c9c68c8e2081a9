"""Pictures of a study: published against model, growing clusters, slopes of the constants."""

from __future__ import annotations

import pathlib
from typing import Any

from jax_fusco.simulate.cluster import CONSTANTS

COLOURS = {
    "NCCL": "#5e9fd1",
    "DeepEP": "#d6604d",
    "FUSCO": "#762a83",
    "ours": "#1b7837",
    "ours, float32 back": "#7fbf7b",
    "no engine": "#b0b0b0",
    "no planner": "#808080",
    "no balancer": "#404040",
}
ORDER = ("NCCL", "DeepEP", "FUSCO", "no engine", "no planner", "no balancer")


def draw(document: dict[str, Any], path: pathlib.Path) -> bool:
    """Writes the picture. False where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    _residuals(axes[0], document["fit"])
    _scale(axes[1], document["scale"])
    _slopes(axes[2], document["sensitivity"])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("A model of shuffles on clusters; nothing of it ran on several hosts")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True


def _residuals(axis: Any, fit: dict[str, Any]) -> None:
    for way in ORDER:
        cells = [cell for cell in fit["cells"] if cell["way"] == way]
        known = [cell["milliseconds"] for cell in cells]
        model = [cell["model"] for cell in cells]
        axis.scatter(known, model, s=18, color=COLOURS[way], label=way)
    ends = [10, 800]
    axis.plot(ends, ends, color="black", linewidth=0.8)
    for factor in (1 - fit["target"], 1 + fit["target"]):
        axis.plot(ends, [factor * end for end in ends], color="black", linewidth=0.6, linestyle=":")
    axis.set(xscale="log", yscale="log", xlabel="published, ms", ylabel="model, ms")
    axis.set_title(f"{fit['within']} of {len(fit['cells'])} within 15 % (dotted)", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def _scale(axis: Any, points: list[dict[str, Any]]) -> None:
    routing = points[0]["routing"]
    points = [point for point in points if point["routing"] == routing]
    for way in points[0]["ms"]:
        times = [point["ms"][way] for point in points]
        axis.plot([p["gpus"] for p in points], times, ".-", color=COLOURS[way], label=way)
    axis.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="dispatch and combine, ms")
    axis.set_title(f"growing clusters, experts on {routing}", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def _slopes(axis: Any, entries: list[dict[str, Any]]) -> None:
    routing = entries[0]["routing"]
    entries = [entry for entry in entries if entry["routing"] == routing]
    width = 0.8 / len(entries)
    for place, entry in enumerate(entries):
        heights = [entry[name] for name in CONSTANTS]
        at = [i + (place - (len(entries) - 1) / 2) * width for i in range(len(CONSTANTS))]
        axis.bar(at, heights, width, color=COLOURS[entry["way"]], label=entry["way"])
    labels = [name.replace("_", "\n") for name in CONSTANTS]
    axis.set_xticks(range(len(CONSTANTS)), labels, fontsize=8)
    axis.set_ylabel("% of time for 1 % of the constant")
    axis.set_title(f"sensitivity, {routing} routing, 16384 tokens", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
