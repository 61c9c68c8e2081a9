"""The folder of a run: what an earlier run left there, and whether this run may go on with it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click

REMEDY = "start over with --fresh or choose another --output"


def check_same_run(
    saved: dict[str, Any], facts: dict[str, Any], whose: str, remedy: str = REMEDY
) -> None:
    """Raises a one-sentence error if `saved`, which is `whose`, is of another run than `facts`."""
    for name, value in facts["options"].items():
        before = saved["options"].get(name)
        if before != value:
            option = "--" + name.replace("_", "-")
            raise click.ClickException(
                f"{option}: {value} was given but {whose} has {before}; {remedy}."
            )
    if saved["text"] != facts["text"]:
        raise click.ClickException(f"--data: {whose} read another text; {remedy}.")


def prepare_folder(folder: Path, fresh: bool) -> None:
    """Makes `folder`, and if `fresh` removes what an earlier run left in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            for name in ("metrics.jsonl", "loss.png", "experts.png", "sample.txt"):
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise click.ClickException(f"--output: cannot write {folder}: {error.strerror}.") from error
