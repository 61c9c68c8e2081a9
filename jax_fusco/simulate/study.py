"""What the fitted model says: about growing clusters, its own constants, and rails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_fusco import rails
from jax_fusco.simulate import published
from jax_fusco.simulate.cluster import CONSTANTS, Cluster
from jax_fusco.simulate.traffic import Traffic, expected
from jax_fusco.simulate.ways import Links, best_slices, seconds, table

Array = np.ndarray
OURS = ("ours", "ours, float32 back")
COMPARED = ("NCCL", "DeepEP", "FUSCO", *OURS)
GPUS = tuple(2**power for power in range(3, 15))
STEP = 1.2
TOKENS = 4096


def same_workload(cluster: Cluster) -> list[dict[str, Any]]:
    """This design on the published workloads: ms by way, and the number of slices."""
    found = []
    for routing in published.ROUTINGS:
        for tokens in published.LENGTHS:
            traffic = published.workload(routing, tokens)
            times = table(("FUSCO", *OURS), traffic, cluster, published.ROW_BYTES)
            slices, _ = best_slices(Links(traffic, cluster, published.ROW_BYTES))
            found.append({"routing": routing, "tokens": tokens, "slices": slices, "ms": times})
    return found


def sensitivity(cluster: Cluster, tokens: int = 16384) -> list[dict[str, Any]]:
    """How times follow each constant: percent of time for one percent of the constant."""
    found = []
    for routing in published.ROUTINGS:
        traffic = published.workload(routing, tokens)
        for way in ("NCCL", "DeepEP", "FUSCO", "ours"):
            entry: dict[str, Any] = {"routing": routing, "way": way}
            for name in CONSTANTS:
                ends = []
                for factor in (1 / STEP, STEP):
                    changed = {name: getattr(cluster, name) * factor}
                    moved = dataclasses.replace(cluster, **changed)
                    ends.append(seconds(way, traffic, moved, published.ROW_BYTES))
                slope = np.log(ends[1] / ends[0]) / (2 * np.log(STEP))
                entry[name] = round(float(slope), 3)
            found.append(entry)
    return found


def scale(
    cluster: Cluster,
    routings: dict[str, int | None],
    tokens: int,
    gpus: tuple[int, ...] = GPUS,
    said: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
    """Times for growing clusters with four experts a GPU (256 at least) and T tokens a GPU.

    Args:
      cluster: constants, GPUs and NICs of a node, oversubscription.
      routings: by name, the nodes that a token's experts are drawn from; None: all.
      tokens: T.
      gpus: sizes; those that are no whole number of nodes are left out.
      said: called after each point.
    """
    found = []
    for routing, groups in routings.items():
        for number in gpus:
            nodes, rest = divmod(number, cluster.gpus_per_node)
            if nodes and not rest:
                larger = dataclasses.replace(cluster, nodes=nodes)
                experts = max(256 // number, 4) * number
                traffic = expected(
                    nodes, cluster.gpus_per_node, tokens, experts, published.K, groups
                )
                times = table(COMPARED, traffic, larger, published.ROW_BYTES)
                found.append({"routing": routing, "gpus": number, "experts": experts, "ms": times})
            said()
    return found


def oversubscribed(cluster: Cluster, gpus: int = 1024) -> list[dict[str, Any]]:
    """The same on 1024 GPUs where the network's core is narrower than its NICs."""
    found = []
    for factor in (1.0, 2.0, 4.0):
        thin = dataclasses.replace(cluster, oversubscription=factor)
        points = scale(thin, {"4 nodes": 4}, TOKENS, (gpus,))
        found += [{"oversubscription": factor, "ms": point["ms"]} for point in points]
    return found


def replay(traffic: Traffic, cluster: Cluster, row_bytes: int) -> dict[str, float]:
    """Milliseconds of each way for a routing's traffic."""
    return table(COMPARED, traffic, cluster, row_bytes)


def _visits(rng: np.random.Generator, probability: Array, tokens: int) -> Array:
    """Rows [N, L, N] where a token of rank l of node s goes to node n with a probability."""
    counts = rng.binomial(tokens, np.clip(probability, 0, 1))
    nodes = counts.shape[0]
    counts[np.arange(nodes), :, np.arange(nodes)] = 0
    return counts


def families(nodes: int, ranks: int, tokens: int, seed: int = 0) -> dict[str, Array]:
    """Rows `[N, L, N]` that cross, by family of routings."""
    rng = np.random.default_rng(seed)
    whole = (nodes, ranks, nodes)
    popular = 1.5 / (1 + np.arange(nodes))
    hot = np.where(np.arange(nodes) == 0, 0.95, 0.2)
    busy = np.where(
        rng.permuted(np.tile(np.arange(ranks), (nodes, 1)), axis=1) < ranks // 2, 0.8, 0.1
    )
    one = np.where(np.arange(ranks) == 0, 0.9, 0.1)
    return {
        "uniform": _visits(rng, np.full(whole, 0.6), tokens),
        "Zipf": _visits(rng, np.broadcast_to(rng.permutation(popular), whole), tokens),
        "single node": _visits(rng, np.full(whole, 1 / nodes), tokens),
        "one hot node": _visits(rng, np.broadcast_to(hot, whole), tokens),
        "bimodal owners": _visits(rng, np.broadcast_to(busy[:, :, None], whole), tokens),
        "one busy owner": _visits(rng, np.broadcast_to(one[None, :, None], whole), tokens),
        "random owners": _visits(
            rng, np.broadcast_to(rng.random((nodes, ranks, 1)), whole), tokens
        ),
        "few tokens": _visits(rng, np.full(whole, 0.6), 16),
    }


NODES, RANKS = (2, 4, 8, 16, 32, 64), (4, 8)


def rails_table(
    nodes: tuple[int, ...] = NODES,
    ranks: tuple[int, ...] = RANKS,
    tokens: int = TOKENS,
    said: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
    """Max/mean egress and ingress of the worst node, by family, size and strategy.

    "least" is the least that a rail sends to a destination on average, in rows.
    """
    found = []
    for number in nodes:
        for local in ranks:
            for family, counts in families(number, local, tokens).items():
                off = ~np.eye(number, dtype=bool)
                entry: dict[str, Any] = {
                    "family": family,
                    "nodes": number,
                    "ranks": local,
                    "least": round(float(counts.mean(1)[off].min()), 1),
                }
                for name in rails.STRATEGIES:
                    plan = rails.assign(counts, name)
                    loads = (rails.spread(plan.egress), rails.spread(plan.ingress))
                    entry[name] = [round(load, 4) for load in loads]
                found.append(entry)
            said()
    return found
