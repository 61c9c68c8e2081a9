"""Which implementation serves a call, and what a sequence of them means."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import P, make_mesh, sharded

import jax_fusco as jf

IDS = np.zeros((4, 3, 1), np.int32)


def calls(function, *arguments) -> bool:
    """Whether a lowered program calls the engine."""
    return "jax_fusco_plan" in jax.jit(function).lower(*arguments).as_text()


def slots(implementation, axis_name="expert", num_experts=4):
    def run(ids):
        plan = jf.make_plan(
            ids.reshape(-1, 1),
            axis_name=axis_name,
            num_experts=num_experts,
            implementation=implementation,
        )
        return plan.slot[None]

    return run


@pytest.mark.parametrize(
    ("implementation", "engine"),
    [
        (None, True),
        ("fused", True),
        ("xla", False),
        (("xla",), False),
        (("fused", "xla"), True),
        (["xla", "fused"], False),
    ],
)
def test_in_a_mesh_of_cpu_devices(implementation, engine):
    spec = P("expert")
    run = sharded(slots(implementation), make_mesh(4), in_specs=spec, out_specs=spec)
    assert calls(run, IDS) == engine


@pytest.mark.parametrize(("implementation", "engine"), [(None, True), ("xla", False)])
def test_without_a_mesh(implementation, engine):
    run = slots(implementation, None)
    assert calls(run, IDS[0]) == engine
    np.testing.assert_array_equal(jax.jit(run)(IDS[0])[0].ravel(), [0, 1, 2])


@pytest.mark.parametrize("implementation", [None, "xla", ("fused", "xla")])
def test_an_axis_of_vmap_is_served_by_plain_xla(implementation):
    run = jax.vmap(slots(implementation), axis_name="expert")
    assert not calls(run, IDS)


def test_a_program_lowered_for_another_platform_has_no_cpu_call():
    """Without a mesh the platform is known only when lowering."""
    traced = jax.jit(slots(None, None)).trace(jax.ShapeDtypeStruct((3, 1), jnp.int32))
    assert "jax_fusco_plan" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "jax_fusco_plan" not in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_missing_module_is_an_error_that_says_what_to_do(monkeypatch):
    import sys

    from jax_fusco import ffi

    monkeypatch.setitem(sys.modules, "jax_fusco._ffi", None)
    monkeypatch.delattr("jax_fusco._ffi", raising=False)
    ffi.cpu_module.cache_clear()
    try:
        with pytest.raises(ImportError, match="install jax_fusco with pip, or use implementation"):
            ffi.cpu_module()
    finally:
        ffi.cpu_module.cache_clear()


@pytest.mark.parametrize("found", [(0, 0), (99, 999)])
def test_headers_that_do_not_fit_are_an_error_that_says_what_to_do(monkeypatch, found):
    from jax_fusco import ffi

    monkeypatch.setattr(ffi, "runtime_ffi_version", lambda: found)
    ffi.cpu_module.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"was built for FFI version 0\.\d+, but jaxlib"):
            ffi.cpu_module()
    finally:
        ffi.cpu_module.cache_clear()


def test_more_ranks_or_experts_than_gpus_can_take_are_refused(monkeypatch):
    from types import SimpleNamespace

    from jax_fusco import ffi, mesh

    limits = SimpleNamespace(max_ranks=4, max_experts=8, plan_scratch_bytes=lambda *_: 0)
    monkeypatch.setattr(ffi, "cuda_module", lambda: limits)
    monkeypatch.setattr(ffi, "_cuda_plugin", lambda: True)
    for module in (mesh, ffi):
        monkeypatch.setattr(module, "platform", lambda: "cuda")
    spec = P("expert")

    def trace(ranks: int, num_experts: int) -> None:
        run = slots("fused", num_experts=num_experts)
        jax.eval_shape(
            sharded(run, make_mesh(ranks), in_specs=spec, out_specs=spec),
            jax.ShapeDtypeStruct((ranks, 3, 1), jnp.int32),
        )

    trace(4, 8)
    with pytest.raises(ValueError, match="'fused', need at most 4 ranks for 'fused' on GPUs "):
        trace(8, 8)
    with pytest.raises(ValueError, match="num_experts: got 12, need at most 8 for 'fused' on GPUs"):
        trace(4, 12)


def test_a_cuda_module_that_does_not_load_is_an_error_and_a_missing_one_is_not(monkeypatch):
    from jax_fusco import ffi

    def load(error):
        def refuse(name):
            assert name == "jax_fusco._cuda"
            raise error

        monkeypatch.setattr(ffi.importlib, "import_module", refuse)
        ffi.cuda_module.cache_clear()
        return ffi.cuda_module()

    try:
        assert load(ModuleNotFoundError("none")) is None
        with pytest.raises(ImportError, match=r"_cuda cannot be loaded \(libgone.so is missing\)"):
            load(ImportError("libgone.so is missing"))
    finally:
        ffi.cuda_module.cache_clear()
