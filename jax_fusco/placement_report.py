"""Around placements: statistics from files, the command's table, its picture, its JSON."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
from rich.table import Table

from jax_fusco.files import read_npz
from jax_fusco.ledger import LINKS
from jax_fusco.ledger_report import byte_text, experts_of, read_routing
from jax_fusco.placement import Placement
from jax_fusco.placement_optimize import METHODS, optimize_placement
from jax_fusco.placement_predict import Prediction, Traffic
from jax_fusco.pruning import limit_ranks, router_similarity
from jax_fusco.routing_stats import RoutingStats

TODAY = "today"


@dataclasses.dataclass(frozen=True)
class Study:
    """What every method makes of one routing.

    Attributes:
      stats: what was counted.
      placements: by method.
      predictions: by method, and after pruning by name.
      no_expert: how many ids of the routing name no expert.
    """

    stats: RoutingStats
    placements: dict[str, Placement]
    predictions: dict[str, Prediction]
    no_expert: int = 0

    @property
    def today(self) -> Traffic:
        return next(iter(self.predictions.values())).today

    @property
    def rows(self) -> dict[str, Traffic]:
        after = {name: found.after for name, found in self.predictions.items()}
        return {TODAY: self.today, **after}


def read(
    path: pathlib.Path, num_experts: int | None
) -> tuple[RoutingStats, int | None, np.ndarray | None, np.ndarray | None]:
    """(statistics, ranks if the file says, expert_ids [T, k], logits [T, E]) of an npz file.

    The file is what `RoutingStats.save` wrote, or a routing as `jax-fusco ledger` reads it, perhaps
    with `logits` [R, T, E]: pruning needs these.

    Raises:
      ValueError: the file is missing, corrupt, or holds something else, in one sentence.
    """
    need = "need an npz file with expert_ids, or one that RoutingStats.save wrote"
    arrays = read_npz(path, ("token_limbs", "logits"), "routing", need)
    if "token_limbs" in arrays:
        return RoutingStats.from_file(path), None, None, None
    ids, in_file = read_routing(path)
    experts = experts_of(path, in_file, num_experts)
    logits = arrays.get("logits")
    if logits is not None:
        want = (*ids.shape[:2], experts)
        if logits.shape != want or not np.issubdtype(logits.dtype, np.floating):
            raise ValueError(
                f"{path}: got logits of {logits.dtype} {logits.shape}, need a floating dtype and "
                f"{want}"
            )
        logits = logits.reshape(-1, experts)
    flat = ids.reshape(-1, ids.shape[-1])
    # A sample as large as the routing: the file's own tokens, not a choice of them.
    zeros = RoutingStats.zeros(experts, num_samples=min(len(flat), 2**15))
    return zeros.update(flat), len(ids), flat, logits


def study(
    stats: RoutingStats,
    ids: np.ndarray | None,
    logits: np.ndarray | None,
    *,
    method: str,
    num_ranks: int,
    row_bytes: int,
    **options: Any,
) -> Study:
    """Every method's placement, and pruning after that of `method`.

    Raises:
      TypeError, ValueError: an option that does not fit, as `optimize_placement` says it.
    """
    slots = options.get("num_slots")
    replicated = slots is not None and slots * num_ranks > stats.num_experts
    only = replicated or options.get("num_groups", 1) > 1
    methods = [name for name in METHODS if name == method or not only]
    placements = {
        name: optimize_placement(stats, num_ranks, method=name, **options) for name in methods
    }
    predictions = {
        name: placement.predict(stats, row_bytes=row_bytes)
        for name, placement in placements.items()
    }
    if ids is not None and logits is not None and not replicated:
        predictions |= _pruned(stats, ids, logits, placements[method], method, row_bytes)
    no_expert = 0 if ids is None else int(((ids < 0) | (ids >= stats.num_experts)).sum())
    return Study(stats, placements, predictions, no_expert)


def _pruned(
    stats: RoutingStats,
    ids: np.ndarray,
    logits: np.ndarray,
    placement: Placement,
    method: str,
    row_bytes: int,
) -> dict[str, Prediction]:
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    scores = (scores / scores.sum(-1, keepdims=True)).astype(np.float32)
    weights = np.where(ids >= 0, np.take_along_axis(scores, np.maximum(ids, 0), 1), 0)
    today = placement.predict(stats, row_bytes=row_bytes).today
    zeros = RoutingStats.zeros(stats.num_experts, num_samples=stats.sample_weight.shape[-1])
    found = {}
    for most in range(min(ids.shape[-1], placement.num_ranks) - 1, 0, -1):
        for way in ("router", "similarity"):
            similarity = router_similarity(logits) if way == "similarity" else None
            new, _ = limit_ranks(
                ids, weights, scores, placement, most, method=way, similarity=similarity
            )
            after = placement.predict(zeros.update(new), row_bytes=row_bytes).after
            gain = 1 - after.ranks_per_token / max(today.ranks_per_token, 1e-30)
            name = f"{method}, at most {most} {'rank' if most == 1 else 'ranks'}, by {way}"
            found[name] = Prediction(today, after, gain, 0, row_bytes)
    return found


def describe(found: Study) -> str:
    """What was read, in words."""
    stats = found.stats
    placement = next(iter(found.placements.values()))
    layers = "" if stats.num_layers is None else f" in {stats.num_layers} layers"
    tokens = int(stats.tokens.sum())
    each = int(stats.load.sum()) / max(tokens, 1)
    nodes = placement.num_ranks // placement.ranks_per_node
    lost = f" ({found.no_expert} ids name none)" if found.no_expert else ""
    return (
        f"{tokens} tokens to {each:.3g} of {stats.num_experts} experts each{lost}{layers}; nodes: "
        f"{nodes} of {placement.ranks_per_node} ranks; ranks and nodes per token are counted on "
        "tokens that no search has seen"
    )


def table(found: Study) -> Table:
    """A line for each method."""
    rows = all(prediction.row_bytes == 1 for prediction in found.predictions.values())
    title = "One dispatch, rows per token" if rows else "One dispatch, per token"
    made = Table(title=title, title_justify="left", header_style="bold")
    made.add_column("", no_wrap=True)
    for head in ("ranks", "", "nodes", *LINKS.values()):
        made.add_column(head, justify="right")
    for head in ("load, max/mean", "experts that move"):
        made.add_column(head, justify="right")
    today = found.today.ranks_per_token
    for name, traffic in found.rows.items():
        change = 100 * (traffic.ranks_per_token / max(today, 1e-30) - 1)
        moved = found.predictions[name].moves if name in found.placements else None
        made.add_row(
            name,
            f"{traffic.ranks_per_token:.3f}",
            "" if name == TODAY else f"{change:+.1f} %",
            f"{traffic.nodes_per_token:.3f}",
            *(f"{n:.3f}" if rows else byte_text(n) for n in traffic.bytes_per_token.values()),
            f"{traffic.load_max_over_mean:.3f}",
            "" if moved is None else str(moved),
        )
    return made


def verdict(found: Study, method: str) -> str:
    """Whether to move, in words."""
    prediction = found.predictions[method]
    if not prediction.moves:
        return "Nothing to gain: leave the experts where they are"
    loads = [each.load_max_over_mean for each in (prediction.today, prediction.after)]
    less = "more" if prediction.gain < 0 else "fewer"
    return (
        f"{method}: {100 * abs(prediction.gain):.1f} % {less} ranks per token, load max/mean "
        f"{loads[0]:.3f} -> {loads[1]:.3f}, {prediction.moves} experts change their rank"
    )


def document(found: Study) -> dict[str, Any]:
    """Everything as JSON; lists have one entry a layer."""

    def lists(traffic: Traffic) -> dict[str, Any]:
        return {
            "ranks_per_token": np.atleast_1d(traffic.ranks).tolist(),
            "nodes_per_token": np.atleast_1d(traffic.nodes).tolist(),
            "load_max_over_mean": np.atleast_1d(traffic.load).tolist(),
            "bytes_per_token": {
                link: np.atleast_1d(number).tolist() for link, number in traffic.links.items()
            },
        }

    placement = next(iter(found.placements.values()))
    return {
        "tokens": np.atleast_1d(found.stats.tokens).tolist(),
        "num_experts": placement.num_experts,
        "num_ranks": placement.num_ranks,
        "ranks_per_node": placement.ranks_per_node,
        "traffic": {name: lists(traffic) for name, traffic in found.rows.items()},
        "expert_of_slot": {
            name: np.asarray(placement.expert_of_slot).tolist()
            for name, placement in found.placements.items()
        },
    }


def draw(found: Study, method: str, path: pathlib.Path) -> bool:
    """Writes bars of ranks per token, and co-activation today and after. False without matplotlib.

    The co-activation is that of the layer that gains most.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    rows = found.rows
    colours = ["#b0b0b0" if name == TODAY else "#5e9fd1" for name in rows]
    colours = ["#d6604d" if ", at most" in n else c for n, c in zip(rows, colours, strict=True)]
    axes[0].barh(list(rows), [t.ranks_per_token for t in rows.values()], color=colours)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("distinct ranks per token")
    axes[0].spines[["top", "right"]].set_visible(False)
    stats, placement = found.stats, found.placements[method]
    title = "co-activation"
    if stats.num_layers is not None:
        prediction = found.predictions[method]
        layer = int((prediction.today.ranks - prediction.after.ranks).argmax())
        stats, placement, title = (
            stats.layer(layer),
            placement.layer(layer),
            f"{title}, layer {layer}",
        )
    together = stats.coactivation.astype(float)
    np.fill_diagonal(together, 0)
    order = np.asarray(placement.expert_of_slot)
    for axis, slots, name in ((axes[1], np.arange(len(together)), TODAY), (axes[2], order, method)):
        axis.imshow(together[np.ix_(slots, slots)], cmap="Greys")
        per_rank = len(slots) // placement.num_ranks
        for edge in np.arange(1, placement.num_ranks) * per_rank - 0.5:
            axis.axhline(edge, color="#d6604d", linewidth=0.5)
            axis.axvline(edge, color="#d6604d", linewidth=0.5)
        axis.set_title(f"{title}: {name}", fontsize=10)
        axis.set_xlabel("slots, by rank")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
