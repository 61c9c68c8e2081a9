"""Pictures of a run, drawn from its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

INK, BLUE, ORANGE, GREY = "#1b1f24", "#2563a8", "#d1621b", "#9aa4b0"
_STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "font.size": 10,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.dpi": 130,
}


def draw(lines: list[dict[str, Any]], folder: Path, tokens_per_step: int, title: str) -> list[Path]:
    """Writes `loss.png` and `experts.png` from the metrics `lines`; returns the paths written."""
    steps = [line for line in lines if "loss" in line]
    if len(steps) < 2:
        return []
    with plt.rc_context(_STYLE):
        figures = {
            "loss.png": _loss(steps, lines, tokens_per_step, title),
            "experts.png": _experts(steps, title),
        }
        for name, figure in figures.items():
            figure.savefig(folder / name, bbox_inches="tight")
            plt.close(figure)
    return [folder / name for name in figures]


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """A centred running mean that shrinks at both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(0, index - width), np.minimum(len(values), index + width + 1)
    return (total[high] - total[low]) / (high - low)


def _loss(
    steps: list[dict[str, Any]], lines: list[dict[str, Any]], tokens_per_step: int, title: str
) -> Figure:
    x = np.array([line["step"] for line in steps]) * tokens_per_step / 1e6
    y = np.array([line["loss"] for line in steps])
    validation = [
        (line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line
    ]
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.plot(x, y, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(x, _smooth(y, max(1, len(y) // 60)), color=BLUE, linewidth=2, label="training")
    if validation:
        vx, vy = np.array(validation).T
        vx = vx * tokens_per_step / 1e6
        axes.plot(vx, vy, "o", color=ORANGE, markersize=5, label="validation")
        axes.annotate(
            f"{vy[-1]:.2f}", (vx[-1], vy[-1]), xytext=(0, 9), textcoords="offset points",
            color=ORANGE, ha="center", weight="bold",
        )  # fmt: skip
    axes.set_xlabel("million bytes read")
    axes.set_ylabel("loss, nats a byte")
    axes.set_xlim(left=0)
    bits = axes.secondary_yaxis(
        "right", functions=(lambda n: n / np.log(2), lambda b: b * np.log(2))
    )
    bits.set_ylabel("bits a byte")
    axes.grid(axis="y", color=GREY, alpha=0.25)
    axes.legend(frameon=False)
    axes.set_title(title)
    return figure


def _experts(steps: list[dict[str, Any]], title: str) -> Figure:
    """Each expert's share of its layer over time, and under it the fullest expert and the drops."""
    x = np.array([line["step"] for line in steps])
    tokens = np.array([line["expert_tokens"] for line in steps], dtype=float)
    _, layers, experts = tokens.shape
    share = tokens / np.maximum(1.0, tokens.mean(axis=2, keepdims=True))
    rows = share.reshape(len(x), layers * experts).T
    bins = np.array_split(np.arange(len(x)), min(len(x), 150))
    rows = np.stack([rows[:, b].mean(axis=1) for b in bins], axis=1)
    figure, (heat, line) = plt.subplots(
        2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(2.4, 1), layout="constrained"
    )
    image = heat.imshow(
        rows, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest",
        extent=(x[0], x[-1], layers * experts, 0),
    )  # fmt: skip
    heat.set_yticks(
        [(i + 0.5) * experts for i in range(layers)], [f"layer {i}" for i in range(layers)]
    )
    heat.tick_params(axis="y", length=0)
    for i in range(1, layers):
        heat.axhline(i * experts, color="white", linewidth=2)
    heat.set_title(f"{title}\nload of each expert, relative to an even split")
    figure.colorbar(image, ax=heat, pad=0.02, label="load / mean")
    width = max(1, len(x) // 60)
    line.plot(x, _smooth(share.max(axis=(1, 2)), width), color=BLUE, linewidth=1.8)
    line.set_ylabel("fullest expert,\nload / mean", color=BLUE)
    line.set_ylim(bottom=1)
    line.set_xlabel("step")
    drops = line.twinx()
    dropped = np.array([s["dropped"] for s in steps]) * 100
    drops.plot(x, _smooth(dropped, width), color=ORANGE, linewidth=1.8)
    drops.set_ylabel("dropped, %", color=ORANGE)
    drops.set_ylim(0, max(1.0, dropped.max() * 1.05))
    drops.spines["right"].set_visible(True)
    return figure
