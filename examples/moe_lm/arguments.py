"""Checks of the command line that look at more than one option."""

from __future__ import annotations

import re
from typing import Any

import click


def parse_mesh(text: str | None, devices: int) -> tuple[int, int]:
    """`"DATAxEXPERT"` as two numbers whose product is `devices`; None is `1 x devices`."""
    if text is None:
        return 1, devices
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise click.ClickException(f"--mesh: {text!r} is not DATAxEXPERT, such as 2x2.")
    data, expert = int(match[1]), int(match[2])
    if data * expert != devices or devices < 1:
        raise click.ClickException(
            f"--mesh: {text} has {data * expert} places for {devices} devices."
        )
    return data, expert


def check(options: dict[str, Any]) -> None:
    """Raises a one-sentence error for options that do not fit each other."""

    def need(condition: bool, sentence: str) -> None:
        if not condition:
            raise click.ClickException(sentence)

    o = options
    _, expert = parse_mesh(o["mesh"], o["devices"])
    need(
        o["experts"] % expert == 0,
        f"--experts: {o['experts']} cannot be divided over the mesh's {expert} expert ranks.",
    )
    need(
        o["top_k"] <= o["experts"],
        f"--top-k: {o['top_k']} is more than the {o['experts']} experts there are.",
    )
    need(
        o["batch"] % o["devices"] == 0,
        f"--batch: {o['batch']} sequences cannot be divided over {o['devices']} devices.",
    )
    need(
        o["width"] % (2 * o["heads"]) == 0,
        f"--width: {o['width']} is not a multiple of twice the {o['heads']} heads.",
    )
    need(
        not o["output"].exists() or o["output"].is_dir(),
        f"--output: {o['output']} is a file, and a folder is needed.",
    )
