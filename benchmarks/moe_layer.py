"""Value and gradient of one Flax MoE layer on CPU devices: its products and rows in turn.

python benchmarks/moe_layer.py --experts 8 --features 128 --hidden 192
"""

from __future__ import annotations

import functools
import statistics
import time

import click
import jax
import jax.numpy as jnp
import numpy as np


@click.command(context_settings={"show_default": True})
@click.option("--devices", type=click.IntRange(1), default=4)
@click.option("--tokens", type=click.IntRange(1), default=2048, help="Over all devices.")
@click.option("--experts", type=click.IntRange(1), default=8)
@click.option("--top-k", type=click.IntRange(1), default=2)
@click.option("--features", type=click.IntRange(1), default=128)
@click.option("--hidden", type=click.IntRange(1), default=192)
@click.option("--repeats", type=click.IntRange(1), default=9)
def main(
    devices: int, tokens: int, experts: int, top_k: int, features: int, hidden: int, repeats: int
) -> None:
    """Milliseconds, medians."""
    jax.config.update("jax_num_cpu_devices", devices)
    from flax import nnx

    import jax_fusco as jf
    from jax_fusco.flax import MoE
    from jax_fusco.flax import experts as products

    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("expert",))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((tokens, features), np.float32))

    def step(rows: str):
        moe = MoE(features, hidden, num_experts=experts, top_k=top_k, mesh=mesh, rows=rows,
                  rngs=nnx.Rngs(0))  # fmt: skip
        graph, state = nnx.split(moe)

        def loss(state, x):
            return jnp.square(nnx.merge(graph, state)(x)[0]).mean()

        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(state, x).compile()
        return functools.partial(program, state, x)

    products.grouped_matmul = functools.partial(jf.grouped_matmul, implementation="xla")
    ways = {"with lax.ragged_dot": step("assignment")}
    products.grouped_matmul = jf.grouped_matmul
    jax.clear_caches()
    ways |= {f"rows={rows!r}": step(rows) for rows in ("assignment", "token")}
    values = {name: float(way()[0]) for name, way in ways.items()}
    assert np.ptp(list(values.values())) < 1e-5 * max(values.values()), values
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(way())
            found[name].append((time.perf_counter() - start) * 1e3)
    for name, each in found.items():
        print(f"{name:20} {statistics.median(each):7.1f} ms")


if __name__ == "__main__":
    main()
