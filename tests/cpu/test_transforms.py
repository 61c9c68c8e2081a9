"""scan, checkpoint, donation, vmap and cond around a shuffle."""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import routings
from helpers import assert_same_bits, both, make_mesh, per_rank
from jax.sharding import NamedSharding, PartitionSpec

import jax_fusco as jf
from jax_fusco import ffi

RANKS, T, K, D, EXPERTS, LAYERS = 4, 6, 2, 8, 8, 3


def moe(x, ids, weights, scale, implementation, capacity=None):
    plan = jf.make_plan(
        ids,
        axis_name="expert",
        num_experts=EXPERTS,
        capacity=capacity,
        implementation=implementation,
    )
    rows = jf.dispatch(x, plan)
    return jf.combine(jnp.sin(rows * scale), weights, plan)


def arguments(layers=LAYERS, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([routings.distinct(rng, RANKS, T, K, EXPERTS) for _ in range(layers)], axis=1)
    x = rng.standard_normal((RANKS, T, D)).astype("f4")
    weights = rng.random(ids.shape, np.float32)
    scale = rng.standard_normal((RANKS, layers, D)).astype("f4")
    return x, ids, weights, scale


def layers_in_a_scan(implementation, wrap=lambda f: f):
    """(x, ids[L], weights[L], scale[L]) -> x after L layers."""

    def layer(x, per_layer):
        return x + moe(x, *per_layer, implementation), None

    def run(x, ids, weights, scale):
        return jax.lax.scan(wrap(layer), x, (ids, weights, scale))[0]

    return run


def want_layers(x, ids, weights, scale):
    """The same layers by the oracle; scale belongs to the rank that owns the expert."""
    for l in range(ids.shape[1]):
        plan = oracle.make_plan(ids[:, l], EXPERTS)
        rows = oracle.dispatch(x, plan)
        y = np.sin(rows * scale[:, l, None])
        x = x + oracle.combine(y.astype("f4"), weights[:, l], plan)
    return x


@both
@pytest.mark.parametrize("check_vma", [True, False])
def test_scan_over_layers(implementation, check_vma):
    x, ids, weights, scale = arguments()
    got = per_rank(layers_in_a_scan(implementation), RANKS, check_vma=check_vma)(
        x, ids, weights, scale
    )
    np.testing.assert_allclose(got, want_layers(x, ids, weights, scale), rtol=1e-5, atol=1e-6)


def loss_and_gradients(implementation, wrap):
    run = layers_in_a_scan(implementation, wrap)

    def loss(x, weights, scale, ids):
        return jnp.sum(run(x, ids, weights, scale) ** 2)

    return per_rank(jax.value_and_grad(loss, argnums=(0, 1, 2)), RANKS)


SAVE = jax.checkpoint_policies.save_only_these_names(*jf.REMAT_SAVE_NAMES)
WRAPS = {
    "none": lambda f: f,
    "checkpoint": jax.checkpoint,
    "named": functools.partial(jax.checkpoint, policy=SAVE),
    "nothing": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable),
}


@both
def test_checkpoint_does_not_change_gradients(implementation):
    x, ids, weights, scale = arguments()
    results = {
        name: jax.device_get(loss_and_gradients(implementation, wrap)(x, weights, scale, ids))
        for name, wrap in WRAPS.items()
        if implementation == "fused" or name in ("none", "named")  # plain XLA compiles slowly
    }
    for name, result in results.items():
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6, err_msg=name),
            result,
            results["none"],
        )

    # And those are the gradients: against a loss on the oracle's values, by central differences.
    def loss(x, weights, scale):
        return (want_layers(x, ids, weights, scale).astype("f8") ** 2).sum(axis=(1, 2))

    rng = np.random.default_rng(1)
    value, gradients = results["none"]
    np.testing.assert_allclose(value, loss(x, weights, scale), rtol=1e-5)
    operands = [x, weights, scale]
    for i, gradient in enumerate(gradients):
        direction = rng.standard_normal(operands[i].shape).astype("f4")
        shifted = [
            [o + sign * 1e-3 * direction if j == i else o for j, o in enumerate(operands)]
            for sign in (1, -1)
        ]
        slope = (loss(*shifted[0]).sum() - loss(*shifted[1]).sum()) / 2e-3
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=5e-3)


def custom_calls(implementation, wrap):
    """How often each custom call stands in the compiled program, loop bodies counted once."""
    x, ids, weights, scale = arguments()
    program = loss_and_gradients(implementation, wrap).lower(x, weights, scale, ids).compile()
    return Counter(re.findall(r'custom_call_target="jax_fusco_(\w+)"', program.as_text()))


def test_saved_names_keep_the_exchange_from_being_repeated():
    every = {name: custom_calls("fused", wrap) for name, wrap in WRAPS.items()}
    # Forward: plan, dispatch, combine. Backward: d combine (rows, and dots home) and d dispatch.
    once = {"plan": 1, "gather_rows": 2, "gather_rows_weighted": 1, "reduce_rows": 2}
    assert every["none"] == once
    assert every["named"] == once
    # Without the names the backward plans and dispatches once more (and combines nothing again).
    twice = once | {"plan": 2, "gather_rows": 3}
    assert every["checkpoint"] == twice
    assert every["nothing"] == twice


def test_a_layer_makes_one_call_of_each_kind():
    def layer(x, ids, weights):
        return moe(x, ids, weights, 1.0, "fused")

    x, ids, weights, _ = arguments(1)
    text = per_rank(layer, RANKS).lower(x, ids[:, 0], weights[:, 0]).compile().as_text()
    calls = Counter(re.findall(r'custom_call_target="jax_fusco_(\w+)"', text))
    assert calls == {"plan": 1, "gather_rows": 1, "reduce_rows": 1}
    # No collective of XLA's own beside them, but for those that are never run.
    assert not re.search(r"all-gather|all-to-all|all-reduce", text)
    assert text.count(" collective-permute(") == 3


def assert_calls_take_turns(text):
    """Every custom call with peers is a step of its own in the order of the program's collectives:
    its computation, or the loop that it stands in, holds a collective and no other call of ours."""
    parts = {}
    for part in re.split(r"\n(?=\S)", text):
        parts.setdefault(part.split()[0].strip("%"), part)
    uses = {n: {u for u in re.findall(r"%([\w.-]+)", p) if u in parts} for n, p in parts.items()}

    def whole(name):
        inner = [whole(user) for user in uses[name] - {name}]
        return "\n".join([parts[name], *inner])

    found = 0
    for name, part in parts.items():
        calls = re.findall(r'custom_call_target="jax_fusco_\w+".*num_ranks = (\d+)', part)
        found += len(calls) - calls.count("1")
        if not calls or calls == ["1"]:
            continue
        while " collective-permute(" not in whole(name):
            (name,) = (n for n, used in uses.items() if name in used - {n})
        assert not parts[name].startswith("ENTRY")
        assert whole(name).count("custom_call_target") == 1, part
    return found


@pytest.mark.parametrize("name", WRAPS)
def test_calls_take_turns_with_collectives_in_a_scan_and_under_remat(name):
    x, ids, weights, scale = arguments()
    program = loss_and_gradients("fused", WRAPS[name]).lower(x, weights, scale, ids).compile()
    calls = custom_calls("fused", WRAPS[name])
    assert assert_calls_take_turns(program.as_text()) == sum(calls.values())


def test_calls_take_turns_with_collectives_on_any_mesh():
    """Ranks along two axes or one, other axes manual or left to the compiler; a topology; vmap."""
    shape = {"a": 2, "b": 2, "c": 2}

    def layer(x, ids, axes, topology):
        plan = jf.make_plan(
            ids, axis_name=axes, num_experts=8, topology=topology, implementation="fused"
        )
        return jf.combine(jf.dispatch(x, plan), None, plan)

    for axes, manual, topology in (
        ("a", "abc", None),
        (("a", "c"), "abc", None),
        ("b", "b", None),
        (("a", "c"), "ac", jf.Topology("a", "c")),
        (("a", "b", "c"), "abc", jf.Topology(None, ("a", "b", "c"), 4)),
    ):
        spec = PartitionSpec(axes)
        move = jax.shard_map(
            functools.partial(layer, axes=axes, topology=topology),
            mesh=make_mesh(shape),
            in_specs=spec,
            out_specs=spec,
            axis_names=set(manual),
            check_vma=False,
        )
        loss = jax.jit(jax.grad(lambda x, ids, move=move: (move(x, ids) ** 2).sum()))
        x, ids = jnp.ones((16, 3)), jnp.zeros((16, 2), jnp.int32)
        assert assert_calls_take_turns(loss.lower(x, ids).compile().as_text()) >= 4

    def vmapped(x, ids):
        plan = jf.make_plan(ids, axis_name="expert", num_experts=8, implementation="fused")
        return jax.vmap(lambda x: jf.combine(jf.dispatch(x, plan), None, plan))(x)

    text = per_rank(vmapped, 2).lower(jnp.ones((2, 3, 4, 5)), jnp.zeros((2, 4, 2), jnp.int32))
    assert assert_calls_take_turns(text.compile().as_text()) == 3


@pytest.mark.parametrize("platforms", [["cpu"], ["cpu", "cuda"]])
def test_exported_programs(platforms):
    x, ids, weights, _ = arguments(1)
    operands = (x, ids[:, 0], weights[:, 0])
    layer = per_rank(functools.partial(moe, scale=2.0, implementation="fused"), RANKS)
    allowed = [
        jax.export.DisabledSafetyCheck.custom_call(f"jax_fusco_{name}")
        for name in ("plan", "gather_rows", "reduce_rows")
    ]
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), operands)
    exported = jax.export.export(layer, platforms=platforms, disabled_checks=allowed)(*shapes)
    loaded = jax.jit(exported.call)
    mesh = make_mesh(RANKS)
    placed = jax.device_put(operands, NamedSharding(mesh, PartitionSpec("expert")))
    if platforms == ["cpu"]:
        assert assert_calls_take_turns(loaded.lower(*placed).compile().as_text()) == 3
    else:  # XLA inlines all functions of such a program before it looks at it
        assert "_platform_index" in exported.mlir_module()
    assert_same_bits(loaded(*placed), layer(*operands))


def test_the_page_on_exporting_names_every_call():
    page = (Path(__file__).parents[2] / "docs" / "sharding.md").read_text()
    section = page[page.index("## Exported programs") :].partition("\n## ")[0]
    for target, _ in ffi.cpu_module().registrations():
        assert f'"{target.removeprefix("jax_fusco_")}"' in section


def test_sizes_that_are_no_numbers_are_refused():
    size = jax.export.symbolic_shape("d")[0]
    shapes = (
        jax.ShapeDtypeStruct((RANKS, T, size), jnp.float32),
        jax.ShapeDtypeStruct((RANKS, T, K), jnp.int32),
    )

    def layer(x, ids):
        return moe(x, ids, None, 1.0, "fused")

    with pytest.raises(
        ValueError, match=r"gather_rows: got an array of shape \(6, d\), need sizes"
    ):
        jax.export.export(per_rank(layer, RANKS))(*shapes)


@both
def test_strict_promotion_of_dtypes(implementation):
    x, ids, *_ = arguments(1)

    def move(x, ids):
        plan = jf.make_plan(
            ids, axis_name="expert", num_experts=EXPERTS, implementation=implementation
        )
        return jf.dispatch((x, x > 0), plan)

    run = per_rank(move, RANKS)
    with jax.numpy_dtype_promotion("strict"):
        rows, signs = run(x, ids[:, 0])
    assert_same_bits(signs, np.asarray(rows) > 0)


@both
def test_no_arrays_without_elements_are_saved_for_the_backward_pass(implementation):
    """jaxlib 0.11.2 crashes on parameters without elements."""
    x, ids, weights, scale = arguments()
    kernel = np.ones((EXPERTS, D, D), "f4")

    def layers(x, ids, weights, scale, kernel):
        def layer(x, each):
            plan = jf.make_plan(
                each[0], axis_name="expert", num_experts=EXPERTS, implementation=implementation
            )
            rows = jf.grouped_matmul(jf.dispatch(x, plan), kernel, plan.group_sizes)
            return jf.combine(rows * each[2], each[1], plan), None

        return jax.lax.scan(layer, x, (ids, weights, scale))[0]

    run = jax.shard_map(
        lambda x, ids, weights, scale, kernel: layers(x[0], ids[0], weights[0], scale[0], kernel)[
            None
        ],
        mesh=make_mesh(RANKS),
        in_specs=PartitionSpec("expert"),
        out_specs=PartitionSpec("expert"),
    )
    operands = x, ids, weights, scale, kernel
    gradients = jax.grad(lambda x, *rest: run(x, *rest).sum())
    text = jax.jit(gradients).lower(*operands).as_text()
    taken = re.findall(r"func\.func .*@\w+\((.*)\) ->", text)
    assert taken
    assert not re.findall(r"tensor<(?:\d+x)*0x", " ".join(taken))


def test_every_custom_call_name_is_ours():
    x, ids, weights, scale = arguments()
    lowered = loss_and_gradients("fused", WRAPS["none"]).lower(x, weights, scale, ids).as_text()
    targets = set(re.findall(r"custom_call @(\w+)", lowered))
    ours = {name for name in targets if name.startswith("jax_fusco_")}
    assert ours == {f"jax_fusco_{n}" for n in custom_calls("fused", WRAPS["none"])}


@both
def test_donated_operands(implementation):
    x, ids, weights, scale = arguments(1)

    def local(x, ids, weights, scale):
        return moe(x, ids[0], weights[0], scale[0], implementation)

    mesh = make_mesh(RANKS)
    plain = per_rank(local, mesh)
    donating = jax.jit(per_rank(local, mesh, jit=False), donate_argnums=(0,))
    want = jax.device_get(plain(x, ids, weights, scale))
    sharding = NamedSharding(mesh, PartitionSpec("expert"))
    state = jax.device_put(x, sharding)
    for _ in range(5):
        given, state = state, donating(state, ids, weights, scale)
        assert given.is_deleted()
        assert_same_bits(state, want)
        want = jax.device_get(plain(want, ids, weights, scale))


@both
def test_a_donated_output_of_a_ragged_exchange(implementation):
    def local(operand, output, offsets, sizes):
        return jf.ragged_all_to_all(
            operand,
            output,
            offsets,
            sizes,
            offsets,
            sizes,
            axis_name="expert",
            implementation=implementation,
        )

    mesh = make_mesh(1)
    run = jax.jit(per_rank(local, mesh, jit=False), donate_argnums=(1,))
    operand = np.arange(4, dtype="f4")[None]
    sharding = NamedSharding(mesh, PartitionSpec("expert"))
    output = jax.device_put(-np.ones((1, 4), "f4"), sharding)
    got = run(operand, output, np.array([[1]], "i4"), np.array([[2]], "i4"))
    assert output.is_deleted()
    assert_same_bits(got, np.array([[-1, 1, 2, -1]], "f4"))


@both
def test_vmap_works_or_says_what_to_do(implementation):
    """A batch of independent shuffles on every rank."""
    rng = np.random.default_rng(0)
    batch = 3
    ids = np.stack([routings.masked(rng, RANKS, T, K, EXPERTS) for _ in range(batch)], axis=1)
    x = rng.standard_normal((RANKS, batch, T, D)).astype("f4")
    weights = rng.random(ids.shape, np.float32)

    def local(x, ids, weights):
        one = functools.partial(moe, scale=jnp.ones(D), implementation=implementation)
        return jax.vmap(lambda x, i, w: one(x, i, w))(x, ids, weights)

    got = per_rank(local, RANKS)(x, ids, weights)
    for b in range(batch):
        plan = oracle.make_plan(ids[:, b], EXPERTS)
        y = np.asarray(jnp.sin(oracle.dispatch(x[:, b], plan)))
        np.testing.assert_allclose(
            got[:, b], oracle.combine(y, weights[:, b], plan), rtol=1e-6, atol=1e-6
        )


@both
def test_vmap_over_payloads_of_one_plan(implementation):
    rng = np.random.default_rng(0)
    ids = routings.masked(rng, RANKS, T, K, EXPERTS)
    x = rng.standard_normal((RANKS, 2, T, D)).astype("f4")

    def local(x, ids):
        plan = jf.make_plan(
            ids, axis_name="expert", num_experts=EXPERTS, implementation=implementation
        )
        return jax.vmap(lambda x: jf.combine(jf.dispatch(x, plan), None, plan))(x)

    got = per_rank(local, RANKS)(x, ids)
    plan = oracle.make_plan(ids, EXPERTS)
    for b in range(2):
        assert_same_bits(got[:, b], oracle.combine(oracle.dispatch(x[:, b], plan), None, plan))


@both
def test_vmap_axis_as_the_expert_axis(implementation):
    """An axis of `jax.vmap` is no mesh axis: "xla" serves it, "fused" says so."""
    rng = np.random.default_rng(0)
    ids = routings.distinct(rng, RANKS, T, K, EXPERTS)
    x = rng.standard_normal((RANKS, T, D)).astype("f4")

    def local(x, ids):
        plan = jf.make_plan(
            ids, axis_name="expert", num_experts=EXPERTS, implementation=implementation
        )
        return jf.dispatch(x, plan)

    run = jax.jit(jax.vmap(local, axis_name="expert"))
    if implementation == "fused":
        with pytest.raises(ValueError, match="implementation: got 'fused', need a mesh axis"):
            run(x, ids)
    else:
        assert_same_bits(run(x, ids), oracle.dispatch(x, oracle.make_plan(ids, EXPERTS)))


@both
def test_cond_that_all_ranks_take_alike(implementation):
    x, ids, weights, scale = arguments(1)

    def local(x, ids, weights, scale, take):
        shuffle = functools.partial(moe, implementation=implementation)
        return jax.lax.cond(
            jax.lax.pmax(take, "expert") > 0,
            lambda: shuffle(x, ids[0], weights[0], scale[0]),
            lambda: x,
        )

    run = per_rank(local, RANKS)
    take, leave = np.ones(RANKS, np.int32), np.zeros(RANKS, np.int32)
    for _ in range(3):
        assert_same_bits(run(x, ids, weights, scale, leave), x)
        np.testing.assert_allclose(
            run(x, ids, weights, scale, take),
            want_layers(x, ids, weights, scale) - x,
            rtol=1e-5,
            atol=1e-6,
        )


@both
def test_a_while_loop_with_a_dynamic_trip_count(implementation):
    x, ids, weights, scale = arguments(1)

    def local(x, ids, weights, scale, count):
        shuffle = functools.partial(moe, implementation=implementation)
        return jax.lax.fori_loop(
            0, count, lambda _, x: x + shuffle(x, ids[0], weights[0], scale[0]), x
        )

    run = per_rank(local, RANKS)
    for count in (0, 1, 3):
        got = run(x, ids, weights, scale, np.full(RANKS, count, np.int32))
        want = want_layers(
            x, *(np.repeat(a, count, axis=1) for a in (ids, weights)), np.repeat(scale, count, 1)
        )
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_plan_is_a_pytree_that_leaves_and_enters_a_program():
    x, ids, _, _ = arguments(1)
    mesh = make_mesh(RANKS)

    def make(ids):
        return jf.make_plan(ids[0], axis_name="expert", num_experts=EXPERTS)

    leaves = per_rank(lambda ids: tuple(jax.tree.leaves(make(ids))), mesh)(ids)

    def use(ids, leaves, x):
        tree = jax.tree.structure(make(ids))
        return jf.dispatch(x, jax.tree.unflatten(tree, leaves))

    want = oracle.dispatch(x, oracle.make_plan(ids[:, 0], EXPERTS))
    assert_same_bits(per_rank(use, mesh)(ids, leaves, x), want)


def test_profiles_show_every_stage():
    x, ids, weights, scale = arguments(1)
    program = loss_and_gradients("fused", WRAPS["none"]).lower(x, weights, scale, ids).compile()
    names = re.findall(r'op_name="([^"]*)"', program.as_text())
    for stage in (
        "make_plan",
        "dispatch",
        "combine",
        "dispatch_backward",
        "combine_backward",
    ):
        assert any(f"jax_fusco.{stage}" in name for name in names), stage
