"""Value and gradient of one Flax MoE layer on CPU devices: its products and rows in turn.

python benchmarks/moe_layer.py

times the layer of the training example; the options are the example's, and so is what happens to
freed memory.
"""

from __future__ import annotations

import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

RAGGED = "assignment, lax.ragged_dot"


def programs(spec: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Each way to compute value and gradient of the layer's mean square."""
    from flax import nnx

    import jax_fusco as jf
    from jax_fusco.flax import MoE
    from jax_fusco.flax import experts as products

    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[: spec["devices"]]), ("expert",))
    x = np.random.default_rng(0).standard_normal((spec["batch"], spec["width"]), np.float32)
    x = jax.device_put(x, jax.NamedSharding(mesh, jax.sharding.PartitionSpec("expert")))

    def program(rows: Any, implementation: str | None) -> Callable[[], Any]:
        moe = MoE(
            spec["width"],
            spec["expert_width"],
            num_experts=spec["experts"],
            top_k=spec["top_k"],
            capacity_factor=spec["capacity_factor"],
            mesh=mesh,
            rows=rows,
            rngs=nnx.Rngs(0),
        )
        graph, state = nnx.split(moe)

        def loss(state: Any, x: jax.Array) -> jax.Array:
            return jnp.square(nnx.merge(graph, state)(x)[0]).mean()

        products.grouped_matmul = functools.partial(
            jf.grouped_matmul, implementation=implementation
        )
        jax.clear_caches()
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(state, x).compile()
        products.grouped_matmul = jf.grouped_matmul
        return functools.partial(step, state, x)

    return {
        RAGGED: program("assignment", "xla"),
        "assignment": program("assignment", None),
        "token": program("token", None),
    }


@click.command(context_settings={"show_default": True})
@click.option("--devices", type=click.IntRange(1), default=4)
@click.option("--batch", type=click.IntRange(1), default=2048, help="Tokens over all devices.")
@click.option("--experts", type=click.IntRange(1), default=16)
@click.option("--top-k", type=click.IntRange(1), default=2)
@click.option("--width", type=click.IntRange(1), default=128)
@click.option("--expert-width", type=click.IntRange(1), default=192)
@click.option("--capacity-factor", type=click.FloatRange(0, min_open=True), default=1.25)
@click.option("--repeats", type=click.IntRange(1), default=9)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Appends what it found.")
def main(repeats: int, file: Path | None, **spec: Any) -> None:
    """Milliseconds, medians of rounds in which each way has its turn."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    importlib.import_module("train_moe_lm").start_cpu_devices(spec["devices"])
    ways = programs(spec)
    values = {name: float(way()[0]) for name, way in ways.items()}
    del values["token"]  # it drops other assignments where a buffer is full
    assert np.ptp(list(values.values())) < 1e-5 * max(values.values()), values
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(way())
            times[name].append((time.perf_counter() - start) * 1e3)
    kernels = 3 * spec["width"] * spec["expert_width"]
    gigaflops = 3 * 2 * spec["batch"] * spec["top_k"] * kernels / 1e9
    click.echo(f"{gigaflops:.2f} Gflop in products; {spec}")
    found = {name: statistics.median(each) for name, each in times.items()}
    for name, each in found.items():
        click.echo(f"{name:27} {each:8.1f} ms  {found[RAGGED] / each:5.1f}x")
    if file is not None:
        with file.open("a") as out:
            out.write(json.dumps({**spec, "repeats": repeats, "ms": found}) + "\n")


if __name__ == "__main__":
    main()
