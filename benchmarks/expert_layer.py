"""A layer of experts on CPU devices: placed, limited, compared and timed, for expert_traffic.py.

Where results must be equal they are compared first; times are taken in turn.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

KINDS = ("assignment", "token")  # what makes a row, as in make_plan(rows=)
CASES = ("today", "placed", "placed for ranks alone", "at most 2 ranks", "at most 1 rank")
TIMES = {"milliseconds": time.perf_counter, "processor_milliseconds": time.process_time}


def count_rows(ids: np.ndarray, experts: int) -> dict[str, dict[str, float]]:
    """Rows a token, those a rank sends to others and to itself, of plans for `ids` [R, T, k]."""
    import jax

    import jax_fusco as jf

    ranks, tokens, _ = ids.shape
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:ranks]), ("expert",))

    def plans(ids: Any) -> list[Any]:
        made = [
            jf.make_plan(ids[0], axis_name="expert", num_experts=experts, rows=kind)
            for kind in KINDS
        ]
        return [getattr(plan, "rows", plan).slot_rank[None] for plan in made]

    spec = jax.P("expert")
    found = jax.jit(jax.shard_map(plans, mesh=mesh, in_specs=spec, out_specs=spec))(ids)
    own = np.arange(ranks)[:, None, None]
    return {
        kind: {
            "sent": int(((owner >= 0) & (owner != own)).sum()) / (ranks * tokens),
            "self": int((owner == own).sum()) / (ranks * tokens),
        }
        for kind, owner in zip(KINDS, map(np.asarray, found), strict=True)
    }


@dataclasses.dataclass(frozen=True)
class Routed:
    """Scores of all experts for the tokens of R ranks, `[R, T, E]`, and some more to learn from.

    `best` is the expert of each slot of the placement that was planted, if one was.
    """

    name: str
    scores: np.ndarray
    calibration: np.ndarray
    k: int
    best: np.ndarray | None = None


def softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.exp(logits - logits.max(-1, keepdims=True))
    return (logits / logits.sum(-1, keepdims=True)).astype(np.float32)


def drawn(name: str, ranks: int, tokens: int, experts: int = 32, k: int = 4) -> Routed:
    """A routing whose experts go together in sets of one rank's size, or do not at all."""
    rng = np.random.default_rng(0)
    names = rng.permutation(experts)
    logits = rng.gumbel(size=(4 * ranks * tokens, experts))
    if name == "planted":
        home = rng.integers(0, ranks, (len(logits), 1))
        logits[:, names] += np.where(np.arange(experts) * ranks // experts == home, 5.0, 0.0)
    scores = softmax(logits)
    here = scores[: ranks * tokens].reshape(ranks, tokens, experts)
    return Routed(name, here, scores[ranks * tokens :], k, names if name == "planted" else None)


def recorded(path: Path, tokens: int, ranks: int) -> Routed:
    """The routing that place_moe_lm.py saved: the first tokens of each rank, the rest to learn."""
    from jax_fusco.files import read_npz

    need = "need what examples/place_moe_lm.py writes"
    try:
        arrays = read_npz(path, ("expert_ids", "logits"), "routing", need)
    except ValueError as error:
        raise click.ClickException(f"--routing: {error}") from None
    if arrays.keys() != {"expert_ids", "logits"}:
        raise click.ClickException(f"--routing: {path} holds no expert_ids and logits, {need}")
    k, scores = arrays["expert_ids"].shape[-1], softmax(arrays["logits"])
    if scores.ndim != 3 or scores.shape[0] != ranks or scores.shape[1] < 2 * tokens:
        raise click.ClickException(
            f"--routing: got logits {scores.shape}, need [{ranks}, {2 * tokens} or more, experts]"
        )
    rest = scores[:, tokens:].reshape(-1, scores.shape[-1])
    return Routed("trained example", scores[:, :tokens], rest, k)


def chosen(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, weights) [..., k] of the k best."""
    ids = np.argsort(-scores, axis=-1, kind="stable")[..., :k].astype(np.int32)
    weights = np.take_along_axis(scores, ids, -1)
    return ids, weights / weights.sum(-1, keepdims=True)


class Layer:
    """One layer of experts over R CPU devices: value and gradients, by the kind of rows."""

    def __init__(self, routed: Routed, capacity: int, features: int, hidden: int):
        import jax

        rng = np.random.default_rng(1)
        ranks, tokens, experts = routed.scores.shape
        self.experts, self.capacity = experts, capacity
        self.mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:ranks]), ("expert",))
        shapes = {"wi": (experts, features, 2, hidden), "wo": (experts, hidden, features)}
        self.kernels = {
            name: rng.normal(size=shape).astype(np.float32) * shape[1] ** -0.5
            for name, shape in shapes.items()
        }
        self.x = rng.normal(size=(ranks * tokens, features)).astype(np.float32)
        self.programs = {kind: self._program(kind) for kind in KINDS}

    def _program(self, kind: Any) -> Callable[..., Any]:
        import jax
        import jax.numpy as jnp

        import jax_fusco as jf
        from jax_fusco.flax.experts import ACTIVATIONS, expert_ffn

        def local(kernels: Any, x: Any, ids: Any, weights: Any) -> Any:
            plan: Any = jf.make_plan(
                ids,
                axis_name="expert",
                num_experts=self.experts,
                capacity=self.capacity,
                rows=kind,
            )
            rows = jf.dispatch(x, plan, padding="undefined")
            index, outside = {}, weights
            if kind == "token":
                index = {"source": plan.source, "weights": plan.local_weights(weights)}
                outside = None
            swiglu = ACTIVATIONS["swiglu"][1]
            y = expert_ffn(rows, plan.group_sizes, *kernels.values(), activation=swiglu, **index)
            return jf.combine(y, outside, plan)

        each = jax.P("expert")
        mapped = jax.shard_map(local, mesh=self.mesh, in_specs=each, out_specs=each)

        def loss(kernels: Any, x: Any, ids: Any, weights: Any) -> Any:
            y = mapped(kernels, x, ids, weights)
            return jnp.square(y - x).mean(), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def arguments(self, ids: np.ndarray, weights: np.ndarray, slots: np.ndarray) -> tuple:
        """Operands on the mesh: kernels in the order of `slots`."""
        import jax

        sharding = jax.NamedSharding(self.mesh, jax.P("expert"))
        flat = (each.reshape(-1, each.shape[-1]) for each in (ids, weights))
        moved = {name: kernel[slots] for name, kernel in self.kernels.items()}
        return tuple(jax.device_put((moved, self.x, *flat), sharding))


def cases_of(routed: Routed) -> dict[str, dict[str, Any]]:
    """Ids and weights [R, T, k] of every case, in slots, and which expert is in each slot."""
    import jax_fusco as jf

    ranks, _, experts = routed.scores.shape
    stats = jf.RoutingStats.zeros(experts, num_samples=8192)
    stats = stats.update(chosen(routed.calibration, routed.k)[0])
    placed = jf.optimize_placement(stats, ranks)
    together = jf.optimize_placement(stats, ranks, load_weight=0.0)
    identity = jf.Placement.identity(experts, ranks)
    found = {}
    for name, placement in zip(CASES, (identity, placed, together, placed, placed), strict=True):
        slots = np.asarray(placement.expert_of_slot)
        scores = routed.scores[..., slots]
        # The router's choice, renamed: equal scores would otherwise be chosen by the new ids.
        ids, weights = chosen(routed.scores, routed.k)
        ids = np.asarray(placement.slot_of_expert)[ids]
        if name.startswith("at most"):
            most = int(name.split()[2])
            ids, weights = map(np.asarray, jf.limit_ranks(ids, weights, scores, identity, most))
        found[name] = {"ids": ids, "weights": weights, "slots": slots}
    return found


def describe(ids: np.ndarray, experts: int) -> dict[str, Any]:
    """Distinct ranks per token, the fullest rank's load over the mean, and the rows of plans."""
    ranks = ids.shape[0]
    owner = np.where(ids >= 0, ids // (experts // ranks), -1)
    touched = (owner[..., None] == np.arange(ranks)).any(-2).sum(-1)
    load = np.bincount(owner[owner >= 0].reshape(-1), minlength=ranks)
    return {
        "ranks_per_token": float(touched.mean()),
        "load_max_over_mean": float(load.max() / load.mean()),
        "rows": count_rows(ids, experts),
    }


def fullest(cases: dict[str, dict[str, Any]]) -> int:
    """The most assignments that any rank gets in any case: the room that one program needs."""

    def most(ids: np.ndarray, slots: np.ndarray) -> int:
        local = len(slots) // ids.shape[0]
        return int(np.bincount(ids[ids >= 0] // local).max())

    return max(most(case["ids"], case["slots"]) for case in cases.values())


def compare(layer: Layer, cases: dict[str, dict[str, Any]]) -> None:
    """Both kinds of rows give the same, and so does what was only moved, but for rounding."""
    import jax

    def close(what: str, one: Any, other: Any) -> None:
        bound = 1e-4 * max(float(np.abs(one).max()), 1e-30)
        error = float(np.abs(np.asarray(one) - np.asarray(other)).max())
        assert error <= bound, f"{what}: differs by {error}, may by {bound}"

    def results(case: dict[str, Any], kind: str) -> list[np.ndarray]:
        (_, y), (kernels, dx) = jax.device_get(layer.programs[kind](*case["arguments"]))
        back = np.argsort(case["slots"])
        return [y, dx, *(kernels[name][back] for name in ("wi", "wo"))]

    want = results(cases["today"], "token")
    for name, case in cases.items():
        each = [results(case, kind) for kind in KINDS]
        for one, other in zip(*each, strict=True):
            close(f"{name}: rows", one, other)
        if not name.startswith("at most"):
            for one, other in zip(want, each[1], strict=True):
                close(f"{name}: moved", one, other)


def times(layer: Layer, cases: dict[str, dict[str, Any]], repeats: int) -> None:
    """Adds the milliseconds of every case and kind of rows, taken in turn: by the clock, and of the
    processors, which other programs of the machine disturb less.
    """
    import jax
    from tqdm import tqdm

    for case in cases.values():
        for name in TIMES:
            case[name] = {kind: [] for kind in KINDS}
    turns = [(case, kind) for case in cases.values() for kind in KINDS]
    for n in tqdm(range(-1, repeats), desc="layer"):
        for case, kind in turns[:: 1 if n % 2 else -1]:  # nobody always follows the same one
            start = [clock() for clock in TIMES.values()]
            jax.block_until_ready(layer.programs[kind](*case["arguments"]))
            for (name, clock), before in zip(TIMES.items(), start, strict=True):
                if n >= 0:
                    case[name][kind].append((clock() - before) * 1e3)


def study(
    routed: Routed, features: int, hidden: int, repeats: int
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(facts, cases): what each case sends, how long it takes, and what was planted."""
    ranks, tokens, experts = routed.scores.shape
    cases = cases_of(routed)
    layer = Layer(routed, fullest(cases), features, hidden)
    for case in cases.values():
        case["arguments"] = layer.arguments(case["ids"], case["weights"], case["slots"])
    compare(layer, cases)
    times(layer, cases, repeats)
    facts: dict[str, Any] = {"ranks": ranks, "tokens": tokens, "experts": experts, "k": routed.k}
    if routed.best is not None:
        planted = np.argsort(routed.best)[chosen(routed.scores, routed.k)[0]]
        facts["planted_ranks_per_token"] = describe(planted, experts)["ranks_per_token"]
    moved = {name: not (case["slots"] == np.arange(experts)).all() for name, case in cases.items()}
    return facts, {
        name: {
            "moved": bool(moved[name]),
            **describe(case["ids"], experts),
            **{kept: case[kept] for kept in TIMES},
        }
        for name, case in cases.items()
    }
