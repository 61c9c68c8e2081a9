"""Plan: the integers of one shuffle."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import TYPE_CHECKING

import jax
from jaxtyping import Array, Int32

from jax_fusco import checks
from jax_fusco.mesh import AxisName

if TYPE_CHECKING:
    from jax_fusco.topology import Topology

PLAN_NAME = "jax_fusco_plan"
"""The integers of a plan, for checkpoint policies that save names."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Crossing:
    """How the rows of one shuffle cross between nodes. All int32, per rank; negative for none.

    Block n of an array `[N, T, ...]` is about the rows that this rank, a rail, sends to node n, or
    that it, a forwarder, receives from there. The block of this node stands for its own tokens,
    which need no rail.

    Attributes:
      owner_node: the node of each assignment's slot.
      pack_rank, pack_token: owner (local index) and token of each row to send.
      rail, rail_row: of each token, for each node: the rail (local index) and the row in its block.
      deliver_rank, deliver_slot: for each received row and j, the rank (local index) and the slot.
      from_rank, from_assignment: for each row of the receive buffer, its forwarder (local index)
        and the assignment there, `(n * T + row) * k + j`; -1 in a group's padding, -2 past the last
        group.
      most_rows: the most rows that any rail of all nodes sends to another node.
      topology: static, as given.
    """

    owner_node: Int32[Array, "T k"]
    pack_rank: Int32[Array, "N T"]
    pack_token: Int32[Array, "N T"]
    rail: Int32[Array, "T N"]
    rail_row: Int32[Array, "T N"]
    deliver_rank: Int32[Array, "N T k"]
    deliver_slot: Int32[Array, "N T k"]
    from_rank: Int32[Array, " C"]
    from_assignment: Int32[Array, " C"]
    most_rows: Int32[Array, ""]
    topology: Topology = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Where every row of one shuffle goes, and comes from. Made by `make_plan`; a pytree.

    All arrays are int32 and per rank. T tokens with k experts each on a rank, E_local experts and a
    receive buffer of C rows per rank.

    Attributes:
      group_sizes: rows of each local expert's group in the receive buffer, padded to the alignment;
        their running sum gives the groups' starts.
      expert_counts: rows kept in each group, without padding.
      slot: the buffer row given to each assignment on its owner, -1 if none.
      slot_rank: the rank that owns that buffer, -1 if none.
      source_rank: the rank that each buffer row comes from; negative where it comes from nowhere.
      source: the assignment, `token * k + j`, there; -1 in a group's padding, -2 past the last
        group.
      num_dropped: assignments to this rank's experts that found no room.
      num_invalid: ids outside [-1, num_experts) in this rank's own `expert_ids`.
      chain: lets the engine of GPUs read a token once for all its rows here; None elsewhere.
      crossing: how rows cross between nodes, None without a topology.
      axis_name, num_experts, num_ranks, alignment, implementation: static, as given or chosen; with
        a placement `num_experts` is the number of its slots.
    """

    group_sizes: Int32[Array, " E_local"]
    expert_counts: Int32[Array, " E_local"]
    slot: Int32[Array, "T k"]
    slot_rank: Int32[Array, "T k"]
    source_rank: Int32[Array, " C"]
    source: Int32[Array, " C"]
    num_dropped: Int32[Array, ""]
    num_invalid: Int32[Array, ""]
    chain: Int32[Array, " C"] | None
    crossing: Crossing | None
    axis_name: AxisName = dataclasses.field(metadata={"static": True})
    num_experts: int = dataclasses.field(metadata={"static": True})
    num_ranks: int = dataclasses.field(metadata={"static": True})
    alignment: int = dataclasses.field(metadata={"static": True})
    implementation: str = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Rows of the receive buffer, C."""
        return self.source.shape[0]


def whole(name: str, value: object, least: int) -> int:
    """`value` as an int of at least `least`.

    Raises:
      TypeError: it is no integer.
      ValueError: it is less than `least`.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, need an integer of at least {least}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, need an integer of at least {least}") from None
    if number < least:
        raise ValueError(f"{name}: got {number}, need an integer of at least {least}")
    return number


def bits(number: int) -> int:
    """Bits that hold any of so many values."""
    return max(number - 1, 0).bit_length()


def experts_per_rank(num_experts: int, num_ranks: int) -> int:
    """E_local; ValueError where the ranks do not divide the experts."""
    if num_experts % num_ranks:
        raise ValueError(
            f"num_experts: got {num_experts}, need a multiple of the number of ranks ({num_ranks})"
        )
    return num_experts // num_ranks


def expected_ranks(k: int, num_experts: int, num_ranks: int) -> float:
    """Mean distinct ranks of a token whose k distinct experts are drawn evenly."""
    elsewhere = num_experts - experts_per_rank(num_experts, num_ranks)
    return num_ranks * (1 - math.comb(elsewhere, k) / math.comb(num_experts, k))


def dropless_capacity(
    tokens_per_rank: int, k: int, num_experts: int, num_ranks: int, alignment: int = 1
) -> int:
    """Rows with which no top-k routing (distinct experts in a row) can overflow a buffer."""
    local = experts_per_rank(num_experts, num_ranks)
    return num_ranks * tokens_per_rank * min(k, local) + local * (alignment - 1)


def capacity(
    tokens_per_rank: int,
    k: int,
    num_experts: int,
    num_ranks: int,
    factor: float = 1.25,
    alignment: int = 1,
) -> int:
    """Rows of a receive buffer that holds `factor` times the balanced load, never more than
    dropless.

    Args:
      tokens_per_rank: T.
      k: experts per token.
      num_experts: E, over all ranks.
      num_ranks: R.
      factor: room relative to the balanced load of `T * k` rows.
      alignment: what each group is padded to, as in `make_plan`.

    Returns:
      The smaller of `ceil(factor * T * k) + E_local * (alignment - 1)` and the dropless
      `R * T * min(k, E_local) + E_local * (alignment - 1)`.

    Raises:
      TypeError, ValueError: an argument is no number, too small, or the ranks do not divide the
        experts.
    """
    tokens_per_rank = whole("tokens_per_rank", tokens_per_rank, 0)
    k = whole("k", k, 0)
    num_ranks = whole("num_ranks", num_ranks, 1)
    num_experts = whole("num_experts", num_experts, 1)
    alignment = whole("alignment", alignment, 1)
    checks.above_zero("factor", factor)
    dropless = dropless_capacity(tokens_per_rank, k, num_experts, num_ranks, alignment)
    padding = experts_per_rank(num_experts, num_ranks) * (alignment - 1)
    return min(dropless, math.ceil(factor * tokens_per_rank * k) + padding)
