"""The share of a training step that RoutingStats takes, on the example's model and batch.

    PYTHONPATH=examples python benchmarks/routing_stats.py

Times, in turn: one step of examples/train_moe_lm.py with its defaults (four CPU devices), and one
update of the statistics of all its layers, jitted, from ids that are sharded like the batch.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from train_moe_lm import command, start_cpu_devices


def main(rounds: int = 15) -> None:
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
    state = trainer.initial_state()
    stats = jf.RoutingStats.zeros(model.experts, model.layers)
    update = jax.jit(lambda stats, ids: stats.update(ids.swapaxes(0, 1)), donate_argnums=0)
    steps, updates = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        state, metrics = trainer.train_step(state, batch, key)
        jax.block_until_ready((state, metrics))
        middle = time.perf_counter()
        stats = jax.block_until_ready(update(stats, placed))
        steps.append(middle - start)
        updates.append(time.perf_counter() - middle)
    step, cost = (1e3 * statistics.median(times[3:]) for times in (steps, updates))
    print(f"step {step:.1f} ms, statistics of {model.layers} layers {cost:.2f} ms: "
          f"{100 * cost / step:.2f} %")  # fmt: skip


if __name__ == "__main__":
    main()
