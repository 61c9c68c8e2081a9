"""Topology: which ranks form a node, that is, reach each other's memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from jax_fusco.mesh import Axis, AxisName, expert_axis
from jax_fusco.plan import whole

# The cost model of slices, guessed: a rail's share of its link for one node, and what a slice costs
# beside its bytes.
_WIRE_BYTES_PER_S, _SLICE_S = 5e9, 50e-6

_DOMAINS = ("slice_index", "partition_index")


@dataclasses.dataclass(frozen=True)
class Topology:
    """N nodes of L ranks each; `rank = node * L + local`.

    A node is a set of ranks that reach each other's memory: a process on CPU, the GPUs of an NVLink
    domain. The local index is also the rank's rail: rows cross between nodes from a rail to the
    same rail.

    Attributes:
      node_axis: the mesh axis over the nodes; None where `local_axis` alone holds all ranks, each
        `ranks_per_node` consecutive ones a node.
      local_axis: the mesh axis over the ranks of a node; with `node_axis=None` the axis (or tuple
        of axes, row-major) of all ranks.
      ranks_per_node: L; None means the size of `local_axis`, which needs a `node_axis`.
      slice_rows: rows that cross from a rail to a node at a time; None lets a cost model choose.
      wire_dtype: what partial sums cross as: None for the dtype of the rows (float32 where that is
        narrower than 16 bits), or "float32" (float64 for float64 rows).
      exchange: "dense" (`all_to_all` of slices of one size), or "ragged" (`ragged_all_to_all` of
        the rows there are, for programs compiled with `compiler_options`; see docs/hosts.md).
      members: for each node the names of its devices, where `detect` saw them.
      seen_by: what `detect` went by.

    Raises:
      TypeError, ValueError: an argument's type or value, named in the message.
    """

    node_axis: str | None = "node"
    local_axis: str | tuple[str, ...] = "expert"
    ranks_per_node: int | None = None
    slice_rows: int | None = None
    wire_dtype: str | None = None
    exchange: str = "dense"
    members: tuple[tuple[str, ...], ...] = dataclasses.field(default=(), compare=False, repr=False)
    seen_by: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.node_axis is not None and not isinstance(self.node_axis, str):
            raise TypeError(f"node_axis: got {self.node_axis!r}, need a mesh axis name or None")
        names = self.local_axis if isinstance(self.local_axis, tuple) else (self.local_axis,)
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f"local_axis: got {self.local_axis!r}, need a mesh axis name or a tuple of them"
            )
        if self.ranks_per_node is not None:
            object.__setattr__(
                self, "ranks_per_node", whole("ranks_per_node", self.ranks_per_node, 1)
            )
        if self.slice_rows is not None:
            object.__setattr__(self, "slice_rows", whole("slice_rows", self.slice_rows, 1))
        if self.wire_dtype not in (None, "float32"):
            raise ValueError(f"wire_dtype: got {self.wire_dtype!r}, need 'float32' or None")
        if self.exchange not in ("dense", "ragged"):
            raise ValueError(f"exchange: got {self.exchange!r}, need 'dense' or 'ragged'")
        if self.node_axis is None and self.ranks_per_node is None:
            raise ValueError("ranks_per_node: got None, need a number where node_axis is None")
        if self.node_axis is not None and len(names) > 1:
            raise ValueError(
                f"local_axis: got {self.local_axis!r}, need one mesh axis beside a node_axis"
            )
        if len(set(names)) != len(names):
            raise ValueError(f"local_axis: got {self.local_axis!r}, need distinct mesh axes")
        if self.node_axis in names:
            raise ValueError(f"local_axis: got {self.local_axis!r}, need another than node_axis")

    @property
    def axis_name(self) -> tuple[str, ...]:
        """The mesh axes whose row-major index is the rank."""
        names = self.local_axis if isinstance(self.local_axis, tuple) else (self.local_axis,)
        return names if self.node_axis is None else (self.node_axis, *names)

    @property
    def compiler_options(self) -> dict[str, bool]:
        """What `jax.jit(step, compiler_options=)` needs for this exchange on GPUs; nothing for
        "dense".

        XLA:GPU would else gather all rows over nodes where they should be exchanged, refuse to send
        them by NCCL, and run nothing beside the exchange.
        """
        if self.exchange == "dense":
            return {}
        options = {
            "xla_gpu_unsupported_enable_ragged_all_to_all_multi_host_decomposer": False,
            "xla_gpu_enable_latency_hiding_scheduler": True,
        }
        if jax.__version_info__ >= (0, 11):  # older ones do not know it, and do not refuse
            options["xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback"] = True
        return options

    def shape(self, axis_sizes: Mapping[str, int]) -> tuple[int, int]:
        """(N, L) where the mesh axes have these sizes (`mesh.shape`).

        Raises:
          ValueError: an axis is missing, or the sizes do not fit.
        """
        for name in self.axis_name:
            if name not in axis_sizes:
                raise ValueError(
                    f"topology: got axis {name!r}, need one of the mesh ({', '.join(axis_sizes)})"
                )
        sizes = [axis_sizes[name] for name in self.axis_name]
        if self.node_axis is not None:
            if self.ranks_per_node not in (None, sizes[1]):
                raise ValueError(
                    f"ranks_per_node: got {self.ranks_per_node}, need {sizes[1]}, "
                    f"the size of mesh axis {self.local_axis!r}"
                )
            return sizes[0], sizes[1]
        ranks, local = int(np.prod(sizes)), self.ranks_per_node
        assert local is not None
        if ranks % local:
            raise ValueError(
                f"ranks_per_node: got {local}, need a divisor of the {ranks} ranks along "
                f"{_spell(self.axis_name)}"
            )
        return ranks // local, local

    def rows_of_slices(self, tokens: int, row_bytes: int) -> int:
        """Rows of each slice that a rail sends to a node, of at most `tokens` rows in all.

        A slice costs a fixed time. Before the first crosses it is packed, after the last has
        crossed it is forwarded (both at the speed of the wire, say), and half of the last is
        padding. That is least in all with `sqrt(2.5 * time on the wire / time of a slice)` slices,
        here between 1 and 16.
        """
        if self.slice_rows is not None:
            return min(self.slice_rows, max(tokens, 1))
        wire = tokens * row_bytes / _WIRE_BYTES_PER_S
        slices = min(max(round(math.sqrt(2.5 * wire / _SLICE_S)), 1), 16)
        return max(-(-tokens // slices), 1)

    @classmethod
    def detect(cls, mesh: Any, axis_name: AxisName, ranks_per_node: int | None = None) -> Topology:
        """The topology of the ranks along `axis_name`, from the devices of `mesh`.

        Devices belong together that share `slice_index`, or `partition_index`, whichever tells some
        apart first, else `process_index`. These do not always show an NVLink domain (one process a
        GPU, say): `ranks_per_node` overrules them, and `describe()` prints what was found.

        Args:
          mesh: a `jax.sharding.Mesh` of real devices.
          axis_name: the mesh axis of the ranks, or a tuple whose row-major index is the rank.
          ranks_per_node: ranks of a node, consecutive along the axis.

        Returns:
          With two axes of which the first is exactly the nodes: `Topology(first, second)`; else one
          that cuts the ranks along `axis_name` into nodes.

        Raises:
          TypeError: `axis_name` is no axis name.
          ValueError: the axis is unknown, or its ranks do not form equal nodes of neighbours.
        """
        names = _names(axis_name)
        devices = _along(mesh, names)
        ranks = devices.shape[1]
        if ranks_per_node is not None:
            local, seen_by = whole("ranks_per_node", ranks_per_node, 1), "ranks_per_node"
            if ranks % local:
                raise ValueError(
                    f"ranks_per_node: got {local}, need a divisor of the {ranks} ranks along "
                    f"{_spell(names)}"
                )
        else:
            local, seen_by = _blocks(devices, names)
        members = tuple(
            tuple(map(str, devices[0, at : at + local])) for at in range(0, ranks, local)
        )
        if len(names) == 2 and mesh.shape[names[1]] == local:
            found = cls(names[0], names[1], local)
        else:
            found = cls(None, names[0] if len(names) == 1 else names, local)
        return dataclasses.replace(found, members=members, seen_by=seen_by)

    def describe(self, axis_sizes: Mapping[str, int] | None = None) -> str:
        """What a person can check: nodes, their ranks, and their devices where they were seen.

        Args:
          axis_sizes: `mesh.shape`; needed where the topology was not detected.
        """
        if axis_sizes is not None:
            nodes, local = self.shape(axis_sizes)
        elif self.members:
            nodes, local = len(self.members), len(self.members[0])
        else:
            return (
                f"nodes along mesh axis {self.node_axis!r}, their ranks along {self.local_axis!r}"
            )
        by = f", told apart by {self.seen_by}" if self.seen_by else ""
        lines = [
            f"{_count(nodes, 'node')} of {_count(local, 'rank')} along {_spell(self.axis_name)}{by}"
        ]
        for node in range(nodes):
            first = node * local
            devices = f": {', '.join(self.members[node])}" if self.members else ""
            lines.append(f"  node {node}: ranks {first} to {first + local - 1}{devices}")
        return "\n".join(lines)


def _names(axis_name: AxisName) -> tuple[str, ...]:
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, tuple | list) or not names:
        raise TypeError(f"axis_name: got {axis_name!r}, need a mesh axis name or a tuple of them")
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"axis_name: got {axis_name!r}, need a mesh axis name or a tuple of them")
    return tuple(names)


def _spell(names: Sequence[str]) -> str:
    return repr(names[0]) if len(names) == 1 else repr(tuple(names))


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _along(mesh: Any, names: tuple[str, ...]) -> np.ndarray:
    """[groups, R]: the devices of each set of ranks that shuffle together, in rank order."""
    if not isinstance(getattr(mesh, "devices", None), np.ndarray):
        raise TypeError(f"mesh: got {type(mesh).__name__}, need a jax.sharding.Mesh of devices")
    for name in names:
        if name not in mesh.axis_names:
            raise ValueError(
                f"axis_name: got {name!r}, need an axis of the mesh ({', '.join(mesh.axis_names)})"
            )
    places = [mesh.axis_names.index(name) for name in names]
    moved = np.moveaxis(mesh.devices, places, range(-len(places), 0))
    return moved.reshape(-1, int(np.prod([mesh.devices.shape[place] for place in places])))


def _blocks(devices: np.ndarray, names: tuple[str, ...]) -> tuple[int, str]:
    """(ranks per node, attribute): the equal runs of neighbours that share the attribute."""
    attribute = "process_index"
    for candidate in _DOMAINS:
        if len({getattr(device, candidate, None) for device in devices.flat}) > 1:
            attribute = candidate
            break
    axis, found = _spell(names), set()
    for group in devices:
        keys = [getattr(device, attribute) for device in group]
        starts = [at for at, key in enumerate(keys) if not at or key != keys[at - 1]]
        lengths = np.diff([*starts, len(keys)]).tolist()
        if len(starts) != len(set(keys)):
            again = next(keys[at] for at in starts if keys.index(keys[at]) != at)
            raise ValueError(
                f"mesh: got ranks of {attribute} {again} apart from each other along {axis}, need "
                "the ranks of a node next to each other; reorder the devices or pass ranks_per_node"
            )
        if len(set(lengths)) > 1:
            raise ValueError(
                f"mesh: got nodes of {', '.join(map(str, lengths))} ranks along {axis} (by "
                f"{attribute}), need equally many on every node; or pass ranks_per_node"
            )
        found.add(lengths[0])
    if len(found) > 1:
        raise ValueError(
            f"mesh: got nodes of {' and '.join(map(str, sorted(found)))} ranks in different groups "
            f"along {axis} (by {attribute}), need equally many; or pass ranks_per_node"
        )
    return found.pop(), attribute


@dataclasses.dataclass(frozen=True)
class Levels:
    """The two axes of a shuffle: the ranks of this node, and this rail's ranks on all nodes."""

    local: Axis
    node: Axis

    @classmethod
    def of(cls, topology: Topology) -> Levels:
        """Those of the enclosing `jax.shard_map`; ValueError where its axes do not fit."""
        axis = expert_axis(topology.axis_name)
        nodes, ranks = topology.shape({name: lax.axis_size(name) for name in axis.names})
        if topology.node_axis is not None:
            return cls(expert_axis(topology.local_axis), expert_axis(topology.node_axis))
        rank = [[node * ranks + local for local in range(ranks)] for node in range(nodes)]
        same_node = tuple(map(tuple, rank))
        same_local = tuple(zip(*rank, strict=True))
        return cls(Axis(axis.names, ranks, same_node), Axis(axis.names, nodes, same_local))
