"""Around the ledger: routings from files, its table, its picture, its JSON."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from rich.table import Table

from jax_fusco.files import read_npz
from jax_fusco.ledger import LINKS, WAYS, Ledger, Way

COLOURS = {"rank": "#b0b0b0", "node": "#5e9fd1", "wire": "#d6604d", "padding": "#f4c7bd"}


def read_routing(path: str | pathlib.Path) -> tuple[np.ndarray, int | None]:
    """Reads a routing: an npz file with `expert_ids` [R, T, k] and, if it has it, `num_experts`.

    Nothing is unpickled.

    Raises:
      ValueError: the file is missing, corrupt, or holds something else, in one sentence.
    """
    need = "need an npz file with integer expert_ids [ranks, tokens, experts per token]"
    arrays = read_npz(path, ("expert_ids", "num_experts"), "routing", need)
    if "expert_ids" not in arrays:
        raise ValueError(f"{path}: got no array named expert_ids, {need}")
    ids = arrays["expert_ids"]
    if ids.ndim != 3 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{path}: got expert_ids of {ids.dtype} {ids.shape}, {need}")
    experts = arrays.get("num_experts")
    if experts is None:
        return ids, None
    if experts.shape != () or not np.issubdtype(experts.dtype, np.integer):
        raise ValueError(
            f"{path}: got num_experts of {experts.dtype} {experts.shape}, need one integer"
        )
    return ids, int(experts)


def experts_of(path: str | pathlib.Path, in_file: int | None, option: int | None) -> int:
    """E, from a routing's file or else from --num-experts.

    Raises:
      ValueError: neither says it, or they say different numbers.
    """
    if in_file is None and option is None:
        raise ValueError(
            f"--num-experts: got nothing, and {path} has no num_experts, need a number"
        )
    if None not in (in_file, option) and in_file != option:
        raise ValueError(f"--num-experts: got {option}, need the {in_file} that {path} says")
    return in_file or option or 0


def _ratio(load: np.ndarray) -> float:
    mean = load.mean()
    return float(load.max() / mean) if mean else 1.0


def byte_text(number: float) -> str:
    """A number of bytes for people, with its unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.3g} {unit}"


def describe(found: Ledger) -> str:
    """The rows before and after each token is sent once, in words."""
    return (
        f"{found.nodes} nodes of {found.ranks_per_node} ranks, {found.tokens} tokens per rank, "
        f"rows of {found.row_bytes} bytes: {found.assignments} assignments, "
        f"{found.rank_rows} rows once "
        f"to each rank, {found.node_rows} once to each node; {found.lower_bound} of these must "
        f"cross between nodes ({byte_text(found.lower_bound * found.row_bytes)}); "
        f"{found.num_invalid} invalid ids"
    )


def table(found: Ledger) -> Table:
    """A line for each way: bytes by class of link, padding, and how uneven ranks are."""
    made = Table(title="One dispatch", title_justify="left", header_style="bold")
    made.add_column("", no_wrap=True)
    for head in (*LINKS.values(), "padding between nodes", "sent / lower bound"):
        made.add_column(head, justify="right")
    for head in ("NIC out", "NIC in", "rank in"):
        made.add_column(f"{head}, max/mean", justify="right")
    for name, way in found.ways.items():
        cells = [byte_text(way.rows[link] * found.row_bytes) for link in LINKS]
        cells.append(byte_text(way.padding * found.row_bytes))
        cells.append(f"{way.wire / found.lower_bound:.3f}" if found.lower_bound else "")
        cells += [f"{_ratio(load):.3f}" for load in (way.egress, way.ingress, way.received)]
        made.add_row(name, *cells)
    return made


def document(found: Ledger) -> dict[str, Any]:
    """Everything as JSON: rows, bytes, and max/mean of each load."""

    def way(name: str, entry: Way) -> dict[str, Any]:
        return {
            "what": WAYS[name],
            "rows": dict(entry.rows),
            "bytes": {link: rows * found.row_bytes for link, rows in entry.rows.items()},
            "padding_rows": entry.padding,
            "padding_bytes": entry.padding * found.row_bytes,
            "nic_egress_max_over_mean": _ratio(entry.egress),
            "nic_ingress_max_over_mean": _ratio(entry.ingress),
            "rank_received_max_over_mean": _ratio(entry.received),
        }

    names = (
        "nodes", "ranks_per_node", "tokens", "row_bytes", "slice_rows", "assignments", "rank_rows",
        "node_rows", "lower_bound", "num_invalid",
    )  # fmt: skip
    return {
        **{name: getattr(found, name) for name in names},
        "ways": {name: way(name, entry) for name, entry in found.ways.items()},
    }


def draw(found: Ledger, path: pathlib.Path) -> bool:
    """Writes bars of the bytes of each way, by class of link. False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    scale = found.row_bytes / 1e9
    for axis, ways in zip(axes, (list(WAYS), ["flat", "fusco", "ours"]), strict=True):
        left = np.zeros(len(ways))
        for link in ("wire", "padding", "node", "rank"):
            label = f"{LINKS['wire']}, padding" if link == "padding" else LINKS[link]
            rows = [
                found.ways[n].padding if link == "padding" else found.ways[n].rows[link]
                for n in ways
            ]
            width = np.array(rows) * scale
            axis.barh(ways, width, left=left, color=COLOURS[link], label=label)
            left += width
        axis.axvline(found.lower_bound * scale, color="black", linewidth=0.8, linestyle=":")
        axis.invert_yaxis()
        axis.set_xlabel("GB (dotted: what must cross between nodes)")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        f"One dispatch, {found.nodes} nodes x {found.ranks_per_node} ranks x {found.tokens} tokens"
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
