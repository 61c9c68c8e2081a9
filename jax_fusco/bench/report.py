"""Tables for the terminal, and JSON for everything else."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from jax_fusco.bench.rivals import FAMILIES, family_of

RIVALS = ("ring", "padded")
ENVIRONMENT = ("GLIBC_TUNABLES", "XLA_FLAGS")
MEMORY_FROM = 256 << 20
"""Peaks are shown where inputs and outputs are at least this large; smaller ones drown in the
process."""


def best(timings: dict[str, Any], family: str) -> tuple[str, float] | None:
    """The formulation of a family with the least median, and that median in ms."""
    found = [
        (timing["median_ms"], name) for name, timing in timings.items() if family_of(name) == family
    ]
    return (min(found)[1], min(found)[0]) if found else None


def summary(case: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each operation: our median, times faster than each rival's best, and share of the
    limit."""
    rows: dict[str, dict[str, float]] = {}
    for op, result in case["ops"].items():
        medians = {f: found[1] for f in FAMILIES if (found := best(result["timings"], f))}
        ours = medians["jax_fusco"]
        row = {"ours_ms": ours}
        for rival in (*RIVALS, *(f"{rival}/helped" for rival in RIVALS)):
            if rival in medians:
                row[f"over_{rival}"] = round(medians[rival] / ours, 3)
        for limit in ("limit", "limit/once"):
            if limit in medians:
                row[f"of_{limit}"] = round(medians[limit] / ours, 3)
        peak = result["memory"].get("peak_ratio", {}).get("jax_fusco")
        if peak is not None:
            row["peak_over_needed"] = peak
        rows[op] = row
    if "plan" in rows and "dispatch" in rows:
        share = rows["plan"]["ours_ms"] / rows["dispatch"]["ours_ms"]
        rows["plan"]["of_dispatch"] = round(share, 4)
    launch = best(case["ops"].get("plan", {"timings": {}})["timings"], "launch")
    if launch:
        rows["plan"]["launch_ms"] = launch[1]
    return rows


def print_case(console: Console, case: dict[str, Any], title: str) -> None:
    """One table: a row for each operation, medians in ms and how we compare."""
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("ms, median", no_wrap=True)
    for head in ("ours", "ours, zero tail", "ring", "padded", "copy"):
        table.add_column(head, justify="right", no_wrap=True)
    for head in ("ring/ours", "padded/ours", "copy/ours", "peak memory"):
        table.add_column(head, justify="right", style="green")
    short = summary(case)
    for op, result in case["ops"].items():
        row, timings = short[op], result["timings"]
        cells = [_best_ms(timings, f) for f in ("jax_fusco", "jax_fusco/zero", *RIVALS, "limit")]
        cells += [_number(row.get(key)) for key in ("over_ring", "over_padded", "of_limit")]
        large = result["memory"].get("needed_bytes", 0) >= MEMORY_FROM
        cells.append(_number(row.get("peak_over_needed")) if large else "")
        table.add_row(op, *cells)
        if "over_ring/helped" in row:
            helped = [_best_ms(timings, f"{rival}/helped") for rival in RIVALS]
            times = [_number(row.get(f"over_{rival}/helped")) for rival in RIVALS]
            table.add_row("  helped rivals", "", "", *helped, "", *times, "", "")
    console.print(table)
    plan = short.get("plan", {})
    if plan.keys() >= {"of_dispatch", "launch_ms"}:
        console.print(
            f"The plan takes {100 * plan['of_dispatch']:.1f} % of the dispatch it serves; "
            f"{plan['launch_ms']:.2g} ms of it are what any call takes.\n"
        )


def document(cases: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """Everything that was measured, and where."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "environment": {name: os.environ.get(name, "") for name in ENVIRONMENT},
        "versions": versions(),
        "cases": [{**case, "summary": summary(case)} for case in cases],
    }


def machine() -> dict[str, Any]:
    """The processor, its cores and the memory, as the system names them."""
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
    }
    for path, key, name in (
        ("/proc/cpuinfo", "model name", "processor"),
        ("/proc/meminfo", "MemTotal", "memory"),
    ):
        try:
            with open(path) as file:
                facts[name] = next(
                    line.split(":", 1)[1].strip() for line in file if line.startswith(key)
                )
        except (OSError, StopIteration):
            facts[name] = "unknown"
    return facts


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("jax-fusco", "jax", "jaxlib", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _best_ms(timings: dict[str, Any], family: str) -> str:
    found = best(timings, family)
    if found is None:
        return ""
    timing = timings[found[0]]
    return f"{timing['median_ms']:.3g} ±{(timing['p75_ms'] - timing['p25_ms']) / 2:.1g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
