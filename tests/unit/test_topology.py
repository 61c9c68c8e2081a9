"""Topology: detected from devices, bound to meshes, printed, and refused in words."""

from __future__ import annotations

import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_fusco.topology import Topology


@dataclasses.dataclass(frozen=True)
class Device:
    name: str
    process_index: int
    slice_index: int = 0

    def __str__(self) -> str:
        return self.name


def mesh_of(keys, axes=("expert",), shape=None, attribute="process_index"):
    """A stand-in for a mesh whose devices have these process (or slice) indices."""
    devices = np.empty(len(keys), object)
    for at, key in enumerate(keys):
        devices[at] = Device(f"gpu{at}", **{"process_index": 0, attribute: key})
    devices = devices.reshape(shape or (len(keys),))
    sizes = dict(zip(axes, devices.shape, strict=True))
    return types.SimpleNamespace(devices=devices, axis_names=axes, shape=sizes)


def test_two_axes():
    topology = Topology()
    assert topology == Topology(node_axis="node", local_axis="expert")
    assert topology.axis_name == ("node", "expert")
    assert topology.shape({"data": 3, "node": 2, "expert": 4}) == (2, 4)
    assert topology.describe() == "nodes along mesh axis 'node', their ranks along 'expert'"
    assert topology.describe({"node": 2, "expert": 4}) == (
        "2 nodes of 4 ranks along ('node', 'expert')\n"
        "  node 0: ranks 0 to 3\n"
        "  node 1: ranks 4 to 7"
    )
    assert hash(topology) == hash(Topology())
    with pytest.raises(dataclasses.FrozenInstanceError):
        topology.node_axis = "other"


def test_one_axis():
    topology = Topology(None, "expert", 4)
    assert topology.axis_name == ("expert",)
    assert topology.shape({"expert": 12}) == (3, 4)
    assert Topology(None, ("a", "b"), 4).shape({"a": 3, "b": 8}) == (6, 4)


def test_detect_by_process():
    topology = Topology.detect(mesh_of([3, 3, 5, 5, 1, 1]), "expert")
    assert topology == Topology(None, "expert", 2)
    assert topology.describe() == (
        "3 nodes of 2 ranks along 'expert', told apart by process_index\n"
        "  node 0: ranks 0 to 1: gpu0, gpu1\n"
        "  node 1: ranks 2 to 3: gpu2, gpu3\n"
        "  node 2: ranks 4 to 5: gpu4, gpu5"
    )


def test_detect_by_slice_where_it_tells_devices_apart():
    mesh = mesh_of([0, 0, 0, 0, 1, 1, 1, 1], attribute="slice_index")
    topology = Topology.detect(mesh, "expert")
    assert (topology.ranks_per_node, topology.seen_by) == (4, "slice_index")


def test_detect_two_axes():
    mesh = mesh_of([0, 0, 1, 1] * 2, ("data", "node", "expert"), (2, 2, 2))
    assert Topology.detect(mesh, ("node", "expert")) == Topology("node", "expert", 2)
    assert Topology.detect(mesh, ("data", "expert"), 2) == Topology("data", "expert", 2)
    assert Topology.detect(mesh, ("node", "expert"), 4) == Topology(None, ("node", "expert"), 4)


def test_ranks_per_node_overrules():
    topology = Topology.detect(mesh_of(range(8)), "expert", ranks_per_node=4)
    assert topology.shape({"expert": 8}) == (2, 4)
    assert topology.describe().startswith(
        "2 nodes of 4 ranks along 'expert', told apart by ranks_per_node\n"
    )


def test_detect_on_real_devices():
    mesh = Mesh(np.array(jax.devices()[:4]), ("expert",))
    topology = Topology.detect(mesh, "expert")
    assert topology.shape(mesh.shape) == (1, 4)
    assert topology.describe().startswith("1 node of 4 ranks along 'expert'")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Topology(3), TypeError, "node_axis: got 3, need a mesh axis name or None"),
        (
            lambda: Topology(None, ("a", "a"), 2),
            ValueError,
            "local_axis: got ('a', 'a'), need distinct mesh axes",
        ),
        (
            lambda: Topology(slice_rows=0),
            ValueError,
            "slice_rows: got 0, need an integer of at least 1",
        ),
        (
            lambda: Topology(wire_dtype="bfloat16"),
            ValueError,
            "wire_dtype: got 'bfloat16', need 'float32' or None",
        ),
        (
            lambda: Topology(exchange="sparse"),
            ValueError,
            "exchange: got 'sparse', need 'dense' or 'ragged'",
        ),
        (
            lambda: Topology("node", 3),
            TypeError,
            "local_axis: got 3, need a mesh axis name or a tuple of them",
        ),
        (
            lambda: Topology("node", ("a", "b")),
            ValueError,
            "local_axis: got ('a', 'b'), need one mesh axis beside a node_axis",
        ),
        (
            lambda: Topology("expert", "expert"),
            ValueError,
            "local_axis: got 'expert', need another than node_axis",
        ),
        (
            lambda: Topology(None, "expert"),
            ValueError,
            "ranks_per_node: got None, need a number where node_axis is None",
        ),
        (
            lambda: Topology(ranks_per_node=0),
            ValueError,
            "ranks_per_node: got 0, need an integer of at least 1",
        ),
        (
            lambda: Topology().shape({"expert": 4}),
            ValueError,
            "topology: got axis 'node', need one of the mesh (expert)",
        ),
        (
            lambda: Topology(ranks_per_node=3).shape({"node": 2, "expert": 4}),
            ValueError,
            "ranks_per_node: got 3, need 4, the size of mesh axis 'expert'",
        ),
        (
            lambda: Topology(None, "expert", 3).shape({"expert": 8}),
            ValueError,
            "ranks_per_node: got 3, need a divisor of the 8 ranks along 'expert'",
        ),
        (
            lambda: Topology.detect(None, "expert"),
            TypeError,
            "mesh: got NoneType, need a jax.sharding.Mesh of devices",
        ),
        (
            lambda: Topology.detect(mesh_of([0, 0]), None),
            TypeError,
            "axis_name: got None, need a mesh axis name or a tuple of them",
        ),
        (
            lambda: Topology.detect(mesh_of([0, 0]), "model"),
            ValueError,
            "axis_name: got 'model', need an axis of the mesh (expert)",
        ),
        (
            lambda: Topology.detect(mesh_of([0, 0]), "expert", 3),
            ValueError,
            "ranks_per_node: got 3, need a divisor of the 2 ranks along 'expert'",
        ),
        (
            lambda: Topology.detect(mesh_of([0, 0, 0, 1]), "expert"),
            ValueError,
            "mesh: got nodes of 3, 1 ranks along 'expert' (by process_index), need equally many on "
            "every node; or pass ranks_per_node",
        ),
        (
            lambda: Topology.detect(mesh_of([0, 1, 0, 1]), "expert"),
            ValueError,
            "mesh: got ranks of process_index 0 apart from each other along 'expert', need the "
            "ranks of a node next to each other; reorder the devices or pass ranks_per_node",
        ),
        (
            lambda: Topology.detect(
                mesh_of([0, 0, 1, 1, 2, 2, 2, 2], ("data", "expert"), (2, 4)), "expert"
            ),
            ValueError,
            "mesh: got nodes of 2 and 4 ranks in different groups along 'expert' (by "
            "process_index), need equally many; or pass ranks_per_node",
        ),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == message


def test_the_compiler_takes_the_options_of_an_exchange():
    assert Topology().compiler_options == {}
    options = Topology(exchange="ragged").compiler_options
    assert options
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
