"""The command line's options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .arguments import DEVICES

COUNT = click.IntRange(min=1)
SHARE = click.FloatRange(0.0, 1.0, max_open=True)
POSITIVE = click.FloatRange(0.0, min_open=True)
NOT_NEGATIVE = click.FloatRange(0.0)

_OPTIONS = [
    click.option(
        "--data",
        type=click.Path(path_type=Path),
        help="File or folder of text. [default: the Python standard library's sources]",
    ),
    click.option(
        "--output",
        type=click.Path(path_type=Path),
        default=Path("runs/moe_lm"),
        help="Folder for checkpoints, metrics, pictures, sample.",
    ),
    click.option("--fresh", is_flag=True, help="Forget what an earlier run left in the folder."),
    click.option(
        "--max-minutes",
        type=NOT_NEGATIVE,
        default=4.0,
        help="Stop training, and save, this long after the start; 0 is no limit.",
    ),
    click.option(
        "--devices", type=COUNT, help=f"CPU devices to make. [default: {DEVICES}, or --topology's]"
    ),
    click.option(
        "--mesh", metavar="DATAxEXPERT", help="Their arrangement. [default: all along expert]"
    ),
    click.option(
        "--topology",
        metavar="NODESxRANKS",
        help="Experts over nodes of several devices each: of one process, or a process each.",
    ),
    click.option("--coordinator", metavar="HOST:PORT", help="Where process 0 is, of several."),
    click.option("--processes", type=COUNT, help="How many there are: one for each node."),
    click.option("--process", type=click.IntRange(min=0), help="Which of them this is."),
    click.option(
        "--distributed",
        is_flag=True,
        help="Ask the environment (Slurm, Open MPI) for these three.",
    ),
    click.option(
        "--heartbeat",
        type=click.IntRange(min=2),
        default=30,
        help="Seconds after which a silent process counts as gone.",
    ),
    click.option(
        "--implementation",
        type=click.Choice(["fused", "xla"]),
        help="The shuffle. [default: the best available]",
    ),
    click.option(
        "--steps",
        type=COUNT,
        default=1000,
        help="Updates in all, also the length of the learning rate's schedule.",
    ),
    click.option("--batch", type=COUNT, default=8, help="Sequences a step, over all devices."),
    click.option("--context", type=click.IntRange(min=8), default=256, help="Bytes a sequence."),
    click.option("--layers", type=COUNT, default=4, help="Transformer layers."),
    click.option("--width", type=COUNT, default=128, help="Features of a byte."),
    click.option("--heads", type=COUNT, default=2, help="Attention heads."),
    click.option("--experts", type=COUNT, default=16, help="Experts a layer."),
    click.option("--top-k", type=COUNT, default=2, help="Experts a byte."),
    click.option("--expert-width", type=COUNT, default=192, help="Hidden features of an expert."),
    click.option(
        "--shared-experts",
        type=click.IntRange(min=0),
        default=0,
        help="Experts that every byte passes.",
    ),
    click.option(
        "--capacity-factor",
        type=POSITIVE,
        default=1.25,
        help="Receive buffer over an even share; what finds no room drops.",
    ),
    click.option(
        "--dropless", is_flag=True, help="Room for every routing, whatever --capacity-factor says."
    ),
    click.option(
        "--balance-weight",
        type=NOT_NEGATIVE,
        default=0.01,
        help="Weight of the experts' load-balance loss.",
    ),
    click.option(
        "--z-weight", type=NOT_NEGATIVE, default=0.001, help="Weight of the router's z-loss."
    ),
    click.option(
        "--dropout", type=SHARE, default=0.0, help="Share of each branch's features set to zero."
    ),
    click.option("--learning-rate", type=POSITIVE, default=3e-3, help="AdamW's peak rate."),
    click.option(
        "--warmup",
        type=click.IntRange(min=0),
        default=40,
        help="Steps of linear warm-up; a cosine follows.",
    ),
    click.option(
        "--weight-decay", type=NOT_NEGATIVE, default=0.1, help="AdamW's decay of matrices."
    ),
    click.option("--clip", type=POSITIVE, default=1.0, help="Largest norm of a gradient."),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        help="Of parameters, order of the text, dropout, sample.",
    ),
    click.option("--save-every", type=COUNT, default=100, help="Steps between checkpoints."),
    click.option("--eval-every", type=COUNT, default=100, help="Steps between validations."),
    click.option("--eval-batches", type=COUNT, default=8, help="Batches of a validation."),
    click.option(
        "--prompt",
        multiple=True,
        help="Beginning of a sample; may be repeated.  [default: some Python]",
    ),
    click.option(
        "--sample-bytes", type=click.IntRange(min=2), default=400, help="Length of a sample."
    ),
    click.option(
        "--temperature",
        type=NOT_NEGATIVE,
        default=0.7,
        help="Of the sample; 0 takes the likeliest byte.",
    ),
    click.option(
        "--save-routing",
        type=click.Path(path_type=Path),
        metavar="FILE.npz",
        help="Save the experts of a validation batch, for jax-fusco ledger.",
    ),
    click.option(
        "--routing-layer", type=click.IntRange(min=0), help="Of which layer. [default: the last]"
    ),
]


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a function the options of `train_moe_lm.py`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
