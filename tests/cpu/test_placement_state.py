"""Placement.apply: outputs, gradients and continued training stay; what does not fit is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import make_mesh
from jax.sharding import AxisType

import jax_fusco as jf
from jax_fusco.flax import MoE, SigmoidRouter, TopKSoftmaxRouter, update_balance_bias

EXPERTS = 8


def block(seed: int = 0, **options: Any) -> MoE:
    """Every parameter that names an expert, and a shared one that does not."""
    options = {"router": SigmoidRouter(use_bias=True), "use_bias": True, **options}
    moe = MoE(
        6,
        10,
        num_experts=EXPERTS,
        top_k=2,
        num_shared_experts=1,
        capacity_factor=None,
        rngs=nnx.Rngs(seed),
        **options,
    )
    rng = np.random.default_rng(seed)
    for name in ("router_bias", "balance_bias", "wi_bias", "wo_bias"):
        if (bias := getattr(moe, name)) is not None:
            bias[...] = jnp.asarray(0.3 * rng.normal(size=bias.shape), jnp.float32)
    return moe


class Model(nnx.Module):
    """Eleven blocks, so that "blocks/10" has to come after "blocks/9"."""

    def __init__(self, layers: int = 11):
        self.blocks = nnx.List([block(seed) for seed in range(layers)])

    def __call__(self, x: jax.Array) -> tuple[jax.Array, list[Any]]:
        metrics = []
        for one in self.blocks:
            y, found = one(x)
            x, metrics = x + y, [*metrics, found]
        return x, metrics


def placement_of(seed: int, layers: int | None = None) -> jf.Placement:
    rng = np.random.default_rng(seed)
    slots = [rng.permutation(EXPERTS) for _ in range(layers or 1)]
    return jf.Placement.of_slots(
        np.stack(slots) if layers else slots[0], num_experts=EXPERTS, num_ranks=4
    )


def data(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    x, target = (jnp.asarray(rng.normal(size=(32, 6)), jnp.float32) for _ in range(2))
    return x, target


def train(graph: Any, state: Any, steps: int) -> tuple[Any, list[float]]:
    """Trains (model, optimizer), the balance biases too."""

    @jax.jit
    def step(state: Any, x: jax.Array, target: jax.Array) -> tuple[Any, jax.Array]:
        model, optimizer = nnx.merge(graph, state)

        def loss_of(model: Any) -> tuple[jax.Array, Any]:
            y, metrics = model(x)
            return ((y - target) ** 2).mean(), metrics

        (loss, metrics), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model)
        optimizer.update(model, gradients)
        for one, found in zip(model.blocks, metrics, strict=True):
            one.balance_bias[...] = update_balance_bias(
                one.balance_bias[...], found.tokens_per_expert, 1e-2
            )
        return nnx.state((model, optimizer)), loss

    losses = []
    for index in range(steps):
        state, loss = step(state, *data(index))
        losses.append(float(loss))
    return state, losses


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_training_goes_on_as_if_nothing_had_happened(axis_type: AxisType) -> None:
    placement = placement_of(0, layers=2)
    with jax.set_mesh(make_mesh(4, axis_type=axis_type)):
        model = Model(2)
        optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
        graph, state = nnx.split((model, optimizer))
        state, _ = train(graph, state, 3)
        moved = nnx.State(dict(enumerate(placement.apply(state[0], state[1]))))
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(moved), strict=True):
            assert (old.sharding, old.dtype) == (new.sharding, new.dtype)
        assert not np.array_equal(
            state[0]["blocks"][0]["wi_kernel"][...], moved[0]["blocks"][0]["wi_kernel"][...]
        )
        want, want_losses = train(graph, state, 5)
        got, got_losses = train(graph, moved, 5)
        np.testing.assert_allclose(got_losses, want_losses, rtol=1e-5)
        # What the untouched run learned, moved, is what the moved run learned: gradients too.
        want = nnx.State(dict(enumerate(placement.apply(want[0], want[1]))))
        pairs = zip(jax.tree.leaves(jax.device_get(want)), jax.tree.leaves(jax.device_get(got)))  # noqa: B905
        for a, b in pairs:
            np.testing.assert_allclose(b, a, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("router", [SigmoidRouter(use_bias=True), TopKSoftmaxRouter()])
def test_outputs_gradients_and_metrics(router: Any) -> None:
    moe, placement = block(router=router), placement_of(1)
    graph, state = nnx.split(moe)
    x, target = data()

    @jax.jit
    def run(state: Any) -> Any:
        def loss_of(state: Any) -> Any:
            y, metrics = nnx.merge(graph, state)(x)
            return ((y - target) ** 2).mean() + metrics.load_balance_loss, (y, metrics)

        return jax.value_and_grad(loss_of, has_aux=True, allow_int=True)(state)

    (loss, (y, metrics)), gradients = run(state)
    moved, nothing = placement.apply(state)
    assert nothing is None
    (new_loss, (new_y, new_metrics)), new_gradients = run(moved)
    np.testing.assert_allclose(new_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(new_y, y, atol=1e-5)
    slots = placement.expert_of_slot
    np.testing.assert_array_equal(new_metrics.tokens_per_expert, metrics.tokens_per_expert[slots])
    for a, b in zip(
        jax.tree.leaves(placement.apply(gradients)[0]), jax.tree.leaves(new_gradients), strict=True
    ):
        np.testing.assert_allclose(b, a, atol=1e-5)


def test_group_limited_routers_keep_their_choice() -> None:
    router = SigmoidRouter(num_groups=2, groups_kept=1)
    graph, state = nnx.split(block(router=router))
    rng = np.random.default_rng(0)
    ids = np.where(rng.random((4000, 1)) < 0.5, [0, 3], [1, 2])
    ids = np.where(rng.random((4000, 1)) < 0.5, ids, 7 - ids)
    placement = jf.optimize_placement(jf.RoutingStats.zeros(8).update(ids), 4, num_groups=2)
    assert not placement.is_identity
    x, _ = data()
    moved, _ = placement.apply(state)
    np.testing.assert_allclose(
        nnx.merge(graph, moved)(x)[0], nnx.merge(graph, state)(x)[0], atol=1e-6
    )


def named(state: Any) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }


AXES = {
    "router_kernel": 1,
    "router_bias": 0,
    "balance_bias": 0,
    "wi_kernel": 0,
    "wi_bias": 0,
    "wo_kernel": 0,
    "wo_bias": 0,
}


def test_every_leaf_of_every_layer_moves_by_its_own_layer() -> None:
    model = Model()
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    placement = placement_of(2, layers=11)
    states = nnx.state(model), nnx.to_pure_dict(nnx.state(optimizer))
    for before, after in zip(states, placement.apply(*states), strict=True):
        assert jax.tree.structure(before) == jax.tree.structure(after)
        new = named(after)
        for path, leaf in named(before).items():
            name = next((name for name in AXES if f"'{name}'" in path), None)
            want = leaf
            if name and "shared" not in path:
                layer = int(path.split("['blocks'][")[1].split("]")[0])
                want = np.take(leaf, placement.expert_of_slot[layer], axis=AXES[name])
            np.testing.assert_array_equal(new[path], want, err_msg=path)


def test_stacked_layers() -> None:
    states = [nnx.to_pure_dict(nnx.state(block(seed))) for seed in range(3)]
    stacked = jax.tree.map(lambda *a: np.stack(a), *states)
    placement = placement_of(3, layers=3)
    moved, _ = placement.apply(stacked)
    for index in range(3):
        want, _ = placement.layer(index).apply(states[index])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a: a[index], moved), want)  # noqa: B023
    same, _ = placement.layer(0).apply(stacked)
    want, _ = placement.layer(0).apply(states[1])
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda a: a[1], same), want)


def test_factored_moments() -> None:
    moe, placement = block(), placement_of(4)
    params = nnx.state(moe, nnx.Param)
    tx = optax.adafactor(1e-2, min_dim_size_to_factor=7)

    def step(params: Any, moments: Any, seed: int) -> Any:
        gradients = jax.tree.map(
            lambda p: jnp.asarray(np.random.default_rng(seed).normal(size=p.shape), p.dtype), params
        )
        return gradients, tx.update(gradients, moments, params)

    _, (_, moments) = step(params, tx.init(params), 0)
    moved, new_moments = placement.apply(params, moments)
    gradients, (updates, _) = step(params, moments, 1)
    new_updates, _ = tx.update(placement.apply(gradients)[0], new_moments, moved)
    want, _ = placement.apply(updates)
    assert any(leaf.ndim == 3 for leaf in jax.tree.leaves(moments))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(new_updates), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-7)


def test_other_names_and_plain_arrays() -> None:
    state = {"layer": {"w13": np.arange(16.0).reshape(8, 2), "gate": np.arange(8.0)[None]}, "n": 3}
    placement = placement_of(5)
    moved, moments = placement.apply(
        state, {"mu": state, "count": 1}, expert_axes={"w13": -2, "gate": -1}
    )
    slots = placement.expert_of_slot
    for found in (moved, moments["mu"]):
        np.testing.assert_array_equal(found["layer"]["w13"], state["layer"]["w13"][slots])
        np.testing.assert_array_equal(found["layer"]["gate"], state["layer"]["gate"][:, slots])
    assert (moved["n"], moments["count"]) == (3, 1)


def test_other_blocks_with_the_same_names_stay() -> None:
    """Attention's output, of as many heads as there are experts, is not the experts'."""
    attention = {"wq_kernel": np.arange(16.0).reshape(2, 8), "wo_kernel": np.ones((8, 2, 2))}
    attention["wo_kernel"] *= np.arange(8.0)[:, None, None]
    state = {"attention": attention, "moe": nnx.to_pure_dict(nnx.state(block()))}
    placement = placement_of(5)
    moved, moments = placement.apply(state, {"mu": state})
    for found in (moved, moments["mu"]):
        jax.tree.map(np.testing.assert_array_equal, found["attention"], attention)
        np.testing.assert_array_equal(
            found["moe"]["wo_kernel"],
            np.asarray(state["moe"]["wo_kernel"])[placement.expert_of_slot],
        )


def test_a_router_moves_wherever_it_lies() -> None:
    """Beside experts of other names, and in another part of the state, with its moments."""
    gate = {"router_kernel": np.arange(24.0).reshape(3, 8)}
    experts = {"w13": np.arange(16.0).reshape(8, 2)}
    placement = placement_of(5)
    slots = placement.expert_of_slot
    for state in ({"moe": {**gate, **experts}}, {"gate": gate, "moe": experts}):
        moved, moments = placement.apply(state, {"mu": state}, expert_axes={"w13": -2})
        for found in (moved, moments["mu"]):
            (kernel,) = (v["router_kernel"] for v in found.values() if "router_kernel" in v)
            np.testing.assert_array_equal(kernel, gate["router_kernel"][:, slots])
            np.testing.assert_array_equal(found["moe"]["w13"], experts["w13"][slots])


def test_replicas_copy_experts_and_leave_the_router() -> None:
    slots = [0, 1, 2, 3, 4, 5, 6, 7, 1, 1, 0, 2]
    placement = jf.Placement.of_slots(slots, num_experts=8, num_ranks=4)
    state = nnx.to_pure_dict(nnx.state(block()))
    moved, _ = placement.apply(state)
    for name in ("wi_kernel", "wi_bias", "wo_kernel", "wo_bias"):
        np.testing.assert_array_equal(moved[name], np.asarray(state[name])[slots])
    for name in ("router_kernel", "router_bias", "balance_bias", "shared_wi_kernel"):
        np.testing.assert_array_equal(moved[name], state[name])


def test_inside_jit() -> None:
    state, placement = nnx.to_pure_dict(nnx.state(block())), placement_of(6)
    got = jax.jit(lambda state, placement: placement.apply(state)[0])(state, placement)
    jax.tree.map(np.testing.assert_array_equal, got, placement.apply(state)[0])


@pytest.mark.parametrize("layers", [None, 2, 11])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_layer_whose_router_lies_beside_its_experts(layers, stacked) -> None:
    placement = placement_of(7, layers)
    rng = np.random.default_rng(7)

    def one() -> dict[str, Any]:
        kernels = {
            "w_in": rng.normal(size=(EXPERTS, 3, 5)),
            "w_out": rng.normal(size=(EXPERTS, 5, 3)),
        }
        return {"router": {"gate": rng.normal(size=(3, EXPERTS))}, "experts": kernels}

    each = [one() for _ in range(layers or 2)]
    slots = [
        placement.expert_of_slot if layers is None else s
        for s in (placement.expert_of_slot if layers else each)
    ]
    expected = [
        {
            "router": {"gate": layer["router"]["gate"][:, of]},
            "experts": {name: kernel[of] for name, kernel in layer["experts"].items()},
        }
        for layer, of in zip(each, np.asarray(slots), strict=True)
    ]
    state: Any = {str(i): layer for i, layer in enumerate(each)}
    wanted: Any = {str(i): layer for i, layer in enumerate(expected)}
    if stacked:
        state, wanted = (jax.tree.map(lambda *a: np.stack(a), *found) for found in (each, expected))
    got, _ = placement.apply(state, expert_axes={"gate": -1, "w_in": -3, "w_out": -3})
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_errors() -> None:
    state = nnx.to_pure_dict(nnx.state(block()))
    other = jf.Placement.identity(16, 4)
    layers = placement_of(0, layers=3)
    axis = {"wo_kernel": -3}
    odd = {"mu": {"wi_kernel": np.zeros((8, 6, 3))}}
    square = {"wo_kernel": np.zeros((8, 8, 8))}
    cases = [
        (
            lambda: placement_of(0).apply({"kernel": 1}),
            "model_state: got no router_kernel, and no block with a wi_kernel and a wo_kernel, "
            "need one, or expert_axes with the names of other parameters",
        ),
        (
            lambda: other.apply(state),
            "model_state: got balance_bias of shape (8,), need the placement's 16 experts along "
            "axis -1",
        ),
        (
            lambda: layers.apply({"a": state, "b": state}),
            "model_state: got 2 MoE layers (a/balance_bias, ...), need the placement's 3",
        ),
        (
            lambda: placement_of(0).apply({"a": square}, {"mu": {"b": square}}, expert_axes=axis),
            "optimizer_state: got mu/b/wo_kernel, need a parameter of that name in model_state",
        ),
        (
            lambda: placement_of(0).apply(state, expert_axes={"wo_kernle": -3}),
            "expert_axes: got 'wo_kernle', need the name of a parameter",
        ),
        (
            lambda: placement_of(0).apply(state, expert_axes={"wo_kernel": 0}),
            "expert_axes: got 0 for 'wo_kernel', need an axis counted from the end, a negative "
            "integer",
        ),
        (
            lambda: placement_of(0).apply(square, optax.sm3(1e-3).init(square), expert_axes=axis),
            "optimizer_state: got 0/mu/wo_kernel/0 of shape (8,), need that of the parameter, "
            "(8, 8, 8), or one that tells the axis of the experts",
        ),
        (
            lambda: placement_of(0).apply(state, odd),
            "optimizer_state: got mu/wi_kernel of shape (8, 6, 3), need that of the parameter, "
            "(8, 6, 2, 10), or one that tells the axis of the experts",
        ),
        (
            lambda: placement_of(0).apply(
                square, {"v": {"wo_kernel": np.zeros((8, 8))}}, expert_axes=axis
            ),
            "optimizer_state: got v/wo_kernel of shape (8, 8), need that of the parameter, (8, "
            "8, 8), or one that tells the axis of the experts",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=r"state: |expert_axes: ") as info:
            call()
        assert str(info.value) == message
