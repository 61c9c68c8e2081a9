"""One training step of the Flax block, compiled for 1, 8 and 64 H100s."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from flax import nnx
from gpu_programs import UNWANTED, compiled, custom_calls
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_fusco.flax import MoE


def step_and_arguments(mesh):
    """SGD on a Qwen3-like block, parameters and tokens as shapes on the mesh."""

    def create():
        return MoE(
            2048,
            768,
            num_experts=128,
            top_k=8,
            mesh=mesh,
            implementation="fused",
            dtype=jnp.bfloat16,
            param_dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )

    graph, state = nnx.split(nnx.eval_shape(create))
    shardings = nnx.get_named_sharding(state, mesh)
    state = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings
    )
    x = jax.ShapeDtypeStruct(
        (mesh.size, 1024, 2048), jnp.bfloat16, sharding=NamedSharding(mesh, P("expert"))
    )

    def step(state, x):
        def loss(state, x):
            y, metrics = nnx.merge(graph, state)(x)
            return (
                jnp.square(y.astype(jnp.float32)).mean()
                + 0.01 * metrics.load_balance_loss
                + 0.001 * metrics.router_z_loss
            )

        value, (gradients, to_previous_layer) = jax.value_and_grad(loss, argnums=(0, 1))(state, x)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, state, gradients), to_previous_layer

    return step, (state, x)


def test_a_training_step_shuffles_by_our_calls_alone(mesh):
    step, arguments = step_and_arguments(mesh)
    text = compiled(step, arguments).as_text()
    assert custom_calls(text) == {
        "plan": 1,
        "gather_rows": 2,
        "gather_rows_weighted": 1,
        "reduce_rows": 2,
    }
    # The router sorts to choose, and gradients of replicated parameters are summed over the ranks;
    # what XLA made of the shuffle itself carries its scope's name.
    ours = [line for line in text.splitlines() if re.search(r'op_name="[^"]*jax_fusco\.', line)]
    assert ours
    assert [line for line in ours if UNWANTED.search(line)] == []
    everywhere = [line for line in text.splitlines() if UNWANTED.search(line)]
    assert not any("all-to-all" in line or "all-gather" in line for line in everywhere)
