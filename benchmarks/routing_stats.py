"""The share of a training step that RoutingStats takes, on the example's model and batch.

    PYTHONPATH=examples python benchmarks/routing_stats.py

Times, in turn: one step of examples/train_moe_lm.py with its defaults (four CPU devices), and the
same step that also updates ten statistics of all its layers, each with ids of its own. One update
alone would be lost in the noise.
"""

from __future__ import annotations

import time
from typing import Any

from train_moe_lm import command, start_cpu_devices

UPDATES = 10


def main(rounds: int = 30) -> None:
    start_cpu_devices(4)
    import jax
    import numpy as np
    from moe_lm.model import ModelConfig
    from moe_lm.training import TrainConfig, Trainer, make_mesh

    import jax_fusco as jf

    defaults: dict[str, Any] = command.make_context("train_moe_lm", []).params
    model = ModelConfig(**{n: defaults[n] for n in ModelConfig.__annotations__ if n in defaults})
    train = TrainConfig(**{n: defaults[n] for n in TrainConfig.__annotations__})
    trainer = Trainer(model, train, make_mesh({"data": 1, "expert": 4}))
    rng = np.random.default_rng(0)
    batch = trainer.put(rng.integers(0, 256, (train.batch, model.context + 1)).astype(np.uint8))
    ids = rng.integers(0, model.experts, (train.batch, model.layers, model.context, model.top_k))
    placed = trainer.put(ids.astype(np.int32))
    key = np.asarray(jax.random.key_data(jax.random.key(0)))
    notices = trainer.place(trainer.mesh.size, lambda i, j: np.zeros(j - i, np.int32))

    def step(every: tuple[jf.RoutingStats, ...], state: Any) -> Any:
        counted = tuple(
            stats.update((placed + i).swapaxes(0, 1) % model.experts)
            for i, stats in enumerate(every)
        )
        return counted, *trainer.compiled_step(state, batch, key, notices)

    state = trainer.initial_state()
    every = tuple(jf.RoutingStats.zeros(model.experts, model.layers) for _ in range(UPDATES))
    with jax.set_mesh(trainer.mesh):
        run = jax.jit(step, donate_argnums=(0, 1))
        times = np.zeros((rounds, 2))
        for turn in times:
            for i, stats in enumerate(((), every)):
                start = time.perf_counter()
                counted, state, _ = jax.block_until_ready(run(stats, state))
                turn[i] = 1e3 * (time.perf_counter() - start)
            every = counted
    alone = np.median(times[5:, 0])
    cost = np.percentile(times[5:, 1] - times[5:, 0], (25, 50, 75)) / UPDATES
    low, middle, high = cost
    print(f"step {alone:.1f} ms, statistics of {model.layers} layers {middle:.2f} ms "
          f"(quartiles {low:.2f}, {high:.2f}): {100 * middle / alone:.2f} %")  # fmt: skip


if __name__ == "__main__":
    main()
