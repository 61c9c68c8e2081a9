"""What experts' places save: rows and bytes sent, ranks per token, and the time of a layer.

    python benchmarks/expert_traffic.py --routing runs/placement/routing.npz

Rows are counted in plans that ran. The layer is timed with the experts where they are, after
`optimize_placement`, and after `limit_ranks`, in turn; where results must be equal they are
compared first. Without --routing, which `examples/place_moe_lm.py` writes, routings are drawn.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
from expert_layer import CASES, KINDS, TIMES, count_rows, drawn, recorded, study

COLORS = {"assignment": "#d6604d", "token": "#1b7837"}


def traffic(tokens: int) -> list[dict[str, Any]]:
    """Rows and bytes of every shape, for 4 and 8 ranks, uniform and Zipf routings."""
    from tqdm import tqdm

    from jax_fusco.bench.routing import ROUTINGS
    from jax_fusco.bench.shapes import SHAPES

    found = []
    for shape in tqdm(SHAPES.values(), desc="plans"):
        for ranks in (4, 8):
            for name in ("uniform", "zipf"):
                rng = np.random.default_rng(0)
                ids = ROUTINGS[name](rng, ranks * tokens, shape.k, shape.experts, ranks)
                rows = count_rows(ids.reshape(ranks, tokens, -1), shape.experts)
                # bfloat16; a token's row goes with the ids and float32 weights of its experts.
                row = {"assignment": 2 * shape.features, "token": 2 * shape.features + 8 * shape.k}
                sent = {kind: rows[kind]["sent"] * row[kind] for kind in KINDS}
                case = {"shape": shape.name, "ranks": ranks, "routing": name, "k": shape.k}
                found.append({**case, "rows": rows, "bytes": sent})
    return found


def report(rows: list[dict[str, Any]], layers: dict[str, Any]) -> None:
    """Both tables; a row each assignment / a row each rank; the fastest by the clock."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    table = Table(
        title="Dispatch: rows per token sent to other ranks (and to its own), kB per token"
    )
    for name in ("shape", "ranks", "routing", "a row each assignment", "a row each rank", "less"):
        table.add_column(name, justify="left" if name in ("shape", "routing") else "right")
    for one in rows:
        cells = [
            f"{one['rows'][kind]['sent']:.2f} ({one['rows'][kind]['self']:.2f})  "
            f"{one['bytes'][kind] / 1e3:5.1f} kB"
            for kind in KINDS
        ]
        less = 1 - one["bytes"]["token"] / one["bytes"]["assignment"]
        table.add_row(
            one["shape"], str(one["ranks"]), one["routing"], *cells, f"{100 * less:.0f} %"
        )
    console.print(table)
    for name, (facts, cases) in layers.items():
        title = f"{name}: {facts['ranks']} ranks, {facts['experts']} experts, top {facts['k']}"
        if "planted_ranks_per_token" in facts:
            title += f"; planted optimum {facts['planted_ranks_per_token']:.3f} ranks per token"
        table = Table(title=title)
        for column in ("", "ranks per token", "load", "rows sent", "ms", "ms of processors"):
            table.add_column(column, justify="right" if column else "left", no_wrap=True)
        for case in CASES:
            found = cases[case]
            still = ": stays" if case.startswith("placed") and not found["moved"] else ""
            least, middle = (
                [choose(found[name][kind]) for kind in KINDS]
                for name, choose in zip(TIMES, (min, statistics.median), strict=True)
            )
            sent = [found["rows"][kind]["sent"] for kind in KINDS]
            table.add_row(
                case + still,
                f"{found['ranks_per_token']:.3f}",
                f"{found['load_max_over_mean']:.2f}",
                f"{sent[0]:.2f} / {sent[1]:.2f}",
                *(" / ".join(f"{number:.0f}" for number in each) for each in (least, middle)),
            )
        console.print(table)


def draw(rows: list[dict[str, Any]], layers: dict[str, Any], path: Path) -> None:
    """Rows by shape; ranks per token and times by case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = 1 + len(layers) // 2
    figure, axes = pyplot.subplots(lines, 2, figsize=(11, 4 * lines), layout="constrained")
    axes = axes.reshape(-1)
    for axis in axes[1 + len(layers) :]:
        axis.set_visible(False)
    bars = [one for one in rows if one["ranks"] == 8 and one["routing"] == "zipf"]
    labels = {"assignment": "a row each assignment", "token": "a row each (token, rank)"}
    for place, kind in enumerate(KINDS):
        at = [i + 0.4 * place - 0.2 for i in range(len(bars))]
        heights = [one["rows"][kind]["sent"] for one in bars]
        found = axes[0].barh(at, heights, 0.4, color=COLORS[kind], label=labels[kind])
        axes[0].bar_label(found, fmt="%.1f", fontsize=8, padding=1)
    axes[0].set_yticks(range(len(bars)), [one["shape"] for one in bars])
    axes[0].invert_yaxis()
    axes[0].set_title("rows per token sent to other ranks\n8 ranks, Zipf", fontsize=10)
    for axis, (name, (_, cases)) in zip(axes[1:], layers.items(), strict=False):
        for place, kind in enumerate(KINDS):
            at = [i + 0.4 * place - 0.2 for i in range(len(CASES))]
            heights = [
                statistics.median(cases[case]["processor_milliseconds"][kind]) for case in CASES
            ]
            axis.bar(at, heights, 0.4, color=COLORS[kind])
        names = [case.replace("for ", "for\n") for case in CASES]
        ranks = [f"{cases[case]['ranks_per_token']:.2f} ranks" for case in CASES]
        names = [f"{name}\n{number}" for name, number in zip(names, ranks, strict=True)]
        axis.set_xticks(range(len(CASES)), names, fontsize=7)
        axis.set_title(f"{name} routing\nms of processors, value and gradients", fontsize=10)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


@click.command(context_settings={"show_default": True})
@click.option("--routing", type=click.Path(path_type=Path), help="Of examples/place_moe_lm.py.")
@click.option("--tokens", type=click.IntRange(1), default=256, help="Of each rank.")
@click.option(
    "--features", type=click.IntRange(1), default=2048, help="Length of the layer's rows."
)
@click.option("--hidden", type=click.IntRange(1), default=32, help="Features of its experts.")
@click.option("--repeats", type=click.IntRange(1), default=9)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="For JSON and PNG.")
def main(
    routing: Path | None, tokens: int, features: int, hidden: int, repeats: int, out: Path | None
) -> None:
    """Counts rows of plans by shape, then times a layer of 32 experts on 8 CPU devices."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    routings = [drawn(name, 8, tokens) for name in ("planted", "unstructured")]
    if routing is not None:
        routings.insert(0, recorded(routing, tokens, 8))
    layers = {each.name: study(each, features, hidden, repeats) for each in routings}
    rows = traffic(tokens)
    report(rows, layers)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": f"python benchmarks/expert_traffic.py {' '.join(sys.argv[1:])}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "tokens": tokens,
        "features": features,
        "hidden": hidden,
        "traffic": rows,
        "layers": {name: {**facts, "cases": cases} for name, (facts, cases) in layers.items()},
    }
    (out / "expert_traffic.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(rows, layers, out / "expert_traffic.png")


if __name__ == "__main__":
    main()
