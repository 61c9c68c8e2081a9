"""What runs on the devices: the first state, a training step, a validation step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .model import ModelConfig, Transformer


@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained. Weights scale the router's losses, relative to nats per byte."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int
    weight_decay: float
    clip: float
    balance_weight: float
    z_weight: float
    seed: int


def make_mesh(axes: dict[str, int]) -> Mesh:
    """The first devices as a mesh of these axes; "data" is the first, experts lie along the rest.

    Devices of a process follow each other, so that each process is a node of its own.
    """
    devices = np.array(jax.devices()[: math.prod(axes.values())]).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def make_optimizer(config: TrainConfig) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW with clipping, a linear warm-up and a cosine down to a tenth; decays matrices only."""
    warmup = min(config.warmup, max(1, config.steps // 4))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(config.steps, warmup + 1), config.learning_rate / 10
    )
    adamw = optax.adamw(
        schedule,
        b1=0.9,
        b2=0.98,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), adamw), schedule


class Trainer:
    """The compiled steps for one model, one optimizer and one mesh.

    A state is the `nnx.State` of `(model, optimizer)`: parameters, the optimizer's moments and its
    count of steps. All of it is laid out on the mesh by the parameters' own sharding metadata:
    experts are split over "expert", everything else is the same everywhere.

    In a run of several processes each of them calls everything here, in the same order.
    """

    def __init__(self, model_config: ModelConfig, train_config: TrainConfig, mesh: Mesh):
        self.model_config, self.mesh = model_config, mesh
        self._train_config = train_config
        self._tx, self.schedule = make_optimizer(train_config)
        with jax.set_mesh(mesh):
            self.graphdef, abstract = nnx.split(nnx.eval_shape(self._create))
        shardings = nnx.get_named_sharding(abstract, mesh)
        self.abstract_state = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
        )
        self._initial = jax.jit(lambda: nnx.state(self._create()), out_shardings=shardings)
        # (state, batch, key, notices) to (state, statistics); `train_step` makes the arguments.
        self.compiled_step = jax.jit(
            self._train_step, donate_argnums=0, out_shardings=(shardings, self._everywhere())
        )
        self._validate = jax.jit(self._validation_step, out_shardings=self._everywhere())
        self._route = jax.jit(
            self._routing, static_argnames="layer", out_shardings=self._everywhere()
        )

    def _create(self) -> tuple[Transformer, nnx.Optimizer]:
        model = Transformer(self.model_config, rngs=nnx.Rngs(self._train_config.seed))
        return model, nnx.Optimizer(model, self._tx, wrt=nnx.Param)

    def _everywhere(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def initial_state(self) -> nnx.State:
        """Fresh parameters and moments; the same values on every mesh."""
        with jax.set_mesh(self.mesh):
            return self._initial()

    def train_step(
        self, state: nnx.State, batch: jax.Array, key: np.ndarray, notice: int = 0
    ) -> tuple[nnx.State, dict[str, jax.Array]]:
        """One update from `batch[B, context + 1]`; `state` is given up. Returns before it is done.

        `key` (uint32, from `jax.random.key_data`) is the run's; each step folds its number in.
        The statistics hold the largest `notice` of all processes.
        """
        notices = self.place(
            self.mesh.size, lambda start, stop: np.full(stop - start, notice, np.int32)
        )
        with jax.set_mesh(self.mesh):
            return self.compiled_step(state, batch, key, notices)

    def validation_loss(self, state: nnx.State, batches: list[np.ndarray]) -> float:
        """Mean loss over `batches`, nats per byte."""
        with jax.set_mesh(self.mesh):
            losses = [float(self._validate(state, self.put(batch))) for batch in batches]
        return float(np.mean(losses))

    def routing(self, state: nnx.State, batch: np.ndarray, layer: int) -> np.ndarray:
        """Expert ids `[R, T, k]` of the bytes of each rank of the first replica, in one layer."""
        with jax.set_mesh(self.mesh):
            ids = np.asarray(self._route(state, self.put(batch), layer=layer))
        replicas, k = self.mesh.shape["data"], ids.shape[-1]
        return ids.reshape(replicas, self.mesh.size // replicas, -1, k)[0]

    def place(self, rows: int, read: Callable[[int, int], np.ndarray]) -> jax.Array:
        """An array whose rows are spread over all devices; `read(start, stop)` gives some of them.

        Each process reads only the rows that lie on its own devices.
        """
        sharding = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        tail = read(0, 1).shape[1:]

        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            return read(start, stop)

        return jax.make_array_from_callback((rows, *tail), sharding, shard)

    def put(self, batch: np.ndarray) -> jax.Array:
        """`batch`, which every process has, spread over all devices by its rows."""
        return self.place(len(batch), lambda start, stop: batch[start:stop])

    def _train_step(
        self, state: nnx.State, batch: jax.Array, key: jax.Array, notices: jax.Array
    ) -> tuple[nnx.State, dict[str, jax.Array]]:
        model, optimizer = nnx.merge(self.graphdef, state)
        config = self._train_config
        step = optimizer.step[...]
        step_key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
        dropout_key = step_key if self.model_config.dropout else None

        def objective(model: Transformer) -> tuple[jax.Array, dict[str, jax.Array]]:
            loss, layers = _loss(model, batch, dropout_key)
            stats = _router_stats(layers, batch)
            router = (
                config.balance_weight * stats["balance_loss"] + config.z_weight * stats["z_loss"]
            )
            return loss + router, {"loss": loss, **stats}

        grads, stats = nnx.grad(objective, has_aux=True)(model)
        stats["grad_norm"] = optax.tree.norm(grads)
        stats["learning_rate"] = self.schedule(step)
        stats["notice"] = notices.max()
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), stats

    def _validation_step(self, state: nnx.State, batch: jax.Array) -> jax.Array:
        model, _ = nnx.merge(self.graphdef, state)
        return _loss(model, batch, None)[0]

    def _routing(self, state: nnx.State, batch: jax.Array, *, layer: int) -> jax.Array:
        model, _ = nnx.merge(self.graphdef, state)
        return model(batch.astype(jnp.int32)[:, :-1])[1][layer].expert_ids


def _loss(
    model: Transformer, batch: jax.Array, dropout_key: jax.Array | None
) -> tuple[jax.Array, list[Any]]:
    tokens = batch.astype(jnp.int32)
    logits, layers = model(tokens[:, :-1], dropout_key)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean(), layers


def _router_stats(layers: list[Any], batch: jax.Array) -> dict[str, jax.Array]:
    """Means over the layers, and `expert_tokens[layers, experts]`, `dropped` as a share."""
    expert_tokens = jnp.stack([m.tokens_per_expert for m in layers])
    assignments = jnp.maximum(1, expert_tokens.sum())
    return {
        "balance_loss": jnp.stack([m.load_balance_loss for m in layers]).mean(),
        "z_loss": jnp.stack([m.router_z_loss for m in layers]).mean(),
        "dropped": jnp.stack([m.dropped for m in layers]).sum() / assignments,
        "expert_tokens": expert_tokens,
    }
