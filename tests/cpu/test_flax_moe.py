"""The MoE block against a dense oracle, every expert over every token: values and gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import make_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fusco as jf
from jax_fusco.flax import (
    MoE,
    MoEMetrics,
    RankLimitedRouter,
    Router,
    Routing,
    SigmoidRouter,
    SoftmaxRouter,
    TopKSoftmaxRouter,
)

AXIS_TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
Params = dict[str, jax.Array]


def tokens_of(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def block(
    features: int = 12, hidden: int = 20, experts: int = 8, k: int = 2, **options: Any
) -> MoE:
    """A small dropless block whose biases are not zero."""
    options = {"capacity_factor": None, "rngs": nnx.Rngs(0), **options}
    moe = MoE(
        features,
        hidden,
        num_experts=experts,
        top_k=k,
        bias_init=nnx.initializers.normal(0.5),
        **options,
    )
    if moe.balance_bias is not None:
        moe.balance_bias[...] = moe.balance_bias[...] + jnp.linspace(-0.2, 0.2, experts)
    return moe


def ffn(
    x: jax.Array, wi: jax.Array, wo: jax.Array, bi: Any, bo: Any, *, activation: str
) -> jax.Array:
    parts = [x @ wi[:, p] + (0 if bi is None else bi[p]) for p in range(wi.shape[1])]
    if activation == "clamped_swiglu":
        gate, up = jnp.minimum(parts[0], 7), jnp.clip(parts[1], -7, 7)
        hidden = (up + 1) * gate / (1 + jnp.exp(-1.702 * gate))
    elif activation == "swiglu":
        hidden = parts[0] / (1 + jnp.exp(-parts[0])) * parts[1]
    else:
        hidden = getattr(jax.nn, activation)(parts[0])
    return hidden @ wo + (0 if bo is None else bo)


def dense(
    params: Params, x: jax.Array, router: Router, k: int, activation: str = "swiglu"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(y, load-balance loss, z-loss): every expert sees every token, weights choose."""
    p = params.get
    flat = x.reshape(-1, x.shape[-1])
    logits = flat @ params["router_kernel"] + (0 if p("router_bias") is None else p("router_bias"))
    routing = router(logits, k, p("balance_bias"))
    experts = logits.shape[1]
    outs = jax.vmap(lambda *kernels: ffn(flat, *kernels, activation=activation))(
        params["wi_kernel"], params["wo_kernel"], p("wi_bias"), p("wo_bias")
    )
    chosen = routing.expert_ids[:, :, None] == jnp.arange(experts)
    weights = jnp.where(chosen, routing.weights[:, :, None], 0).sum(1)
    y = jnp.einsum("te,etd->td", weights, outs)
    if "shared_wi_kernel" in params:
        shared = params["shared_wi_kernel"], params["shared_wo_kernel"]
        y += ffn(flat, *shared, None, None, activation=activation)
    shares = jnp.bincount(routing.expert_ids.reshape(-1), length=experts) / (len(flat) * k)
    balance = experts * (shares * routing.probs.mean(0)).sum()
    z = (jax.nn.logsumexp(logits, -1) ** 2).mean()
    return y.reshape(x.shape), balance, z


def pull(y: jax.Array) -> jax.Array:
    """A scalar that depends differently on every element."""
    return (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum()


def of_block(moe: MoE, mesh: Mesh | None, x: jax.Array, mask: Any = None) -> tuple[Any, ...]:
    """(y, metrics, gradients of parameters, gradient of x) of the block on `mesh`."""
    graph, params, rest = nnx.split(moe, nnx.Param, ...)

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, metrics = nnx.merge(graph, params, rest)(x, mask)
        scalar = pull(y) + metrics.load_balance_loss + 0.1 * metrics.router_z_loss
        return scalar, (y, metrics)

    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    if mesh is None:
        (gradients, dx), (y, metrics) = step(params, x)
    else:
        with jax.set_mesh(mesh):
            (gradients, dx), (y, metrics) = step(params, x)
    return jax.device_get((y, metrics, nnx.to_pure_dict(gradients), dx))


def of_dense(moe: MoE, x: jax.Array) -> tuple[Any, ...]:
    def loss(params: Params, x: jax.Array) -> tuple[jax.Array, Any]:
        y, balance, z = dense(params, x, moe.router, moe.top_k, moe.activation)
        return pull(y) + balance + 0.1 * z, (y, balance, z)

    (gradients, dx), (y, balance, z) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(
        moe.params(), x
    )
    gradients.pop("balance_bias", None)
    return jax.device_get((y, balance, z, gradients, dx))


def assert_close(got: Any, want: Any, name: str = "") -> None:
    scale = max(1.0, float(np.abs(want).max(initial=0.0)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5 * scale, err_msg=name)


def assert_equals_dense(moe: MoE, mesh: Mesh | None, x: jax.Array) -> MoEMetrics:
    y, metrics, gradients, dx = of_block(moe, mesh, x)
    want_y, balance, z, want_gradients, want_dx = of_dense(moe, x)
    assert_close(y, want_y, "y")
    assert_close(dx, want_dx, "dx")
    assert_close(metrics.load_balance_loss, balance, "load_balance_loss")
    assert_close(metrics.router_z_loss, z, "router_z_loss")
    assert set(gradients) == set(want_gradients)
    for name, gradient in gradients.items():
        assert_close(gradient, want_gradients[name], name)
    assert metrics.tokens_per_expert.sum() == x[..., 0].size * moe.top_k
    assert metrics.dropped == metrics.invalid == 0
    return metrics


DEEPSEEK = {"router": SigmoidRouter(num_groups=4, groups_kept=2, scale=2.5)}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"features": 16, "hidden": 56, "experts": 8, "k": 2},
    "qwen3": {"features": 16, "hidden": 6, "experts": 32, "k": 8},
    "deepseek": {"features": 28, "hidden": 8, "experts": 16, "k": 4, "num_shared_experts": 1}
    | DEEPSEEK,
    "kimi": {"experts": 24, "k": 8, "router": SigmoidRouter(scale=2.827), "num_shared_experts": 1},
    "gpt_oss": {
        "features": 45,
        "hidden": 44,
        "experts": 16,
        "k": 4,
        "router": TopKSoftmaxRouter(),
        "activation": "clamped_swiglu",
        "use_bias": True,
    },
    "olmoe": {"experts": 16, "k": 8, "router": SoftmaxRouter(renormalize=False)},
    "ungated": {"activation": "gelu", "use_bias": True, "k": 1},
}


@pytest.mark.parametrize("model", MODELS)
def test_each_models_layer_on_a_mesh_with_all_axes(model: str) -> None:
    moe = block(**MODELS[model], model_axis="model")
    mesh = make_mesh({"data": 2, "expert": 2, "model": 2})
    assert_equals_dense(moe, mesh, tokens_of(4, 6, moe.features))


@pytest.mark.parametrize("model", ["mixtral", "gpt_oss"])
def test_one_device_without_a_mesh(model: str) -> None:
    moe = block(**MODELS[model])
    assert_equals_dense(moe, None, tokens_of(3, 5, moe.features))


@pytest.mark.parametrize(
    ("sizes", "axis_type", "shape"),
    [
        ({"expert": 1}, AxisType.Explicit, (3, 5)),
        ({"expert": 2}, AxisType.Auto, (4, 6)),
        ({"expert": 8}, AxisType.Auto, (3, 5)),
        ({"expert": 8}, AxisType.Explicit, (4, 6)),
        ({"data": 2, "expert": 4}, AxisType.Explicit, (4, 6)),
        ({"data": 2, "expert": 4}, AxisType.Explicit, (3, 5)),
        ({"expert": 4, "data": 2}, AxisType.Auto, (4, 6)),
        ({"model": 2, "expert": 2, "data": 2}, AxisType.Auto, (3, 5)),
        ({"model": 2, "expert": 2, "data": 2}, AxisType.Explicit, (4, 6)),
    ],
    ids=lambda value: (
        "x".join(f"{n}{s}" for n, s in value.items()) if isinstance(value, dict) else str(value)
    ),
)
def test_every_mesh_gives_the_dense_values_and_gradients(
    sizes: dict[str, int], axis_type: AxisType, shape: tuple[int, ...]
) -> None:
    moe = block(model_axis="model" if "model" in sizes else None, num_shared_experts=1)
    assert_equals_dense(moe, make_mesh(sizes, axis_type=axis_type), tokens_of(*shape, 12))


@pytest.mark.parametrize("implementation", ["xla", "fused"])
def test_every_implementation_on_a_permuted_mesh(implementation: str) -> None:
    moe = block(implementation=implementation)
    mesh = make_mesh({"data": 2, "expert": 4}, order=[5, 2, 7, 0, 1, 6, 3, 4])
    assert_equals_dense(moe, mesh, tokens_of(4, 6, 12))


@pytest.mark.parametrize("shape", [(), (1,), (8, 1), (2, 2, 2), (0,)], ids=str)
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    moe, x = block(), tokens_of(*shape, 12)
    with jax.set_mesh(make_mesh({"data": 2, "expert": 4})):
        y, metrics = nnx.jit(lambda moe, x: moe(x))(moe, x)
    assert y.shape == x.shape
    assert metrics.tokens_per_expert.sum() == np.prod(shape, dtype=int) * 2
    if x.size:
        want = dense(moe.params(), x, moe.router, 2)[0]
        assert_close(jax.device_get(y), want)
    assert jnp.isfinite(metrics.load_balance_loss)


def test_experts_over_two_axes_and_tokens_over_chosen_axes() -> None:
    mesh = make_mesh({"node": 2, "expert": 2, "spare": 2})
    moe = block(axis_name=("node", "expert"), token_axes=("node", "expert"))
    assert_equals_dense(moe, mesh, tokens_of(4, 6, 12))


@AXIS_TYPES
def test_one_row_a_token(axis_type: AxisType) -> None:
    mesh = make_mesh({"data": 2, "expert": 2, "model": 2}, axis_type=axis_type)
    moe = block(rows="token", k=3, use_bias=True, model_axis="model", num_shared_experts=1)
    assert_equals_dense(moe, mesh, tokens_of(3, 5, 12))


@pytest.mark.parametrize(
    ("experts", "k", "ranks", "options", "rows"),
    [
        (8, 2, 4, {}, "assignment"),
        (8, 4, 4, {}, "assignment"),  # 3.7 ranks per token
        (16, 8, 4, {}, "token"),  # 3.98, nearly all there are, and 8 rows
        (8, 2, 1, {}, "assignment"),
        (8, 3, 1, {}, "token"),
        (8, 3, None, {}, "assignment"),  # the platform is not known
        (8, 3, 1, {"rows": "assignment"}, "assignment"),
        (8, 4, 4, {"router": RankLimitedRouter(SoftmaxRouter(), 4, 1)}, "token"),
        (8, 4, 4, {"router": RankLimitedRouter(SoftmaxRouter(), 4, 2)}, "assignment"),
    ],
)
def test_rows_that_travel_by_default(
    experts: int,
    k: int,
    ranks: int | None,
    options: dict[str, Any],
    rows: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []

    def noted(*args: Any, **options: Any) -> Any:
        found.append(options["rows"])
        return jf.api.make_plan(*args, **options)

    monkeypatch.setattr(jf, "make_plan", noted)
    # No other test has 13 features: nothing was traced before the patch.
    moe, x = block(features=13, experts=experts, k=k, **options), tokens_of(8, 13)
    mesh = None if ranks is None else make_mesh({"expert": ranks})
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        jax.eval_shape(moe, x)
    assert set(found) == {rows}


@AXIS_TYPES
def test_over_nodes(axis_type: AxisType) -> None:
    mesh = make_mesh({"data": 2, "node": 2, "expert": 2}, axis_type=axis_type)
    moe = block(axis_name=("node", "expert"), topology=jf.Topology())
    assert_equals_dense(moe, mesh, tokens_of(3, 5, 12))
    assert_equals_dense(moe, make_mesh({"node": 1, "expert": 4}), tokens_of(3, 5, 12))


def test_a_topology_without_a_mesh_is_one_device() -> None:
    moe, x = block(axis_name=("node", "expert"), topology=jf.Topology()), tokens_of(5, 12)
    assert_close(jax.device_get(moe(x)[0]), dense(moe.params(), x, moe.router, 2)[0])


def test_every_rank_may_hold_all_experts() -> None:
    assert_equals_dense(block(axis_name=None), make_mesh({"data": 4}), tokens_of(4, 6, 12))


@AXIS_TYPES
def test_the_mesh_may_be_given_instead_of_ambient(axis_type: AxisType) -> None:
    mesh = make_mesh({"data": 2, "expert": 2}, axis_type=axis_type)
    moe, x = block(mesh=mesh), tokens_of(4, 6, 12)
    assert moe.wi_kernel[...].sharding.is_equivalent_to(NamedSharding(mesh, P("expert")), 4)
    y, _ = nnx.jit(lambda moe, x: moe(x))(moe, x)
    assert_close(jax.device_get(y), dense(block().params(), x, moe.router, 2)[0])


def test_output_keeps_an_explicit_inputs_sharding() -> None:
    mesh = make_mesh({"data": 2, "expert": 2}, axis_type=AxisType.Explicit)
    moe = block(report_expert_ids=True)
    for spec in (P("data"), P(None, "expert"), P("data", "expert"), P(None, None, "data"), P()):
        with jax.set_mesh(mesh):
            x = jax.device_put(tokens_of(4, 6, 12), NamedSharding(mesh, spec))
            both = jax.jit(lambda x: (x + moe(x)[0], *moe(x)))(x)
            assert jax.typeof(both[1]).sharding.spec == jax.typeof(x).sharding.spec
            assert_close(jax.device_get(both[0] - x), jax.device_get(both[1]))
            ids = jax.typeof(both[2].expert_ids).sharding.spec
            assert tuple(ids) == (*jax.typeof(x).sharding.spec[:2], None)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_a_shard_map_it_works_on_local_arrays(check_vma: bool) -> None:
    mesh = make_mesh({"data": 2, "expert": 2, "model": 2})
    moe, x = block(model_axis="model", use_bias=True), tokens_of(24, 12)
    graph, params = nnx.split(moe)
    tokens = P(("data", "expert"))
    layer = jax.shard_map(
        lambda params, x: nnx.merge(graph, params)(x),
        mesh=mesh,
        in_specs=(nnx.get_partition_spec(params), tokens),
        out_specs=(tokens, P()),
        check_vma=check_vma,
    )

    def loss(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        y, metrics = layer(params, x)
        scalar = pull(y) + metrics.load_balance_loss + 0.1 * metrics.router_z_loss
        return scalar, (y, metrics)

    got = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    (gradients, dx), (y, metrics) = jax.device_get(got)
    want_y, balance, _, want_gradients, want_dx = of_dense(moe, x)
    assert_close(y, want_y)
    assert_close(dx, want_dx)
    assert_close(metrics.load_balance_loss, balance)
    for name, gradient in nnx.to_pure_dict(gradients).items():
        assert_close(gradient, want_gradients[name], name)


def test_inside_a_partly_manual_shard_map_it_opens_the_other_axes() -> None:
    mesh = make_mesh({"data": 2, "expert": 2})
    moe, x = block(report_expert_ids=True), tokens_of(24, 12)
    graph, params = nnx.split(moe)

    def local(params: Any, x: jax.Array) -> tuple[jax.Array, ...]:
        y, metrics = nnx.merge(graph, params)(x)
        return y, metrics.expert_ids, dataclasses.replace(metrics, expert_ids=None)

    with jax.set_mesh(mesh):
        y, ids, metrics = jax.jit(
            jax.shard_map(
                local,
                in_specs=(nnx.get_partition_spec(params), P("expert")),
                out_specs=(P("expert"), P("expert"), P()),
                axis_names={"expert"},
            )
        )(params, x)
    want, balance, _ = dense(moe.params(), x, moe.router, 2)
    assert_close(jax.device_get(y), want)
    assert_close(metrics.load_balance_loss, balance)
    logits = x @ moe.params()["router_kernel"]
    np.testing.assert_array_equal(ids, moe.router(logits, 2).expert_ids)


@AXIS_TYPES
def test_gradients_inside_an_untracked_partly_manual_shard_map(axis_type: AxisType) -> None:
    """Data parallel by hand; with tracking JAX cannot compile such gradients (docs/flax.md).

    What the block sums over "data" comes back twice, by the untracked transpose of the sum.
    """
    mesh = make_mesh({"data": 2, "expert": 2}, axis_type=axis_type)
    moe, x = block(), tokens_of(8, 12)
    graph, params = nnx.split(moe)

    def loss(params: Any, x: jax.Array, share: float = 1) -> tuple[jax.Array, Any]:
        y, metrics = nnx.merge(graph, params)(x)
        return jnp.square(y).sum() + share * metrics.load_balance_loss, metrics

    def local(params: Any, x: jax.Array) -> Any:
        gradients, metrics = jax.grad(loss, has_aux=True)(params, x, 0.5)
        return jax.lax.psum(gradients, "data"), metrics

    want, wanted_metrics = jax.grad(loss, has_aux=True)(params, x)
    with jax.set_mesh(mesh):
        step = jax.shard_map(
            local,
            in_specs=(P(), P("data")),
            out_specs=(P(), P()),
            axis_names={"data"},
            check_vma=False,
        )
        whole = jax.NamedSharding(mesh, P())
        got, metrics = jax.jit(step)(
            jax.device_put(params, whole), jax.device_put(x, jax.NamedSharding(mesh, P("data")))
        )
    jax.tree.map(assert_close, jax.device_get(got), jax.device_get(want))
    assert_close(metrics.load_balance_loss, wanted_metrics.load_balance_loss)
    assert metrics.tokens_per_expert.sum() == 8 * 2


def test_axes_may_come_as_a_list() -> None:
    mesh = make_mesh({"a": 2, "b": 2})
    x = tokens_of(8, 12)
    both = (block(axis_name=names, mesh=mesh)(x) for names in (["a", "b"], ("a", "b")))
    jax.tree.map(np.testing.assert_array_equal, *both)


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    y, metrics = block(report_expert_ids=True)(jnp.zeros(shape))
    assert y.shape == shape
    assert metrics.expert_ids is not None
    assert metrics.expert_ids.shape == (*shape[:-1], 2)
    assert np.isfinite(metrics.load_balance_loss)


@pytest.mark.parametrize("sizes", [None, {"data": 2, "expert": 2}], ids=["one", "mesh"])
@pytest.mark.parametrize("shape", [(4, 6), (3, 5)], ids=["even", "odd"])
def test_masked_tokens_take_no_part(sizes: Any, shape: tuple[int, ...]) -> None:
    moe, x = block(num_shared_experts=1, report_expert_ids=True), tokens_of(*shape, 12)
    mask = np.random.default_rng(2).random(shape) < 0.6
    poisoned = jnp.where(mask[..., None], x, jnp.nan)
    mesh = None if sizes is None else make_mesh(sizes)
    y, metrics, gradients, dx = of_block(moe, mesh, poisoned, jnp.asarray(mask))
    _, balance, z = dense(moe.params(), x[mask], moe.router, 2)
    want = np.where(mask[..., None], dense(moe.params(), x, moe.router, 2)[0], 0)
    assert_close(y, want)
    assert_close(metrics.load_balance_loss, balance)
    assert_close(metrics.router_z_loss, z)
    assert metrics.tokens_per_expert.sum() == mask.sum() * 2
    assert metrics.expert_ids.shape == (*shape, 2)
    assert (metrics.expert_ids[~mask] == -1).all()
    logits = x[mask] @ moe.params()["router_kernel"]
    np.testing.assert_array_equal(metrics.expert_ids[mask], moe.router(logits, 2).expert_ids)
    assert not dx[~mask].any()
    assert all(np.isfinite(leaf).all() for leaf in gradients.values())


def test_no_token_at_all_is_left() -> None:
    x, mask = tokens_of(4, 6, 12), jnp.zeros((4, 6), bool)
    y, metrics, gradients, dx = of_block(block(), make_mesh({"expert": 4}), x, mask)
    assert not y.any()
    assert not dx.any()
    assert not metrics.tokens_per_expert.any()
    assert metrics.load_balance_loss == metrics.router_z_loss == 0
    assert not any(leaf.any() for leaf in gradients.values())


def test_what_finds_no_room_is_dropped_and_counted() -> None:
    moe = block(router=TopKSoftmaxRouter(), capacity_factor=1.25)
    assert moe.router_bias is not None
    moe.router_bias[...] = jnp.zeros(8).at[0].set(50.0).at[1].set(49.0)
    x = tokens_of(8, 8, 12)
    with jax.set_mesh(make_mesh({"data": 2, "expert": 4})):
        y, metrics = nnx.jit(lambda moe, x: moe(x))(moe, x)
    # Each group of four ranks has 32 tokens, all for experts 0 and 1 of rank 0, which has
    # ceil(1.25 * 8 * 2) = 20 rows for their 64 assignments.
    np.testing.assert_array_equal(metrics.tokens_per_expert, [64, 64, 0, 0, 0, 0, 0, 0])
    assert metrics.dropped == 2 * (64 - 20)
    assert jnp.isfinite(y).all()


class LostRouter(SoftmaxRouter):
    """A softmax router whose first choice for every fourth token is an expert there is not."""

    def __call__(
        self, logits: jax.Array, top_k: int, balance_bias: jax.Array | None = None
    ) -> Routing:
        routing = super().__call__(logits, top_k, balance_bias)
        ids = routing.expert_ids.at[::4, 0].set(logits.shape[1])
        return routing._replace(expert_ids=ids)


def test_ids_of_no_expert_move_nothing_and_are_counted() -> None:
    moe, x = block(router=LostRouter()), tokens_of(8, 8, 12)
    with jax.set_mesh(make_mesh({"data": 2, "expert": 4})):
        y, metrics = nnx.jit(lambda moe, x: moe(x))(moe, x)
    assert metrics.invalid == 64 // 4
    assert metrics.tokens_per_expert.sum() == 64 * 2 - 64 // 4
    assert metrics.dropped == 0
    assert jnp.isfinite(y).all()


def test_bfloat16_computes_in_bfloat16_and_routes_in_float32() -> None:
    moe, x = block(dtype=jnp.bfloat16), tokens_of(4, 6, 12)
    mesh = make_mesh({"data": 2, "expert": 2, "model": 2})
    sharded = block(dtype=jnp.bfloat16, model_axis="model")
    y, metrics, gradients, _ = of_block(sharded, mesh, x)
    assert y.dtype == jnp.bfloat16
    want, balance, _ = dense(moe.params(), x, moe.router, 2)
    assert_close(metrics.load_balance_loss, balance)
    np.testing.assert_allclose(y.astype(np.float32), want, atol=0.03 * np.abs(want).max())
    assert all(leaf.dtype == np.float32 for leaf in gradients.values())
    narrow = block(param_dtype=jnp.bfloat16)
    assert narrow(x)[0].dtype == jnp.float32
    assert narrow(x.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16


def test_experts_are_chosen_by_differences_that_bfloat16_does_not_have() -> None:
    moe = block(k=1, dtype=jnp.bfloat16)
    moe.router_kernel[...] = jnp.eye(12, 8)
    x = jnp.zeros((6, 12)).at[:, 3].set(1.0).at[:, 5].set(1.0 + 2.0**-10)
    np.testing.assert_array_equal(moe(x)[1].tokens_per_expert, 6 * np.eye(8)[5])


@pytest.mark.parametrize("rows", ["assignment", "token"])
@pytest.mark.parametrize("activation", ["swiglu", "clamped_swiglu"])
def test_undefined_rows_never_spread(
    activation: str, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tail of the receive buffer is NaN; the experts' output there becomes NaN too."""
    real = jf.dispatch

    def poisoned(x: jax.Array, plan: jf.Plan | jf.TokenPlan, *, padding: str) -> jax.Array:
        assert padding == "undefined"
        used = plan.rows.group_sizes if isinstance(plan, jf.TokenPlan) else plan.group_sizes
        assert isinstance(plan, jf.TokenPlan) or plan.alignment == 4
        tail = jnp.arange(plan.capacity) >= used.sum()
        moved = real(x, plan, padding=padding)
        return jax.tree.map(lambda rows: jnp.where(tail[:, None], jnp.nan, rows), moved)

    options = {"use_bias": True, "activation": activation, "alignment": 4, "rows": rows}
    x = tokens_of(5, 3, 12)
    # The mask is only there to make a trace of its own, not one that ran before the patch.
    mask = jnp.ones((5, 3), bool)
    want = of_dense(block(**options), x)
    monkeypatch.setattr(jf, "dispatch", poisoned)
    y, _, gradients, dx = of_block(block(**options), make_mesh({"expert": 4}), x, mask)
    assert_close(y, want[0])
    assert_close(dx, want[4])
    for name, gradient in gradients.items():
        assert_close(gradient, want[3][name], name)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 9}, ValueError, "top_k: got 9, need 1 to num_experts (8)"),
        ({"features": 0}, ValueError, "features: got 0, need an integer of at least 1"),
        ({"router": "softmax"}, TypeError, "router: got 'softmax', need a jax_fusco.flax.Router"),
        (
            {"router": SoftmaxRouter},
            TypeError,
            f"router: got {SoftmaxRouter!r}, need a jax_fusco.flax.Router",
        ),
        ({"rngs": None}, TypeError, "rngs: got None, need a flax.nnx.Rngs"),
        ({"mesh": "foo"}, TypeError, "mesh: got 'foo', need a jax.sharding.Mesh or None"),
        ({"dtype": jnp.int32}, TypeError, "dtype: got dtype int32, need a floating dtype"),
        ({"dtype": "foo"}, TypeError, "dtype: got 'foo', need a dtype"),
        (
            {"param_dtype": jnp.int8},
            TypeError,
            "param_dtype: got dtype int8, need a floating dtype",
        ),
        (
            {"activation": "tanh"},
            ValueError,
            "activation: got 'tanh', need one of swiglu, geglu, clamped_swiglu, silu, gelu, relu",
        ),
        (
            {"experts": 6, "mesh": make_mesh(4)},
            ValueError,
            "num_experts: got 6, need a multiple of the number of ranks (4)",
        ),
        (
            {"hidden": 5, "mesh": make_mesh({"expert": 2, "model": 2}), "model_axis": "model"},
            ValueError,
            "hidden_features: got 5, need a multiple of the size of model_axis (2)",
        ),
        (
            {"axis_name": "experts", "mesh": make_mesh({"data": 2, "expert": 2})},
            ValueError,
            "axis_name: got 'experts', need an axis of the mesh (data, expert) or None",
        ),
        (
            {"axis_name": 3},
            TypeError,
            "axis_name: got 3, need a mesh axis name, a tuple of them, or None",
        ),
        (
            {"capacity_factor": 0},
            ValueError,
            "capacity_factor: got 0, need a finite number above 0",
        ),
        (
            {"implementation": "cuda"},
            ValueError,
            "implementation: got 'cuda', need 'xla', 'fused', or None",
        ),
        (
            {"rows": "expert"},
            ValueError,
            "rows: got 'expert', need 'assignment', 'token', or None",
        ),
        (
            {"topology": jf.Topology()},
            ValueError,
            "axis_name: got 'expert', need ('node', 'expert') for this topology",
        ),
        (
            {"token_axes": "data", "mesh": make_mesh({"data": 2, "expert": 2})},
            ValueError,
            "token_axes: got 'data', need axis_name's 'expert' among them",
        ),
        (
            {"model_axis": "expert", "mesh": make_mesh({"data": 2, "expert": 2})},
            ValueError,
            "model_axis: got 'expert', need an axis that axis_name and token_axes leave free",
        ),
    ],
)
def test_bad_arguments_are_said(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        block(**options)


def test_bad_inputs_are_said() -> None:
    moe, x = block(), tokens_of(4, 6, 12)
    for arguments, error, message in [
        ((x[..., 1:],), ValueError, "x: got shape (4, 6, 11), need [..., 12]"),
        ((x.astype(jnp.int32),), TypeError, "x: got dtype int32, need a floating dtype"),
        ((x, jnp.ones((4, 6))), TypeError, "token_mask: got dtype float32, need bool"),
        ((x, jnp.ones(4, bool)), ValueError, "token_mask: got shape (4,), need (4, 6)"),
    ]:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            moe(*arguments)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_an_ambient_mesh_that_does_not_fit(axis_type):
    with (
        jax.set_mesh(make_mesh(4, axis_type=axis_type)),
        pytest.raises(ValueError, match=r"^num_experts: got 6, need a multiple of the number of"),
    ):
        MoE(8, 8, num_experts=6, top_k=2, rngs=nnx.Rngs(0))
