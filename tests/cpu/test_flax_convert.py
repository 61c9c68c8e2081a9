"""Parameter layouts of other projects: exact both ways, right by each project's own formula."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jax_fusco.flax import (
    LAYOUTS,
    MoE,
    SigmoidRouter,
    TopKSoftmaxRouter,
    assign_params,
    load_params,
    store_params,
)

E, D, H, S = 4, 6, 5, 10
Arrays = dict[str, Any]

PAIRS = {"gate_up_down": ("gate_proj", "up_proj", "down_proj"), "w1_w2_w3": ("w1", "w3", "w2")}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "wi_wo": {
        "gate.kernel": (D, E),
        "gate.bias": (E,),
        "wi_0": (E, D, H),
        "wi_1": (E, D, H),
        "wi_0_bias": (E, H),
        "wi_1_bias": (E, H),
        "wo": (E, H, D),
        "wo_bias": (E, D),
    },
    "w13_w2": {"router": (D, E), "w13": (E, D, 2 * H), "w2": (E, H, D)},
    "gpt_oss": {
        "router.weight": (E, D),
        "router.bias": (E,),
        "experts.gate_up_proj": (E, D, 2 * H),
        "experts.gate_up_proj_bias": (E, 2 * H),
        "experts.down_proj": (E, H, D),
        "experts.down_proj_bias": (E, D),
    },
} | {
    layout: {"gate.weight": (E, D), "gate.e_score_correction_bias": (E,)}
    | {f"experts.{e}.{n}.weight": (H, D) for e in range(E) for n in (gate, up)}
    | {f"experts.{e}.{down}.weight": (D, H) for e in range(E)}
    | {f"shared_experts.{n}.weight": (S, D) for n in (gate, up)}
    | {f"shared_experts.{down}.weight": (D, S)}
    for layout, (gate, up, down) in PAIRS.items()
}


def arrays_of(layout: str, dtype: Any = np.float32) -> Arrays:
    rng = np.random.default_rng(0)
    return {n: (rng.normal(size=s) * 0.5).astype(dtype) for n, s in SHAPES[layout].items()}


def test_every_layout_is_tested() -> None:
    assert set(SHAPES) == set(LAYOUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip_is_exact(layout: str, dtype: Any) -> None:
    arrays = arrays_of(layout, dtype)
    back = store_params(load_params(arrays, layout), layout)
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert isinstance(back[name], np.ndarray)
        assert back[name].dtype == dtype
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_jax_arrays_stay_jax_arrays(layout: str) -> None:
    params = load_params({n: jnp.asarray(a) for n, a in arrays_of(layout).items()}, layout)
    want = load_params(arrays_of(layout), layout)
    for name, array in params.items():
        assert isinstance(array, jax.Array)
        np.testing.assert_array_equal(array, want[name])


def silu(v: np.ndarray) -> np.ndarray:
    return v / (1 + np.exp(-v))


def gated(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    return (silu(x @ gate) * (x @ up)) @ down


def expert_by_their_formula(layout: str, a: Arrays, e: int, x: np.ndarray) -> np.ndarray:
    """What expert e makes of one token, as the project that owns the layout writes it."""
    if layout == "wi_wo":
        hidden = silu(x @ a["wi_0"][e] + a["wi_0_bias"][e])
        return hidden * (x @ a["wi_1"][e] + a["wi_1_bias"][e]) @ a["wo"][e] + a["wo_bias"][e]
    if layout == "w13_w2":
        return gated(x, a["w13"][e][:, :H], a["w13"][e][:, H:], a["w2"][e])
    if layout == "gpt_oss":
        both = x @ a["experts.gate_up_proj"][e] + a["experts.gate_up_proj_bias"][e]
        gate, up = np.minimum(both[::2], 7.0), np.clip(both[1::2], -7.0, 7.0)
        hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
        return hidden @ a["experts.down_proj"][e] + a["experts.down_proj_bias"][e]
    return gated(x, *(a[f"experts.{e}.{n}.weight"].T for n in PAIRS[layout]))


def logits_by_their_formula(layout: str, a: Arrays, x: np.ndarray) -> np.ndarray:
    if layout == "wi_wo":
        return x @ a["gate.kernel"] + a["gate.bias"]
    if layout == "w13_w2":
        return x @ a["router"]
    if layout == "gpt_oss":
        return x @ a["router.weight"].T + a["router.bias"]
    return x @ a["gate.weight"].T


def block_of(layout: str) -> MoE:
    """A block that has a place for every array of the layout."""
    sigmoid, biased = layout in PAIRS, layout in ("wi_wo", "gpt_oss")
    return MoE(
        D,
        H,
        num_experts=E,
        top_k=2,
        router=SigmoidRouter() if sigmoid else TopKSoftmaxRouter(use_bias=biased),
        activation="clamped_swiglu" if layout == "gpt_oss" else "swiglu",
        use_bias=biased,
        num_shared_experts=2 if sigmoid else 0,
        capacity_factor=None,
        rngs=nnx.Rngs(0),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loaded_block_computes_what_the_owner_of_the_layout_computes(layout: str) -> None:
    arrays = arrays_of(layout)
    sigmoid = layout in PAIRS
    moe = block_of(layout)
    assign_params(moe, load_params(arrays, layout))
    x = np.random.default_rng(1).normal(size=(7, D)).astype(np.float32)
    y, _ = moe(jnp.asarray(x))
    for t, token in enumerate(x.astype(np.float64)):
        logits = logits_by_their_formula(layout, arrays, token)
        scores = 1 / (1 + np.exp(-logits)) if sigmoid else np.exp(logits - logits.max())
        bias = arrays["gate.e_score_correction_bias"] if sigmoid else 0.0
        ids = np.argsort(-(scores + bias))[:2]
        want = sum(
            scores[e] / scores[ids].sum() * expert_by_their_formula(layout, arrays, e, token)
            for e in ids
        )
        if sigmoid:
            want += gated(token, *(arrays[f"shared_experts.{n}.weight"].T for n in PAIRS[layout]))
        np.testing.assert_allclose(y[t], want, rtol=2e-5, atol=2e-5)
    for name, array in store_params(moe.params(), layout).items():
        np.testing.assert_array_equal(array, arrays[name])


def without(arrays: Arrays, name: str) -> Arrays:
    return {n: a for n, a in arrays.items() if n != name}


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("wi_wo", lambda a: without(a, "wi_1"), "wi_1: got nothing, need it in layout 'wi_wo'"),
        (
            "w13_w2",
            lambda a: a | {"w13": a["w13"][..., 1:]},
            "w13: got shape (4, 6, 9), need [E, d, 2h] where d = 6, E = 4",
        ),
        (
            "wi_wo",
            lambda a: a | {"wo": a["wo"][:, 1:]},
            "wo: got shape (4, 4, 6), need [E, h, d] where d = 6, E = 4, h = 5",
        ),
        (
            "w13_w2",
            lambda a: a | {"w2": a["w2"][0]},
            "w2: got shape (5, 6), need [E, h, d] where d = 6, E = 4, h = 5",
        ),
        (
            "gate_up_down",
            lambda a: without(a, "experts.3.up_proj.weight"),
            "experts.3.up_proj.weight: got nothing, need one for each of 4 experts",
        ),
        (
            "gate_up_down",
            lambda a: (
                without(a, "gate.e_score_correction_bias") | {"gate.weight": a["gate.weight"][1:]}
            ),
            "experts.*.gate_proj.weight: got 4 experts, need 3, one for each row of the router",
        ),
        (
            "gate_up_down",
            lambda a: without(a, "gate.weight"),
            "gate.weight: got nothing, need it in layout 'gate_up_down'",
        ),
        (
            "gpt_oss",
            lambda a: a | {"experts.bias": a["router.bias"]},
            "experts.bias: got a name that layout 'gpt_oss' does not have",
        ),
        (
            "mixtral",
            lambda a: a,
            "layout: got 'mixtral', need one of wi_wo, w13_w2, gate_up_down, w1_w2_w3, gpt_oss",
        ),
    ],
)
def test_what_does_not_fit_is_said(layout: str, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_params(change(arrays_of(layout) if layout in SHAPES else {}), layout)


def test_a_layout_without_biases_refuses_them() -> None:
    params = load_params(arrays_of("wi_wo"), "wi_wo")
    message = "router_bias: got a parameter that layout 'w13_w2' has no place for"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        store_params(params, "w13_w2")


@pytest.mark.parametrize(
    ("layout", "lacking", "message"),
    [
        (
            "gate_up_down",
            "shared_experts.",
            "shared_wi_kernel: got nothing, need shape (6, 2, 10): this block has one",
        ),
        (
            "w1_w2_w3",
            "shared_experts.w2.",
            "shared_wo_kernel: got nothing, need shape (10, 6): this block has one",
        ),
        (
            "gate_up_down",
            "gate.e_score_correction_bias",
            "balance_bias: got nothing, need shape (4,): this block has one",
        ),
        (
            "gpt_oss",
            "router.bias",
            "router_bias: got nothing, need shape (4,): this block has one",
        ),
        (
            "gpt_oss",
            "experts.down_proj_bias",
            "wo_bias: got nothing, need shape (4, 6): this block has one",
        ),
    ],
)
def test_a_block_refuses_arrays_that_leave_a_parameter_out(
    layout: str, lacking: str, message: str
) -> None:
    moe = block_of(layout)
    before = moe.params()
    arrays = {n: a for n, a in arrays_of(layout).items() if not n.startswith(lacking)}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        assign_params(moe, load_params(arrays, layout))
    for name, array in moe.params().items():
        np.testing.assert_array_equal(array, before[name])


def test_a_block_of_another_size_refuses_the_arrays() -> None:
    moe = MoE(D, H + 1, num_experts=E, top_k=2, rngs=nnx.Rngs(0))
    before = moe.params()
    message = "wi_kernel: got shape (4, 6, 2, 5), need (4, 6, 2, 6)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        assign_params(moe, load_params(arrays_of("w13_w2"), "w13_w2"))
    np.testing.assert_array_equal(moe.router_kernel[...], before["router_kernel"])
