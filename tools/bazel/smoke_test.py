"""The modules that Bazel built, in use: dispatch and combine on four CPU devices, both ways."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

# The environment's own editable install would come before the files that Bazel laid out here.
sys.meta_path = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
jf = importlib.import_module("jax_fusco")


def shuffle(implementation: str) -> np.ndarray:
    def moe(x, expert_ids):
        plan = jf.make_plan(
            expert_ids, axis_name="expert", num_experts=8, implementation=implementation
        )
        return jf.combine(2 * jf.dispatch(x, plan), None, plan)

    ids = np.random.default_rng(0).integers(0, 8, (64, 2)).astype(np.int32)
    x = jnp.arange(64 * 16, dtype=jnp.float32).reshape(64, 16)
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(moe, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    return np.asarray(jax.jit(mapped)(x, ids))


for name in ("_core", "_ffi"):
    module = importlib.import_module(f"jax_fusco.{name}")
    assert "runfiles" in str(module.__file__), module.__file__
np.testing.assert_array_equal(shuffle("fused"), shuffle("xla"))
