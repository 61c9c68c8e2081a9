"""Trains a byte-level mixture-of-experts language model with expert parallelism, on CPU devices.

    python examples/train_moe_lm.py

reads the Python standard library's own sources, trains for a few minutes on four CPU devices, and
leaves in runs/moe_lm: metrics.jsonl, loss.png, experts.png, sample.txt and checkpoints. The same
command goes on where an interrupted run stopped. docs/training.md describes it, docs/launch.md how
several processes train together.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
import time
from dataclasses import asdict, fields
from typing import Any

import click
from moe_lm.arguments import arrange, check, check_count, several_processes
from moe_lm.data import Corpus, DataError, Windows, load_corpus, validation_batches
from moe_lm.folder import check_same_run, prepare_folder
from moe_lm.options import options as with_options

START = time.monotonic()
PROMPTS = ("import ", "def ", "class ", "    def __init__(self")


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
    axes, several = arrange(options), several_processes(options)
    corpus = load_corpus(options["data"])
    windows = Windows(corpus.train, options["context"], options["seed"])
    start_cpu_devices(axes["expert"] if several else math.prod(axes.values()))
    if options["implementation"] == "fused":
        check_engine()

    from moe_lm.processes import Processes, join

    from jax_fusco import Topology

    processes = join(options) if several else Processes()
    if several:
        check_count(processes.count, axes)
    options = {**options, "topology": Topology() if options["topology"] else None}
    folder = options["output"]
    facts = {"options": identity(options), "text": corpus.fingerprint}
    with processes.watching(f"Start all again: the run goes on from what {folder} holds."):
        if processes.first:
            prepare_folder(folder, options["fresh"])
        shared = json.loads(processes.share("facts", json.dumps(facts)))
        check_same_run(shared, facts, "process 0", "give every process the same")
        return train(options, axes, corpus, windows, facts, processes)


def train(
    options: dict[str, Any],
    axes: dict[str, int],
    corpus: Corpus,
    windows: Windows,
    facts: dict[str, Any],
    processes: Any,
) -> str | None:
    """What `run` does once all processes are there."""
    import jax
    import numpy as np
    from moe_lm import loop
    from moe_lm.checkpoint import Checkpoints
    from moe_lm.model import ModelConfig
    from moe_lm.training import TrainConfig, Trainer, make_mesh

    context, batch, folder = options["context"], options["batch"], options["output"]
    validation = validation_batches(corpus.valid, context, batch, options["eval_batches"])
    checkpoints = Checkpoints(folder / "checkpoints")
    saved = checkpoints.read_run()
    if saved:
        check_same_run(saved, facts, f"the run in {folder}")

    trainer = Trainer(select(ModelConfig, options), select(TrainConfig, options), make_mesh(axes))
    if saved:
        state = checkpoints.restore(trainer.abstract_state)
        key = np.array(saved["key"], np.uint32)
        progress = loop.Progress(state, saved["step"], saved["position"], key)
    else:
        key = np.asarray(jax.random.key_data(jax.random.key(options["seed"])))
        progress = loop.Progress(trainer.initial_state(), 0, 0, key)
    processes.say(describe(corpus, trainer, progress, options, processes.count))

    log = loop.MetricsLog(folder / "metrics.jsonl", progress.step) if processes.first else None
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
    if log:
        log.close()
    checkpoints.close()
    if reason:
        processes.say(
            f"Stopped by {reason} at step {progress.step} of {config.steps}, which is saved: "
            "the same command goes on from there."
        )
    if reason and reason.startswith("SIG"):
        return reason
    finish(options, trainer, progress, validation[0], processes)
    return None


def finish(
    options: dict[str, Any], trainer: Any, progress: Any, batch: Any, processes: Any
) -> None:
    """Writes the routing of `batch` if asked for, the pictures, and a sample."""
    from moe_lm import loop, report, routing, sampling

    folder = options["output"]
    if options["save_routing"]:
        layer = (
            options["layers"] - 1 if options["routing_layer"] is None else options["routing_layer"]
        )
        ids = trainer.routing(progress.state, batch, layer)
        if processes.first:
            routing.save(options["save_routing"], ids, options["experts"], layer, progress.step)
        processes.say(f"wrote {options['save_routing']}: layer {layer}, {routing.describe(ids)}")
    texts = sampling.generate(
        trainer,
        progress.state,
        list(options["prompt"] or PROMPTS),
        length=options["sample_bytes"],
        temperature=options["temperature"],
        seed=options["seed"],
    )
    if not processes.first:
        return
    lines = loop.MetricsLog.read(folder / "metrics.jsonl")
    title = f"{options['layers']} MoE layers, {options['experts']} experts, top {options['top_k']}"
    for path in report.draw(lines, folder, options["batch"] * options["context"], title):
        click.echo(f"wrote {path}")
    sample = "\n\n----\n\n".join(texts) + "\n"
    (folder / "sample.txt").write_text(sample)
    click.echo(f"wrote {folder / 'sample.txt'}:\n\n{sample}")


def identity(options: dict[str, Any]) -> dict[str, Any]:
    """The options that make a run what it is: another value would not continue the same run."""
    from moe_lm.model import ModelConfig
    from moe_lm.training import TrainConfig

    values = {**asdict(select(ModelConfig, options)), **asdict(select(TrainConfig, options))}
    free = ("steps", "implementation", "topology")
    return {name: values[name] for name in values if name not in free}


def describe(
    corpus: Corpus, trainer: Any, progress: Any, options: dict[str, Any], processes: int
) -> str:
    """What is about to be trained on what."""
    import jax
    from flax import nnx

    model, _ = nnx.merge(trainer.graphdef, progress.state)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    mesh = " x ".join(f"{name} {size}" for name, size in trainer.mesh.shape.items())
    lines = [
        f"text: {corpus.name}, {corpus.num_files} files, {len(corpus.train) / 1e6:.1f} MB to train"
        f" on and {len(corpus.valid) / 1e6:.2f} MB to validate",
        f"model: {count / 1e6:.1f} M parameters, {options['layers']} layers, "
        f"{options['experts']} experts of which {options['top_k']} a byte",
        f"mesh: {mesh}, shuffle: {options['implementation'] or 'best available'}",
    ]
    if options["topology"]:
        nodes = options["topology"].describe(trainer.mesh.shape).partition("\n")[0]
        lines.append(
            f"topology: {nodes}, in {'one process' if processes == 1 else 'a process each'}"
        )
    if progress.step:
        lines.append(f"resuming from step {progress.step} of {options['steps']}")
    return "\n".join(lines)


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@with_options
def command(**chosen: Any) -> None:
    """Train a byte-level mixture-of-experts language model with expert parallelism.

    Run it again to go on from the newest checkpoint in --output. Ctrl-C saves and stops. Several
    processes train together if each is given --coordinator, --processes and --process, or
    --distributed.
    """
    check(chosen)
    if chosen.pop("dropless"):
        chosen["capacity_factor"] = None
    try:
        signal_name = run(chosen)
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
