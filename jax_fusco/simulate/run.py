"""A whole study: fit, residuals, growing clusters, sensitivity and rails; tables, JSON, picture."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jax_fusco.rails import STRATEGIES
from jax_fusco.simulate import fit, picture, published, study
from jax_fusco.simulate.cluster import CONSTANTS, Cluster
from jax_fusco.simulate.traffic import Traffic

ROUTINGS = {"4 nodes": 4, "all nodes": None}
UNITS = {"nvlink": "GB/s", "nic": "GB/s", "copy": "GB/s"}


def run(
    out: pathlib.Path, changes: dict[str, Any], gpus: tuple[int, ...], tokens: int
) -> dict[str, Any]:
    """Makes the study and writes simulate.json, simulate_rails.json and simulate.png.

    Args:
      out: a folder.
      changes: fields of `Cluster` for the growing clusters.
      gpus, tokens: their sizes, and tokens a GPU.

    Returns:
      What simulate.json holds.
    """
    console = Console(width=None if Console().is_terminal else 120)
    columns = (BarColumn(30), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("fit to the published times", total=None)
        fitted = fit.fit(said=lambda: progress.advance(task))
        cells = fit.residuals(fitted)
        progress.update(task, description="this design on the published workloads")
        same = study.same_workload(fitted)
        progress.update(task, description="sensitivity")
        slopes = study.sensitivity(fitted)
        cluster = dataclasses.replace(fitted, **changes)
        total = len(gpus) * len(ROUTINGS)
        progress.update(task, description="growing clusters", total=total, completed=0)
        grown = study.scale(cluster, ROUTINGS, tokens, gpus, lambda: progress.advance(task))
        thin = study.oversubscribed(fitted)
        total = len(study.NODES) * len(study.RANKS)
        progress.update(task, description="rails", total=total, completed=0)
        rails = study.rails_table(said=lambda: progress.advance(task))
    document = {
        "model": "alpha-beta and max-min-fair links; nothing ran on several hosts",
        "fit": _fit_document(fitted, cells),
        "same_workload": _rounded(same),
        "sensitivity": slopes,
        "cluster": dataclasses.asdict(cluster),
        "tokens": tokens,
        "scale": _rounded(grown),
        "oversubscription": _rounded(thin),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "simulate.json").write_text(json.dumps(document, indent=1) + "\n")
    lines = ",\n".join(json.dumps(entry) for entry in rails)
    (out / "simulate_rails.json").write_text(f"[\n{lines}\n]\n")
    for table in (
        _constants(fitted),
        _cells(cells),
        _times("This design on the published workloads, ms", document["same_workload"]),
        _times(f"Growing clusters, {tokens} tokens a GPU, ms", document["scale"]),
        _rails(rails),
    ):
        console.print(table)
    if not picture.draw(document, out / "simulate.png"):
        console.print("Install jax-fusco[simulate] for the picture")
    console.print(f"Wrote {out / 'simulate.json'} and {out / 'simulate_rails.json'}")
    return document


def replay(traffic: Traffic, cluster: Cluster, row_bytes: int) -> None:
    """Prints what each way takes for a routing's traffic, with constants fitted first."""
    fitted = fit.fit()
    constants = {name: getattr(fitted, name) for name in CONSTANTS}
    cluster = dataclasses.replace(cluster, **constants)
    times = study.replay(traffic, cluster, row_bytes)
    title = f"{cluster.nodes} nodes of {cluster.gpus_per_node} GPUs, dispatch and combine, ms"
    table = Table(title=title, title_justify="left")
    for way in times:
        table.add_column(way, justify="right")
    table.add_row(*(f"{time:.3g}" for time in times.values()))
    Console().print(table)


def _fit_document(fitted: Cluster, cells: list[dict[str, Any]]) -> dict[str, Any]:
    off = [abs(cell["off"]) for cell in cells]
    return {
        "source": "arXiv 2512.22036",
        "constants": {name: round(getattr(fitted, name), 4) for name in CONSTANTS},
        "skew": round(published.SKEW, 4),
        "target": fit.TARGET,
        "within": sum(value <= fit.TARGET for value in off),
        "mean_off": round(sum(off) / len(off), 4),
        "worst_off": max(off),
        "cells": cells,
    }


def _rounded(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**p, "ms": {way: round(ms, 3) for way, ms in p["ms"].items()}} for p in points]


def _constants(fitted: Cluster) -> Table:
    table = Table(title="Fitted constants", title_justify="left")
    for name in CONSTANTS:
        table.add_column(f"{name}, {UNITS.get(name, 'us a peer')}", justify="right")
    table.add_row(*(f"{getattr(fitted, name):.4g}" for name in CONSTANTS))
    return table


def _cells(cells: list[dict[str, Any]]) -> Table:
    within = sum(abs(cell["off"]) <= fit.TARGET for cell in cells)
    title = f"Published and model, ms: {within} of {len(cells)} within {fit.TARGET:.0%}"
    table = Table(title=title, title_justify="left")
    for head in ("routing", "tokens", "way"):
        table.add_column(head)
    for head in ("published", "model", "off"):
        table.add_column(head, justify="right")
    for cell in cells:
        style = "red" if abs(cell["off"]) > fit.TARGET else None
        numbers = (f"{cell['milliseconds']:.1f}", f"{cell['model']:.1f}", f"{cell['off']:+.0%}")
        table.add_row(cell["routing"], str(cell["tokens"]), cell["way"], *numbers, style=style)
    return table


def _times(title: str, points: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    heads = [name for name in points[0] if name != "ms"]
    for head in (*heads, *points[0]["ms"]):
        table.add_column(head, justify="right")
    for point in points:
        times = (f"{time:.1f}" for time in point["ms"].values())
        table.add_row(*(str(point[head]) for head in heads), *times)
    return table


def _rails(entries: list[dict[str, Any]]) -> Table:
    """The worst size of each family."""
    title = "Max/mean egress and ingress over a node's rails, worst of all sizes"
    table = Table(title=title, title_justify="left")
    for head in ("family", "least rows", *STRATEGIES):
        table.add_column(head, justify="right")
    for family in dict.fromkeys(entry["family"] for entry in entries):
        mine = [entry for entry in entries if entry["family"] == family]
        cells = [f"{min(entry['least'] for entry in mine):.0f}"]
        for name in STRATEGIES:
            worst = [max(entry[name][end] for entry in mine) for end in (0, 1)]
            cells.append(f"{worst[0]:.3f} {worst[1]:.3f}")
        table.add_row(family, *cells)
    return table
