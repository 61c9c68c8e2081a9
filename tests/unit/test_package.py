"""What importing the package does, and does not do; its names and its version."""

from __future__ import annotations

import dataclasses
import importlib.metadata

import jax
import numpy as np
import pytest
from helpers import run_python

import jax_fusco as jf


def test_import_starts_no_backend():
    done = run_python(
        "import jax_fusco, jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        # The devices can still be chosen.
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "assert len(jax.devices()) == 3",
        env={"XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr


def test_import_loads_neither_flax_nor_matplotlib():
    done = run_python(
        "import sys, jax_fusco\n"
        "assert not {'flax', 'matplotlib', 'optax', 'tqdm'} & set(sys.modules), sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_register_can_be_called_at_any_time():
    done = run_python(
        "import jax_fusco as jf\n"
        "jf.register(); jf.register()\n"
        "import jax, numpy as np\n"
        "plan = jax.jit(lambda i: jf.make_plan(i, axis_name=None, num_experts=2,"
        " implementation='fused').slot)(np.zeros((3, 1), np.int32))\n"
        "assert plan.ravel().tolist() == [0, 1, 2]"
    )
    assert done.returncode == 0, done.stderr


_SERIALIZED = """
import pathlib, pickle, sys
import jax, numpy as np
import jax_fusco as jf
from jax.experimental import serialize_executable

def run(x, ids):
    plan = jf.make_plan(ids, axis_name=None, num_experts=4, implementation="fused")
    return jf.combine(jf.dispatch(x, plan), None, plan)

action, path = sys.argv[1], pathlib.Path(sys.argv[2])
x = np.arange(6, dtype="f4").reshape(3, 2)
ids = np.array([[0, 1], [2, -1], [1, 3]], "i4")
if action == "write":
    program = jax.jit(run).lower(x, ids).compile()
    path.write_bytes(pickle.dumps(serialize_executable.serialize(program)))
else:
    if action == "register and read":
        jf.register()
    program = serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))
    assert np.asarray(program(x, ids)).tolist() == [[0, 2], [2, 3], [8, 10]]
"""


def test_a_serialized_program_runs_where_nothing_was_traced(tmp_path):
    """Deserialised programs are never lowered: `register` makes their calls known."""
    # JAX loads a program onto all devices there are: let there be one.
    arguments = str(tmp_path / "program")
    for action in ("write", "register and read"):
        done = run_python(_SERIALIZED, arguments=[action, arguments], env={"XLA_FLAGS": ""})
        assert done.returncode == 0, done.stderr
    done = run_python(_SERIALIZED, arguments=["read", arguments])
    assert "No FFI handler registered for jax_fusco_plan" in done.stderr


def test_names():
    public = {
        "REMAT_SAVE_NAMES",
        "Plan",
        "capacity",
        "combine",
        "dispatch",
        "make_plan",
        "ragged_all_to_all",
        "register",
    }
    assert public <= set(jf.__all__)
    assert all(hasattr(jf, name) for name in jf.__all__)
    assert all(isinstance(name, str) for name in jf.REMAT_SAVE_NAMES)


def test_version():
    try:
        assert jf.__version__ == importlib.metadata.version("jax-fusco")
    except importlib.metadata.PackageNotFoundError:
        assert jf.__version__


@pytest.mark.parametrize("implementation", ["xla", "fused"])
def test_plan_is_a_frozen_dataclass_and_a_pytree(implementation):
    ids = np.array([[0, 1], [1, -1]], np.int32)
    plan = jax.jit(
        lambda ids: jf.make_plan(ids, axis_name=None, num_experts=2, implementation=implementation)
    )(ids)
    assert dataclasses.is_dataclass(plan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.slot = None
    assert plan.group_sizes.shape == plan.expert_counts.shape == (2,)
    assert plan.slot.shape == (2, 2)
    assert plan.num_dropped.shape == plan.num_invalid.shape == ()
    leaves, tree = jax.tree.flatten(plan)
    assert all(leaf.dtype == np.int32 for leaf in leaves)
    again = jax.tree.unflatten(tree, leaves)
    assert again.implementation == plan.implementation
    assert jax.tree.structure(again) == tree
    assert hash(tree) == hash(jax.tree.structure(again))
