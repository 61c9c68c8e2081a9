"""FUSCO's published times (arXiv 2512.22036): 64 H100s, hidden 7168, top 8 of 256, bfloat16.

Milliseconds of permutations, dispatch and combine.
"""

from __future__ import annotations

import dataclasses

from jax_fusco.simulate.cluster import FUSCO_CLUSTER
from jax_fusco.simulate.traffic import Traffic, expected

ROW_BYTES = 2 * 7168
EXPERTS, K = 256, 8
LENGTHS = (4096, 8192, 16384, 32768)
ROUTINGS = ("real", "single node", "imbalanced")

TIMES = {
    "real": {
        "NCCL": (44.4, 80.2, 143.6, 266.4),
        "DeepEP": (30.7, 58.4, 116.1, 219.6),
        "FUSCO": (27.2, 50.1, 86.8, 164.4),
    },
    "single node": {
        "NCCL": (44.0, 81.4, 150.1, 274.8),
        "DeepEP": (24.7, 43.8, 81.8, 144.2),
        "FUSCO": (12.6, 22.3, 41.0, 71.5),
    },
    "imbalanced": {
        "NCCL": (86.2, 167.5, 339.3, 656.2),
        "DeepEP": (56.0, 108.5, 216.2, 420.9),
        "FUSCO": (43.3, 78.9, 151.3, 305.0),
    },
}
ABLATION_LENGTH = 16384
ABLATION = {
    "real": {"no engine": 119.5, "no planner": 124.4, "no balancer": 95.1},
    "single node": {"no engine": 61.5, "no planner": 125.4, "no balancer": 42.4},
    "imbalanced": {"no engine": 219.8, "no planner": 207.5, "no balancer": 181.5},
}

SKEW = ABLATION["imbalanced"]["no planner"] / ABLATION["real"]["no planner"]
"""Load of the busiest node over the mean, where routing is imbalanced. It is not published; without
the planner time follows the busiest NIC, and grew by this much."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One published number."""

    routing: str
    tokens: int
    way: str
    milliseconds: float


CELLS: tuple[Cell, ...] = tuple(
    Cell(routing, length, way, time)
    for routing, ways in TIMES.items()
    for way, times in ways.items()
    for length, time in zip(LENGTHS, times, strict=True)
) + tuple(
    Cell(routing, ABLATION_LENGTH, way, time)
    for routing, ways in ABLATION.items()
    for way, time in ways.items()
)


def workload(routing: str, tokens: int) -> Traffic:
    """The traffic that stands for a published routing.

    "real": DeepSeek-V3 limits a token to 4 of 8 groups of experts, here the nodes; the experts are
    drawn uniformly from them. "single node": all of a token's experts on one node, any.
    "imbalanced": as real, and one node receives SKEW times the mean.
    """
    return expected(
        FUSCO_CLUSTER.nodes,
        FUSCO_CLUSTER.gpus_per_node,
        tokens,
        EXPERTS,
        K,
        groups=1 if routing == "single node" else 4,
        skew=SKEW if routing == "imbalanced" else 1.0,
    )
