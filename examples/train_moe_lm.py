"""Trains a byte-level mixture-of-experts language model with expert parallelism, on CPU devices.

    python examples/train_moe_lm.py

reads the Python standard library's own sources, trains for a few minutes on four CPU devices, and
leaves in runs/moe_lm: metrics.jsonl, loss.png, experts.png, sample.txt and checkpoints. The same
command goes on where an interrupted run stopped. docs/training.md describes it.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
from moe_lm.arguments import check, parse_mesh
from moe_lm.data import Corpus, DataError, Windows, load_corpus, validation_batches
from moe_lm.folder import check_same_run, prepare_folder

START = time.monotonic()
PROMPTS = ("import ", "def ", "class ", "    def __init__(self")
COUNT = click.IntRange(min=1)
SHARE = click.FloatRange(0.0, 1.0, max_open=True)
POSITIVE = click.FloatRange(0.0, min_open=True)
NOT_NEGATIVE = click.FloatRange(0.0)


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory for the next step, instead of giving it back page by page.

    XLA:CPU allocates every buffer anew in each step; a third of a step's time went into the page
    faults that this avoids.
    """
    mmap_max, trim_threshold, arena_max = -4, -1, -8
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for name, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (arena_max, 1)):
        mallopt(name, value)


def start_cpu_devices(count: int) -> None:
    """Makes `count` CPU devices. Only possible before JAX starts its backend."""
    import jax

    keep_freed_memory()

    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join(
        flag for flag in flags if "xla_force_host_platform_device_count" not in flag
    )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def check_engine() -> None:
    """One sentence where the fused engine was asked for and cannot work."""
    import jax_fusco

    try:
        jax_fusco.register()
    except ImportError as error:
        raise click.ClickException(f"--{error}") from None


def select(kind: Any, options: dict[str, Any]) -> Any:
    """A dataclass from the options that bear its fields' names."""
    return kind(**{field.name: options[field.name] for field in fields(kind)})


def run(options: dict[str, Any]) -> str | None:
    """Trains, then writes the sample and the pictures; returns the name of a signal that came."""
    context, batch, folder = options["context"], options["batch"], options["output"]
    corpus = load_corpus(options["data"])
    windows = Windows(corpus.train, context, options["seed"])
    validation = validation_batches(corpus.valid, context, batch, options["eval_batches"])
    start_cpu_devices(options["devices"])
    if options["implementation"] == "fused":
        check_engine()
    prepare_folder(folder, options["fresh"])

    import jax
    import numpy as np
    from moe_lm import loop, report, sampling
    from moe_lm.checkpoint import Checkpoints
    from moe_lm.model import ModelConfig
    from moe_lm.training import TrainConfig, Trainer, make_mesh

    checkpoints = Checkpoints(folder / "checkpoints")
    model_config, train_config = select(ModelConfig, options), select(TrainConfig, options)
    facts = {"options": identity(options), "text": corpus.fingerprint}
    saved = checkpoints.read_run()
    if saved:
        check_same_run(saved, facts, folder)

    data_size, expert_size = parse_mesh(options["mesh"], options["devices"])
    trainer = Trainer(model_config, train_config, make_mesh(data_size, expert_size))
    if saved:
        state = checkpoints.restore(trainer.abstract_state)
        key = np.array(saved["key"], np.uint32)
        progress = loop.Progress(state, saved["step"], saved["position"], key)
    else:
        key = np.asarray(jax.random.key_data(jax.random.key(options["seed"])))
        progress = loop.Progress(trainer.initial_state(), 0, 0, key)
    describe(corpus, trainer, progress, options)

    log = loop.MetricsLog(folder / "metrics.jsonl", progress.step)
    minutes = options["max_minutes"]
    config = loop.LoopConfig(
        steps=options["steps"],
        batch=batch,
        context=context,
        save_every=options["save_every"],
        eval_every=options["eval_every"],
        deadline=START + 60 * minutes if minutes else None,
    )
    reason = loop.train(trainer, progress, windows, validation, checkpoints, log, config, facts)
    log.close()
    checkpoints.close()
    if reason:
        click.echo(
            f"Stopped by {reason} at step {progress.step} of {config.steps}, which is saved: "
            "the same command goes on from there."
        )
    if reason and reason.startswith("SIG"):
        return reason

    lines = loop.MetricsLog.read(folder / "metrics.jsonl")
    title = f"{options['layers']} MoE layers, {options['experts']} experts, top {options['top_k']}"
    for path in report.draw(lines, folder, batch * context, title):
        click.echo(f"wrote {path}")
    texts = sampling.generate(
        trainer,
        progress.state,
        list(options["prompt"] or PROMPTS),
        length=options["sample_bytes"],
        temperature=options["temperature"],
        seed=options["seed"],
    )
    sample = "\n\n----\n\n".join(texts) + "\n"
    (folder / "sample.txt").write_text(sample)
    click.echo(f"wrote {folder / 'sample.txt'}:\n\n{sample}")
    return None


def identity(options: dict[str, Any]) -> dict[str, Any]:
    """The options that make a run what it is: another value would not continue the same run."""
    from moe_lm.model import ModelConfig
    from moe_lm.training import TrainConfig

    values = {**asdict(select(ModelConfig, options)), **asdict(select(TrainConfig, options))}
    return {name: values[name] for name in values if name not in ("steps", "implementation")}


def describe(corpus: Corpus, trainer: Any, progress: Any, options: dict[str, Any]) -> None:
    """Prints what is about to be trained on what."""
    import jax
    from flax import nnx

    model, _ = nnx.merge(trainer.graphdef, progress.state)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    mesh = " x ".join(f"{name} {size}" for name, size in trainer.mesh.shape.items())
    click.echo(
        f"text: {corpus.name}, {corpus.num_files} files, {len(corpus.train) / 1e6:.1f} MB to train"
        f" on and {len(corpus.valid) / 1e6:.2f} MB to validate\n"
        f"model: {count / 1e6:.1f} M parameters, {options['layers']} layers, "
        f"{options['experts']} experts of which {options['top_k']} a byte\n"
        f"mesh: {mesh}, shuffle: {options['implementation'] or 'best available'}"
    )
    if progress.step:
        click.echo(f"resuming from step {progress.step} of {options['steps']}")


CONTEXT = {"show_default": True, "max_content_width": 100}


@click.command(context_settings=CONTEXT)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="File or folder of text. [default: the Python standard library's sources]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("runs/moe_lm"),
    help="Folder for checkpoints, metrics, pictures, sample.",
)
@click.option("--fresh", is_flag=True, help="Forget what an earlier run left in the folder.")
@click.option(
    "--max-minutes",
    type=NOT_NEGATIVE,
    default=4.0,
    help="Stop training, and save, this long after the start; 0 is no limit.",
)
@click.option("--devices", type=COUNT, default=4, help="CPU devices to make.")
@click.option(
    "--mesh", metavar="DATAxEXPERT", help="Their arrangement. [default: all along expert]"
)
@click.option(
    "--implementation",
    type=click.Choice(["fused", "xla"]),
    help="The shuffle. [default: the best available]",
)
@click.option(
    "--steps",
    type=COUNT,
    default=1000,
    help="Updates in all, also the length of the learning rate's schedule.",
)
@click.option("--batch", type=COUNT, default=8, help="Sequences a step, over all devices.")
@click.option("--context", type=click.IntRange(min=8), default=256, help="Bytes a sequence.")
@click.option("--layers", type=COUNT, default=4, help="Transformer layers.")
@click.option("--width", type=COUNT, default=128, help="Features of a byte.")
@click.option("--heads", type=COUNT, default=2, help="Attention heads.")
@click.option("--experts", type=COUNT, default=8, help="Experts a layer.")
@click.option("--top-k", type=COUNT, default=2, help="Experts a byte.")
@click.option("--expert-width", type=COUNT, default=192, help="Hidden features of an expert.")
@click.option(
    "--shared-experts",
    type=click.IntRange(min=0),
    default=0,
    help="Experts that every byte passes.",
)
@click.option(
    "--capacity-factor",
    type=NOT_NEGATIVE,
    default=1.25,
    help="Receive buffer over an even share; what finds no room drops. 0: room for everything.",
)
@click.option(
    "--balance-weight",
    type=NOT_NEGATIVE,
    default=0.01,
    help="Weight of the experts' load-balance loss.",
)
@click.option("--z-weight", type=NOT_NEGATIVE, default=0.001, help="Weight of the router's z-loss.")
@click.option(
    "--dropout", type=SHARE, default=0.0, help="Share of each branch's features set to zero."
)
@click.option("--learning-rate", type=POSITIVE, default=3e-3, help="AdamW's peak rate.")
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=40,
    help="Steps of linear warm-up; a cosine follows.",
)
@click.option("--weight-decay", type=NOT_NEGATIVE, default=0.1, help="AdamW's decay of matrices.")
@click.option("--clip", type=POSITIVE, default=1.0, help="Largest norm of a gradient.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    help="Of parameters, order of the text, dropout, sample.",
)
@click.option("--save-every", type=COUNT, default=100, help="Steps between checkpoints.")
@click.option("--eval-every", type=COUNT, default=100, help="Steps between validations.")
@click.option("--eval-batches", type=COUNT, default=8, help="Batches of a validation.")
@click.option(
    "--prompt",
    multiple=True,
    help="Beginning of a sample; may be repeated.  [default: some Python]",
)
@click.option("--sample-bytes", type=click.IntRange(min=2), default=400, help="Length of a sample.")
@click.option(
    "--temperature",
    type=NOT_NEGATIVE,
    default=0.7,
    help="Of the sample; 0 takes the likeliest byte.",
)
def command(**options: Any) -> None:
    """Train a byte-level mixture-of-experts language model with expert parallelism.

    Run it again to go on from the newest checkpoint in --output. Ctrl-C saves and stops.
    """
    check(options)
    options["capacity_factor"] = options["capacity_factor"] or None
    try:
        signal_name = run(options)
    except DataError as error:
        raise click.ClickException(str(error)) from error
    if signal_name:
        sys.exit(130 if signal_name == "SIGINT" else 143)


def main() -> None:
    """Runs the command; an argument error is one sentence and exit status 2."""
    try:
        command.main(standalone_mode=False)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        click.echo(f"Error: {error.format_message()}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
