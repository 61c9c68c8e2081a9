"""What a shuffle means, as literal NumPy loops over all ranks at once.

Nothing here is shared with the package, and nothing is fast. An array of the public API gains a
leading axis of ranks: `expert_ids` is `[R, T, k]`, `x` is `[R, T, ...]`, rows are `[R, C, ...]`.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import ml_dtypes
import numpy as np


@dataclasses.dataclass
class Plan:
    """One shuffle, seen from above: where each assignment goes, and what was lost."""

    group_sizes: np.ndarray  # [R, E_local], rows of each group with its padding
    expert_counts: np.ndarray  # [R, E_local], rows kept
    slot: np.ndarray  # [R, T, k], row in the owner's buffer, -1 if none
    owner: np.ndarray  # [R, T, k], rank of that buffer, -1 if none
    num_dropped: np.ndarray  # [R], assignments to the rank's experts that found no room
    num_invalid: np.ndarray  # [R], ids outside [-1, E) in the rank's own expert_ids
    capacity: int


def dropless(tokens: int, k: int, num_experts: int, num_ranks: int, alignment: int = 1) -> int:
    """Rows that hold every routing to distinct experts."""
    local = num_experts // num_ranks
    return num_ranks * tokens * min(k, local) + local * (alignment - 1)


def capacity(
    tokens: int, k: int, num_experts: int, num_ranks: int, factor: float, alignment: int
) -> int:
    """Rows for `factor` times the balanced load, never more than dropless needs."""
    local = num_experts // num_ranks
    return min(
        dropless(tokens, k, num_experts, num_ranks, alignment),
        math.ceil(factor * tokens * k) + local * (alignment - 1),
    )


def _padded(rows: int, alignment: int) -> int:
    return -(-rows // alignment) * alignment


def _fits(kept: np.ndarray, capacity: int, alignment: int) -> bool:
    """Whether cells `[E_local, R]` fit in a buffer when each expert's group is padded."""
    return sum(_padded(int(sum(cells)), alignment) for cells in kept) <= capacity


def water_fill(counts: np.ndarray, capacity: int, alignment: int) -> np.ndarray:
    """Rows kept of each cell `[E_local, R]`: the highest level that fits, then one row each."""
    if _fits(counts, capacity, alignment):
        return counts.copy()
    level = 0
    while _fits(np.minimum(counts, level + 1), capacity, alignment):
        level += 1
    kept = np.minimum(counts, level)
    for expert in range(counts.shape[0]):
        for source in range(counts.shape[1]):
            if kept[expert, source] < counts[expert, source]:
                kept[expert, source] += 1
                if not _fits(kept, capacity, alignment):
                    kept[expert, source] -= 1
    return kept


def make_plan(
    expert_ids: np.ndarray, num_experts: int, capacity: int | None = None, alignment: int = 1
) -> Plan:
    """The plan of every rank for global ids `[R, T, k]`."""
    num_ranks, tokens, k = expert_ids.shape
    local = num_experts // num_ranks
    if capacity is None:
        capacity = dropless(tokens, k, num_experts, num_ranks, alignment)
    plan = Plan(
        group_sizes=np.zeros((num_ranks, local), np.int32),
        expert_counts=np.zeros((num_ranks, local), np.int32),
        slot=np.full(expert_ids.shape, -1, np.int32),
        owner=np.full(expert_ids.shape, -1, np.int32),
        num_dropped=np.zeros(num_ranks, np.int32),
        num_invalid=np.zeros(num_ranks, np.int32),
        capacity=capacity,
    )
    cells: dict[tuple[int, int], list[tuple[int, int]]] = {
        (expert, source): [] for expert in range(num_experts) for source in range(num_ranks)
    }
    for source in range(num_ranks):
        for t in range(tokens):
            for j in range(k):
                expert = int(expert_ids[source, t, j])
                if 0 <= expert < num_experts:
                    cells[expert, source].append((t, j))
                elif expert != -1:
                    plan.num_invalid[source] += 1
    for rank in range(num_ranks):
        counts = np.zeros((local, num_ranks), np.int64)
        for l in range(local):
            for source in range(num_ranks):
                counts[l, source] = len(cells[rank * local + l, source])
        kept = water_fill(counts, capacity, alignment)
        plan.num_dropped[rank] = (counts - kept).sum()
        start = 0
        for l in range(local):
            row = start
            for source in range(num_ranks):
                for t, j in cells[rank * local + l, source][: kept[l, source]]:
                    plan.slot[source, t, j] = row
                    plan.owner[source, t, j] = rank
                    row += 1
            plan.expert_counts[rank, l] = row - start
            plan.group_sizes[rank, l] = _padded(row - start, alignment)
            start += plan.group_sizes[rank, l]
        assert start <= capacity
    return plan


def place(
    expert_ids: np.ndarray,
    expert_of_slot: np.ndarray,
    num_experts: int,
    ranks_per_node: int | None = None,
) -> np.ndarray:
    """The slot of each assignment of `[R, T, k]`, out of range where the id is.

    The nearest replicas take the assignments of a rank in turn, the rank says which begins.
    """
    num_ranks, tokens, k = expert_ids.shape
    local, slots = len(expert_of_slot) // num_ranks, np.full_like(expert_ids, -1)
    node = ranks_per_node or num_ranks
    for rank in range(num_ranks):
        seen = [0] * num_experts
        for t in range(tokens):
            for j in range(k):
                expert = int(expert_ids[rank, t, j])
                if not 0 <= expert < num_experts:
                    slots[rank, t, j] = -1 if expert == -1 else len(expert_of_slot)
                    continue
                everywhere = [s for s, e in enumerate(expert_of_slot) if e == expert]
                mine = [s for s in everywhere if s // local == rank]
                beside = [s for s in everywhere if s // local // node == rank // node]
                nearest = mine or beside or everywhere
                slots[rank, t, j] = nearest[(seen[expert] + rank) % len(nearest)]
                seen[expert] += 1
    return slots


def dispatch(x: np.ndarray, plan: Plan) -> np.ndarray:
    """Rows `[R, C, ...]` of `x` `[R, T, ...]`: zero wherever no assignment lies."""
    rows = np.zeros((len(x), plan.capacity, *x.shape[2:]), x.dtype)
    for source, t, j in np.ndindex(*plan.slot.shape):
        if plan.slot[source, t, j] >= 0:
            rows[plan.owner[source, t, j], plan.slot[source, t, j]] = x[source, t]
    return rows


def occupied(plan: Plan) -> np.ndarray:
    """Which rows `[R, C]` hold an assignment."""
    return dispatch(np.ones(plan.slot.shape[:2], bool), plan)


def in_groups(plan: Plan) -> np.ndarray:
    """Which rows `[R, C]` lie in a group, its padding included."""
    rows = np.arange(plan.capacity)
    return rows[None] < plan.group_sizes.sum(axis=1)[:, None]


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """`a * b + c` of float32 arrays, rounded once to float32.

    The product of two 24-bit significands is exact in float64. Their sum is not: it is rounded to
    odd (kept if exact, else to the neighbour whose last bit is set), after which rounding to
    float32 gives the correctly rounded result (Boldo and Melquiond, "Emulation of a FMA and
    correctly rounded sums: proved algorithms using rounding to odd", 2008).
    """
    with np.errstate(all="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        addend = np.asarray(c, np.float64)
        total = product + addend
        # Knuth's two-sum: product + addend == total + error, exactly.
        virtual = total - product
        error = (product - (total - virtual)) + (addend - virtual)
        even = (total.view(np.int64) & 1) == 0
        inexact = np.isfinite(total) & (error != 0) & even
        towards = np.where(error > 0, np.inf, -np.inf)
        return np.where(inexact, np.nextafter(total, towards), total).astype(np.float32)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """`a * b + c` of finite float64 arrays, rounded once to float64 (through fractions)."""
    a, b, c = np.broadcast_arrays(a, b, c)
    out = np.empty(c.shape, np.float64)
    for i in np.ndindex(*c.shape):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        out[i] = float(exact)
    return out


def combine(
    y: np.ndarray, weights: np.ndarray | None, plan: Plan, out_dtype: np.dtype | None = None
) -> np.ndarray:
    """`out[t] = sum_j w[t, j] * y@owner[slot]`, an ordered fma from +0, rounded once."""
    wide, fma = (np.float64, fma64) if y.dtype == np.float64 else (np.float32, fma32)
    num_ranks, tokens, k = plan.slot.shape
    out = np.zeros((num_ranks, tokens, *y.shape[2:]), wide)
    for rank, t, j in np.ndindex(num_ranks, tokens, k):
        if plan.slot[rank, t, j] >= 0:
            row = y[plan.owner[rank, t, j], plan.slot[rank, t, j]].astype(wide)
            w = wide(1) if weights is None else weights[rank, t, j].astype(wide)
            out[rank, t] = fma(w, row, out[rank, t])
    return round_to(out, out_dtype or y.dtype)


def combine_two_level(
    y: np.ndarray,
    weights: np.ndarray | None,
    plan: Plan,
    ranks_per_node: int,
    wire: np.dtype,
    out_dtype: np.dtype | None = None,
) -> np.ndarray:
    """`combine` over nodes: a token's own node, plus the sum over the other nodes, ascending.

    Each node's part is the ordered fma from +0; those that cross are rounded to `wire`.
    """
    wide, fma = (np.float64, fma64) if y.dtype == np.float64 else (np.float32, fma32)
    num_ranks, tokens, k = plan.slot.shape
    nodes = num_ranks // ranks_per_node
    parts = np.zeros((num_ranks, tokens, nodes, *y.shape[2:]), wide)
    for rank, t, j in np.ndindex(num_ranks, tokens, k):
        if plan.slot[rank, t, j] >= 0:
            node = plan.owner[rank, t, j] // ranks_per_node
            row = y[plan.owner[rank, t, j], plan.slot[rank, t, j]].astype(wide)
            w = wide(1) if weights is None else weights[rank, t, j].astype(wide)
            parts[rank, t, node] = fma(w, row, parts[rank, t, node])
    out = np.zeros((num_ranks, tokens, *y.shape[2:]), wide)
    with np.errstate(all="ignore"):
        for rank, t in np.ndindex(num_ranks, tokens):
            own = rank // ranks_per_node
            for node in range(nodes):
                if node != own:
                    crossed = round_to(parts[rank, t, node], wire).astype(wide)
                    out[rank, t] = out[rank, t] + crossed
            out[rank, t] = parts[rank, t, own] + out[rank, t]
    return round_to(out, out_dtype or y.dtype)


def crossings(plan: Plan, ranks_per_node: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(rank, token) of the rows that cross, by source and destination node, in that order."""
    num_ranks, tokens, k = plan.slot.shape
    nodes = num_ranks // ranks_per_node
    found: dict[tuple[int, int], list[tuple[int, int]]] = {
        (source, target): [] for source in range(nodes) for target in range(nodes)
    }
    for rank, t in np.ndindex(num_ranks, tokens):
        own = rank // ranks_per_node
        visited = {
            int(plan.owner[rank, t, j]) // ranks_per_node
            for j in range(k)
            if plan.slot[rank, t, j] >= 0
        }
        for node in visited - {own}:
            found[own, node].append((rank, t))
    return found


def combine_magnitude(y: np.ndarray, weights: np.ndarray, plan: Plan) -> np.ndarray:
    """`sum_j |w * y|` in float64: what rounding errors of a sum are measured against."""
    num_ranks, tokens, k = plan.slot.shape
    out = np.zeros((num_ranks, tokens, *y.shape[2:]))
    for rank, t, j in np.ndindex(num_ranks, tokens, k):
        if plan.slot[rank, t, j] >= 0:
            row = y[plan.owner[rank, t, j], plan.slot[rank, t, j]].astype(np.float64)
            out[rank, t] += np.abs(float(weights[rank, t, j]) * row)
    return out


def round_to(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounds once, to nearest even; ml_dtypes does it for the types NumPy lacks."""
    with np.errstate(all="ignore"):
        return value.astype(dtype)


def dispatch_gradient(g: np.ndarray, plan: Plan, dtype: np.dtype) -> np.ndarray:
    """d/dx of dispatch for a cotangent `g` `[R, C, ...]`: the unweighted combine."""
    return combine(g, None, plan, dtype)


def combine_gradient(
    g: np.ndarray, y: np.ndarray, weights: np.ndarray | None, plan: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """(d/dy, d/dweights) of combine for a cotangent `g` `[R, T, ...]`.

    d/dy is rounded once to y's dtype; d/dweights is in float64, to be compared with a tolerance.
    """
    wide = np.float64 if y.dtype == np.float64 else np.float32
    dy = np.zeros(y.shape, y.dtype)
    dweights = np.zeros(plan.slot.shape, np.float64)
    for rank, t, j in np.ndindex(*plan.slot.shape):
        if plan.slot[rank, t, j] >= 0:
            where = plan.owner[rank, t, j], plan.slot[rank, t, j]
            w = wide(1) if weights is None else weights[rank, t, j].astype(wide)
            dy[where] = round_to(w * g[rank, t].astype(wide), y.dtype)
            with np.errstate(all="ignore"):
                dweights[rank, t, j] = (g[rank, t].astype(np.float64) * y[where]).sum()
    return dy, dweights


def ragged_all_to_all(
    operand: np.ndarray,
    output: np.ndarray,
    input_offsets: np.ndarray,
    send_sizes: np.ndarray,
    output_offsets: np.ndarray,
    recv_sizes: np.ndarray,
    groups: list[list[int]] | None = None,
) -> np.ndarray:
    """`jax.lax.ragged_all_to_all`: operand `[R, N, ...]`, output `[R, M, ...]`, tables `[R, S]`.

    S is a multiple of the group's size; slice s goes to the group's member `s // (S // size)`.
    """
    result = output.copy()
    num_ranks, slices = send_sizes.shape
    for group in groups or [list(range(num_ranks))]:
        each = slices // len(group)
        for position, source in enumerate(group):
            for s in range(slices):
                target = group[s // each]
                size = send_sizes[source, s]
                arrival = position * each + s % each
                assert recv_sizes[target, arrival] == size
                for i in range(size):
                    row = operand[source, input_offsets[source, s] + i]
                    result[target, output_offsets[source, s] + i] = row
    return result


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
