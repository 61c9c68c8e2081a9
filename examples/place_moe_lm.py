"""What placement and pruning do to a model that train_moe_lm.py trained.

    python examples/place_moe_lm.py --run runs/moe_lm --ranks 8

reads the newest checkpoint, counts the routing of training text, finds a placement, applies it, and
writes to --out: routing.npz for `jax-fusco placement`, placement.json, and pruning.json and
pruning.png: validation loss against distinct ranks per token, for each N, method, and with and
without fine-tuning. docs/experts.md describes it.
"""

from __future__ import annotations

import json
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from moe_lm.data import DataError, Windows, load_corpus, validation_batches
from train_moe_lm import start_cpu_devices


def read_options(run: Path) -> dict[str, Any]:
    """The options of a run, from its newest checkpoint."""
    from moe_lm.checkpoint import Checkpoints

    saved = None
    if (run / "checkpoints").is_dir():  # which opening would make
        checkpoints = Checkpoints(run / "checkpoints")
        saved = checkpoints.read_run()
        checkpoints.close()
    if saved is None:
        raise click.ClickException(f"--run: {run} holds no checkpoint of train_moe_lm.py.")
    return {**saved["options"], **{key: saved[key] for key in ("step", "position", "key", "text")}}


def check(options: dict[str, Any], ranks: int, devices: int) -> None:
    """Raises a one-sentence error for options that do not fit the run."""
    experts, batch = options["experts"], options["batch"]
    for name, count in (("--ranks", ranks), ("--devices", devices)):
        if experts % count:
            raise click.ClickException(f"{name}: {count} does not divide the {experts} experts.")
    if batch % devices:
        raise click.ClickException(f"--devices: {devices} does not divide the batch of {batch}.")


def select(kind: Any, options: dict[str, Any]) -> Any:
    """A dataclass from the options that bear its fields' names."""
    names = [field.name for field in fields(kind) if field.name in options]
    return kind(**{name: options[name] for name in names})


class Study:
    """A trained model, its text, and what its routers say of it."""

    def __init__(self, run: Path, options: dict[str, Any], eval_batches: int):
        from moe_lm.checkpoint import Checkpoints
        from moe_lm.model import ModelConfig
        from moe_lm.training import TrainConfig

        try:
            corpus = load_corpus(options["data"])
        except DataError as error:
            raise click.ClickException(str(error)) from error
        if corpus.fingerprint != options["text"]:
            raise click.ClickException(f"--data: the run in {run} read another text.")
        context, batch = options["context"], options["batch"]
        self.windows = Windows(corpus.train, context, options["seed"])
        self.validation = validation_batches(corpus.valid, context, batch, eval_batches)
        self.options = options
        self.model_config = select(ModelConfig, {**options, "implementation": None})
        self.train_config = select(TrainConfig, options)
        self.trainer = self.make_trainer(None)
        checkpoints = Checkpoints(run / "checkpoints")
        self.state = checkpoints.restore(self.trainer.abstract_state)
        checkpoints.close()

    def make_trainer(self, routers: list[Any] | None) -> Any:
        """A trainer whose blocks have these routers instead of their own."""
        import jax
        from flax import nnx
        from moe_lm.model import Transformer
        from moe_lm.training import Trainer, make_mesh

        class Limited(Trainer):
            def _create(self) -> tuple[Transformer, nnx.Optimizer]:
                model, optimizer = super()._create()
                for block, router in zip(model.blocks, routers or [], strict=bool(routers)):
                    block.moe.router = router
                return model, optimizer

        mesh = make_mesh({"data": 1, "expert": jax.device_count()})
        return Limited(self.model_config, self.train_config, mesh)

    def route(self, trainer: Any, state: Any, batches: list[Any]) -> tuple[Any, Any]:
        """(expert_ids [layers, N, k], logits [layers, N, E]) of all bytes of the batches."""
        import jax
        import jax.numpy as jnp
        import numpy as np
        from flax import nnx

        @jax.jit
        def one(state: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
            model, _ = nnx.merge(trainer.graphdef, state)
            x, ids, logits = model.embed(batch.astype(jnp.int32)[:, :-1]), [], []
            for block in model.blocks:
                normed = block.moe_norm(x + block.attention(block.attention_norm(x)))
                logits.append(normed @ block.moe.params()["router_kernel"])
                x, metrics = block(x, None)
                ids.append(metrics.expert_ids)
            return jnp.stack(ids), jnp.stack(logits)

        with jax.set_mesh(trainer.mesh):
            found = [jax.device_get(one(state, trainer.put(batch))) for batch in batches]
        layers = len(found[0][0])
        return tuple(
            np.concatenate([part[i].reshape(layers, -1, part[i].shape[-1]) for part in found], 1)
            for i in range(2)
        )  # type: ignore[return-value]

    def tune(self, trainer: Any, state: Any, steps: int) -> Any:
        """Trains on; `state` stays."""
        import jax
        import numpy as np

        state = jax.tree.map(lambda a: a.copy(), state)
        key = np.array(self.options["key"], np.uint32)
        size, first = self.options["batch"], self.options["position"]
        for step in range(steps):
            batch = self.windows.batch(first + step * size, size)
            state, stats = trainer.train_step(state, trainer.put(batch), key)
            jax.block_until_ready(stats)
        return state


def limited_routers(study: Study, state: Any, ranks: int, most: int, method: str) -> list[Any]:
    """One router a layer; the similarities are those of the present state."""
    from flax import nnx

    import jax_fusco as jf
    from jax_fusco.flax import RankLimitedRouter

    model, _ = nnx.merge(study.trainer.graphdef, state)
    own = [block.moe.router for block in model.blocks]
    if method == "router":
        return [RankLimitedRouter(router, ranks, most) for router in own]
    size = study.options["batch"]
    batches = [study.windows.batch(i * size, size) for i in range(2)]
    _, logits = study.route(study.trainer, state, batches)
    return [
        RankLimitedRouter(router, ranks, most, similarity=jf.router_similarity(one))
        for router, one in zip(own, logits, strict=True)
    ]


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.option("--run", "folder", type=click.Path(path_type=Path), default=Path("runs/moe_lm"))
@click.option("--data", type=click.Path(path_type=Path), help="As it was given to the training.")
@click.option("--ranks", type=click.IntRange(2), default=8, help="Ranks to place experts on.")
@click.option("--devices", type=click.IntRange(1), default=4, help="CPU devices to run on.")
@click.option("--batches", type=click.IntRange(1), default=12, help="Of training text to count.")
@click.option("--eval-batches", type=click.IntRange(1), default=6)
@click.option("--tune-steps", type=click.IntRange(0), default=60, help="Of fine-tuning, each case.")
@click.option("--most", type=click.IntRange(1), multiple=True, help="N; default: all below k.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/placement"))
def main(
    folder: Path,
    data: Path | None,
    ranks: int,
    devices: int,
    batches: int,
    eval_batches: int,
    tune_steps: int,
    most: tuple[int, ...],
    out: Path,
) -> None:
    """Place the experts of a trained model, then limit the ranks of a token."""
    start_cpu_devices(devices)
    import numpy as np

    import jax_fusco as jf

    options = {"data": data, **read_options(folder)}
    check(options, ranks, devices)
    options["steps"] = options["step"] + tune_steps  # the end of the learning rate's schedule
    study = Study(folder, options, eval_batches)
    out.mkdir(parents=True, exist_ok=True)
    size = options["batch"]
    text = [study.windows.batch(options["position"] + i * size, size) for i in range(batches)]
    ids, logits = study.route(study.trainer, study.state, text)
    layer = len(ids) - 1
    count = ids.shape[1] // ranks * ranks
    np.savez_compressed(
        out / "routing.npz",
        expert_ids=ids[layer, :count].reshape(ranks, -1, ids.shape[-1]).astype(np.int32),
        logits=logits[layer, :count].reshape(ranks, -1, logits.shape[-1]),
        num_experts=options["experts"],
    )
    stats = jf.RoutingStats.zeros(options["experts"], len(ids)).update(ids)
    stats.save(out / "stats.npz")
    began = time.monotonic()
    placement = jf.optimize_placement(stats, ranks)
    click.echo(f"placed {len(ids)} layers in {time.monotonic() - began:.1f} s")
    click.echo(str(placement.predict(stats, row_bytes=4 * options["width"])))
    placement.save(out / "placement.json")

    before = study.trainer.validation_loss(study.state, study.validation)
    moved = study.state
    moved[0], moved[1] = placement.apply(study.state[0], study.state[1])
    after = study.trainer.validation_loss(moved, study.validation)
    click.echo(f"validation loss {before:.6f}, after the move {after:.6f}")

    def measure(routers: list[Any] | None, name: str, n: int) -> dict[str, Any]:
        trainer = study.make_trainer(routers) if routers else study.trainer
        found: dict[str, Any] = {"method": name, "max_ranks": n}
        for tuned in (False, True) if tune_steps else (False,):
            state = study.tune(trainer, moved, tune_steps) if tuned else moved
            chosen, _ = study.route(trainer, state, study.validation)
            touched = [
                [len(set(t[t >= 0] // (options["experts"] // ranks))) for t in one]
                for one in chosen
            ]
            found["tuned" if tuned else "as is"] = {
                "loss": trainer.validation_loss(state, study.validation),
                "ranks": float(np.mean(touched)),
            }
        click.echo(json.dumps(found))
        return found

    rows = [measure(None, "none", ranks)]
    for n in most or range(min(options["top_k"], ranks) - 1, 0, -1):
        for method in ("router", "similarity"):
            rows.append(measure(limited_routers(study, moved, ranks, n, method), method, n))
    facts = {"tune_steps": tune_steps, "ranks": ranks, "rows": rows}
    (out / "pruning.json").write_text(json.dumps(facts, indent=1) + "\n")
    draw(rows, out / "pruning.png")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Validation loss against ranks per token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for method, colour in (("router", "#5e9fd1"), ("similarity", "#d6604d")):
        mine = [row for row in rows if row["method"] in ("none", method)]
        for when, style in (("as is", "o--"), ("tuned", "o-")):
            points = [row[when] for row in mine if when in row]
            if points:
                label = f"{method}, {'fine-tuned' if when == 'tuned' else 'as is'}"
                axis.plot(
                    [p["ranks"] for p in points], [p["loss"] for p in points], style,
                    color=colour, label=label,
                )  # fmt: skip
    axis.set_xlabel("distinct ranks per token")
    axis.set_ylabel("validation loss, nats a byte")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
