"""Drawn programs of several shuffles, against the oracle: beside each other, one after the other,
in loops, branches and remat, over one level or two. What else is in a program decides in which
order XLA starts its calls and collectives.

A layer multiplies token t by `a[t] = sum_j weights[t, j] * scale[expert_ids[t, j]]`, so that any
program multiplies it by a polynomial of the layers' `a`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import routings
from helpers import P, make_mesh, sharded
from hypothesis import given

import jax_fusco as jf

MESHES = (
    {"expert": 2},
    {"expert": 4},
    {"node": 2, "expert": 2},
    {"data": 2, "expert": 2},
    {"data": 2, "node": 2, "expert": 2},
    {"node": 3, "expert": 2},
    {"node": 2, "expert": 4},
)
POLICIES = {
    "all": jax.checkpoint_policies.nothing_saveable,
    "named": jax.checkpoint_policies.save_only_these_names(*jf.REMAT_SAVE_NAMES),
}
ONE, TWO = ("scan", "cond", "all", "named"), ("then", "plus")  # what joins so many programs


@dataclasses.dataclass(frozen=True)
class Layer:
    """What is static about one layer; `like` an earlier one, its routing is that one's."""

    implementation: str
    topology: jf.Topology | None
    rows: str
    alignment: int
    like: int


def apply(program: Any, layer: Any, x: jax.Array) -> jax.Array:
    """`program` of `x`: the number of a layer, or a name and the programs that it joins."""
    if isinstance(program, int):
        return layer(program, x)
    name, *parts = program
    first, *others = (functools.partial(apply, part, layer) for part in parts)
    if name == "then":
        return others[0](first(x))
    if name == "plus":
        return first(x) + others[0](x)
    if name == "scan":
        return jax.lax.scan(lambda x, _: (first(x), None), x, None, length=2)[0]
    if name == "cond":
        # True on all ranks, which the compiler cannot know.
        return jax.lax.cond(x.sum() > -1e9, first, lambda x: x, x)
    return jax.checkpoint(first, policy=POLICIES[name])(x)


def factor(program: Any, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `program` multiplies tokens by, and its derivatives by `a [layers, tokens]`."""
    if isinstance(program, int):
        derivatives = np.zeros_like(a)
        derivatives[program] = 1
        return a[program], derivatives
    name, *parts = program
    (value, derivatives), *others = (factor(part, a) for part in parts)
    if name == "then":
        return value * others[0][0], derivatives * others[0][0] + value * others[0][1]
    if name == "plus":
        return value + others[0][0], derivatives + others[0][1]
    if name == "scan":
        return value**2, 2 * value * derivatives
    return value, derivatives


def run_layer(layer, experts, axis, room, x, ids, weights, scale):
    plan = jf.make_plan(
        ids,
        axis_name=axis,
        num_experts=experts,
        capacity=room,
        alignment=layer.alignment,
        topology=layer.topology,
        rows=layer.rows,
        implementation=layer.implementation,
    )
    rows = jf.dispatch(x, plan)
    if layer.rows == "assignment":
        y = jf.grouped_matmul(rows, scale, plan.group_sizes)
        return jf.combine(y, weights, plan)
    y = jf.grouped_matmul(
        rows,
        scale,
        plan.group_sizes,
        source=plan.source,
        merge=plan.source,
        merge_weights=plan.local_weights(weights),
        num_rows=rows.shape[0],
    )
    return jf.combine(y, None, plan)


@st.composite
def drawn(draw):
    sizes = draw(st.sampled_from(MESHES))
    axis = ("node", "expert") if "node" in sizes else "expert"
    topologies = [None]
    if "node" in sizes:
        topologies += [jf.Topology(slice_rows=rows) for rows in (1, 2, None)]
    layer = st.builds(
        Layer,
        st.sampled_from(("fused", "fused", "xla")),
        st.sampled_from(topologies),
        st.sampled_from(("assignment", "assignment", "token")),
        st.sampled_from((1, 4)),
        st.integers(0, 2),
    )
    layers = draw(st.lists(layer, min_size=1, max_size=3))
    numbers = st.integers(0, len(layers) - 1)
    program = draw(
        st.recursive(
            numbers,
            lambda part: (
                st.tuples(st.sampled_from(ONE), part) | st.tuples(st.sampled_from(TWO), part, part)
            ),
            max_leaves=4,
        )
    )
    local, tokens, k, width = draw(
        st.tuples(
            st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.sampled_from((1, 4, 9))
        )
    )
    groups, ranks = sizes.get("data", 1), sizes.get("node", 1) * sizes["expert"]
    ids, rng = routings.mixed(
        draw, (len(layers) * groups, ranks, tokens, k), experts := ranks * local
    )
    ids = ids.reshape(len(layers), groups * ranks * tokens, k)
    for number, each in enumerate(layers):
        ids[number] = ids[min(each.like, number)]
    return sizes, axis, tuple(layers), program, experts, width, ids, rng, draw(st.booleans())


@given(case=drawn())
@hypothesis.settings(max_examples=15, phases=[hypothesis.Phase.generate])  # shrinking takes long
def test_drawn_programs(case):
    sizes, axis, layers, program, experts, width, ids, rng, check_vma = case
    names = axis if isinstance(axis, tuple) else (axis,)
    tokens = P((*(("data",) if "data" in sizes else ()), *names))

    def run(x, ids, weights, scale):
        def layer(number, x):
            of_expert = scale[number][:, None, None] * jnp.eye(width)
            of_layer = layers[number], experts, axis, ids.shape[1] * ids.shape[2] * 8 + 16
            return run_layer(*of_layer, x, ids[number], weights[number], of_expert)

        return apply(program, layer, x)

    mapped = sharded(
        run,
        make_mesh(sizes),
        in_specs=(tokens, P(None, *tokens), P(None, *tokens), P(None, axis)),
        out_specs=tokens,
        check_vma=check_vma,
    )

    @jax.jit
    def forward_and_back(x, ids, weights, scale, g):
        out, pull = jax.vjp(
            lambda *primals: mapped(primals[0], ids, *primals[1:]), x, weights, scale
        )
        return out, pull(g)

    x, g = rng.uniform(0.5, 1.5, (2, ids.shape[1], width)).astype("f4")
    weights = rng.uniform(0.5, 1, ids.shape).astype("f4")
    scale = rng.uniform(0.5, 1, (len(layers), experts)).astype("f4")
    out, (dx, dweights, dscale) = forward_and_back(x, ids, weights, scale, g)

    a = np.zeros(ids.shape[:2])
    for number, token, j in np.ndindex(ids.shape):
        if 0 <= (e := ids[number, token, j]) < experts:
            a[number, token] += float(weights[number, token, j]) * scale[number, e]
    value, derivatives = factor(program, a)
    da = derivatives * (x.astype("f8") * g).sum(1)
    want_weights, want_scale = np.zeros(ids.shape), np.zeros(scale.shape)
    for number, token, j in np.ndindex(ids.shape):
        if 0 <= (e := ids[number, token, j]) < experts:
            want_weights[number, token, j] = da[number, token] * scale[number, e]
            want_scale[number, e] += da[number, token] * weights[number, token, j]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(out, value[:, None] * x, err_msg="out")
    close(dx, value[:, None] * g, err_msg="dx")
    close(dweights, want_weights, err_msg="dweights")
    close(dscale, want_scale, err_msg="dscale")
