"""A whole run: every case in turn, its table, and at the end the JSON and the picture."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import signal
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jax_fusco.bench import picture, report
from jax_fusco.bench.cases import Spec
from jax_fusco.bench.runner import CaseFailed, run_case


def run(specs: Sequence[Spec], changes: dict[str, Any], out: pathlib.Path, command: str) -> int:
    """Measures `specs`, each with `changes` to its fields, and writes results.json and results.png.

    The JSON is written after every case, so that an interrupted run keeps what it has.

    Returns:
      The number of cases that failed; each is named on the terminal.
    """
    # Ended from outside, the process of the current case must end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if Console().is_terminal else 150)
    cases: list[dict[str, Any]] = []
    failed = 0
    columns = (
        BarColumn(30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(specs))
        for spec in (dataclasses.replace(spec, **changes) for spec in specs):

            def say(text: str, title: str = spec.title) -> None:
                progress.update(task, description=f"{title}: {text}")

            try:
                case = run_case(spec, say)
            except CaseFailed as error:
                console.print(f"[red]{error}[/red]")
                failed += 1
            else:
                cases.append(case)
                report.print_case(console, case, spec.title)
                text = json.dumps(report.document(cases, command), indent=1)
                (out / "results.json").write_text(text + "\n")
            progress.advance(task)
    if cases and picture.draw(cases, out / "results.png"):
        console.print(f"Wrote {out / 'results.json'} and {out / 'results.png'}")
    elif cases:
        console.print(f"Wrote {out / 'results.json'}; install jax-fusco[bench] for the picture")
    return failed
