"""Checks of the command line that look at more than one option."""

from __future__ import annotations

import math
import re
from typing import Any

import click

DEVICES = 4


def arrange(options: dict[str, Any]) -> dict[str, int]:
    """The mesh's axes and their sizes: data x expert, or data x node x expert with --topology."""
    devices, mesh, topology = (options[name] for name in ("devices", "mesh", "topology"))
    if mesh and topology:
        raise click.ClickException("--mesh: got it and --topology, need one of them.")
    if topology:
        nodes, local = _product("--topology", topology, "NODESxRANKS, such as 2x4")
        if devices not in (None, nodes * local):
            raise click.ClickException(
                f"--devices: {devices} is not the {nodes * local} ranks of --topology {topology}."
            )
        return {"data": 1, "node": nodes, "expert": local}
    devices = devices or DEVICES
    if mesh is None:
        return {"data": 1, "expert": devices}
    data, expert = _product("--mesh", mesh, "DATAxEXPERT, such as 2x2")
    if data * expert != devices:
        raise click.ClickException(
            f"--mesh: {mesh} has {data * expert} places for {devices} devices."
        )
    return {"data": data, "expert": expert}


def _product(option: str, text: str, form: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise click.ClickException(f"{option}: {text!r} is not {form}.")
    return int(match[1]), int(match[2])


def several_processes(options: dict[str, Any]) -> bool:
    """Whether this process is one of several."""
    return options["distributed"] or options["coordinator"] is not None


def check_count(count: int, axes: dict[str, int]) -> None:
    """Raises a one-sentence error where there is not one process for each node."""
    if count != axes["node"]:
        raise click.ClickException(
            f"--processes: {count} processes are not one for each of the {axes['node']} nodes of "
            "--topology."
        )


def _check_processes(o: dict[str, Any], axes: dict[str, int]) -> None:
    names = ("coordinator", "processes", "process")
    given = [name for name in names if o[name] is not None]
    if given and len(given) < len(names):
        missing = next(name for name in names if name not in given)
        raise click.ClickException(f"--{given[0]}: got it without --{missing}.")
    if not several_processes(o):
        return
    if o["topology"] is None:
        raise click.ClickException("--topology: got nothing, and several processes need it.")
    if not given:
        return
    host, _, port = o["coordinator"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise click.ClickException(f"--coordinator: {o['coordinator']!r} is not HOST:PORT.")
    check_count(o["processes"], axes)
    if o["process"] >= o["processes"]:
        raise click.ClickException(
            f"--process: {o['process']} is not one of 0 to {o['processes'] - 1}."
        )


def check(options: dict[str, Any]) -> None:
    """Raises a one-sentence error for options that do not fit each other."""

    def need(condition: bool, sentence: str) -> None:
        if not condition:
            raise click.ClickException(sentence)

    o = options
    axes = arrange(o)
    _check_processes(o, axes)
    devices = math.prod(axes.values())
    expert = devices // axes["data"]
    need(
        o["experts"] % expert == 0,
        f"--experts: {o['experts']} cannot be divided over the mesh's {expert} expert ranks.",
    )
    need(
        o["top_k"] <= o["experts"],
        f"--top-k: {o['top_k']} is more than the {o['experts']} experts there are.",
    )
    need(
        o["batch"] % devices == 0,
        f"--batch: {o['batch']} sequences cannot be divided over {devices} devices.",
    )
    need(
        o["width"] % (2 * o["heads"]) == 0,
        f"--width: {o['width']} is not a multiple of twice the {o['heads']} heads.",
    )
    need(
        not o["output"].exists() or o["output"].is_dir(),
        f"--output: {o['output']} is a file, and a folder is needed.",
    )
    routing = o["save_routing"]
    need(
        routing is None or not routing.is_dir(),
        f"--save-routing: {routing} is a folder, and a file is needed.",
    )
    need(
        o["routing_layer"] is None or o["routing_layer"] < o["layers"],
        f"--routing-layer: {o['routing_layer']} is not one of 0 to {o['layers'] - 1}.",
    )
