"""Levanter's own MoE over jax_fusco, compared with Levanter's local path.

Levanter is taken from its packages, unchanged, and run on four CPU devices in two ways:

  seam  its function for ragged expert parallelism, `_moe_mlp_ep_ragged_a2a_local`, is replaced by
        `fusco_moe_local` below: make_plan, dispatch, combine.
  swap  nothing is replaced but `jax.lax.ragged_all_to_all`, by `jax_fusco.ragged_all_to_all`.
        Without that, Levanter's ragged path does not compile for CPU.

Values and gradients of every input and parameter must equal, to 1e-5 in float32, those of
Levanter's local path on one device. Levanter's own ring is in the table for scale. In a second part
receive buffers overflow, and the drops that are reported must be those that the routing forces.

Needs Python 3.12, two installs on top of jax_fusco, and then runs in a minute:

    pip install . -r examples/levanter_requirements.txt
    pip install --no-deps -r examples/levanter_packages.txt
    python examples/levanter_moe.py
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import click
import jax
import jax.numpy as jnp
import numpy as np
from haliax.nn.ragged_dot import ragged_dot
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from levanter.grug import grug_moe
from rich.console import Console
from rich.table import Table

import jax_fusco as jf

TOLERANCE = 1e-5
AXES = ("data", "expert", "model")
TOKEN_AXES = ("data", "expert")
MESHES = ((2, 2, 1), (1, 4, 1), (1, 2, 2))
TOKENS, HIDDEN, INNER, TOP_K = 256, 48, 32, 3
PATHS = ("seam", "swap", "ring")

Tensors = dict[str, Any]


def fusco_moe_local(
    x: jax.Array,
    selected_experts: jax.Array,
    combine_weights: jax.Array,
    token_valid: jax.Array,
    w13: jax.Array,
    w2: jax.Array,
    *,
    activation_fn: Callable[[jax.Array], jax.Array],
    num_experts: int,
    capacity_factor: float,
    token_sharding_axes: tuple[str, ...],
    implementation: str | None = None,
) -> tuple[jax.Array, grug_moe.CapacityDrops]:
    """What Levanter calls inside its shard_map, with jax_fusco's plan, dispatch and combine.

    Args:
      x: tokens `[T, D]` of this device; `selected_experts`, `combine_weights` `[T, K]` and
        `token_valid` `[T]` belong to them.
      w13: gate and up projections of the local experts, side by side `[E_local, D, 2 I]`.
      w2: their down projections `[E_local, I, D]`.

    Returns:
      `[T, D]`, and the assignments dropped, summed over `token_sharding_axes`.
    """
    tokens, top_k = selected_experts.shape
    local_experts = w13.shape[0]
    plan = jf.make_plan(
        jnp.where(token_valid[:, None], selected_experts, -1).astype(jnp.int32),
        axis_name="expert",
        num_experts=num_experts,
        capacity=max(local_experts, math.ceil(capacity_factor * tokens * top_k)),
        implementation=implementation,
    )
    rows = jf.dispatch(x, plan)
    gate, up = jnp.split(ragged_dot(rows, w13, plan.group_sizes), 2, axis=-1)
    y = ragged_dot(activation_fn(gate) * up, w2, plan.group_sizes)
    out = jf.combine(y, combine_weights, plan)
    dropped = jax.lax.psum(plan.num_dropped, token_sharding_axes)
    return out, grug_moe.CapacityDrops(dropped, jnp.zeros_like(dropped))


@contextlib.contextmanager
def levanter_over(path: str, implementation: str | None) -> Iterator[str]:
    """Puts jax_fusco under Levanter for a while; yields the name Levanter has for the path."""
    if path == "ring":
        yield path
        return
    targets = {
        "seam": (grug_moe, "_moe_mlp_ep_ragged_a2a_local", fusco_moe_local),
        "swap": (jax.lax, "ragged_all_to_all", jf.ragged_all_to_all),
    }
    module, name, ours = targets[path]
    spy = mock.Mock(wraps=functools.partial(ours, implementation=implementation))
    with mock.patch.object(module, name, spy):
        yield "ragged_all_to_all"
    if not spy.called:
        raise RuntimeError(f"{module.__name__}.{name} was replaced, but Levanter did not call it")


# The two programs: Levanter's function of routed experts, and its block with the router.


def experts_program(tensors: Tensors, fixed: Tensors, name: str, factor: float) -> Any:
    """`moe_mlp`: differentiable in tokens, combine weights and both kernels."""
    return grug_moe.moe_mlp(
        tensors["x"],
        fixed["selected_experts"],
        tensors["combine_weights"],
        tensors["w_gate_up"],
        tensors["w_down"],
        token_valid=fixed["token_valid"],
        implementation=name,
        capacity_factor=factor,
        report_capacity_overflow=True,
    )


def block_program(tensors: Tensors, fixed: Tensors, name: str, factor: float) -> Any:
    """`QBRoutedMoE` with `MoEExpertMlp`: differentiable in tokens, router and three kernels."""
    mlp = grug_moe.MoEExpertMlp(
        tensors["w_gate"],
        tensors["w_up"],
        tensors["w_down"],
        implementation=grug_moe.resolve_moe_implementation(name),
        activation=jax.nn.silu,
        capacity_factor=factor,
    )
    out, stats = grug_moe.QBRoutedMoE(TOP_K, TOKEN_AXES)(
        tensors["x"],
        fixed["token_valid"],
        router=tensors["router"],
        router_bias=fixed["router_bias"],
        expert_mlp=mlp,
        mesh=jax.sharding.get_abstract_mesh(),
    )
    dropped = stats["capacity_overflow"].astype(jnp.int32)
    return out, grug_moe.CapacityDrops(dropped, jnp.zeros_like(dropped))


PROGRAMS = {
    "moe_mlp": (experts_program, ("x", "combine_weights", "w_gate_up", "w_down")),
    "QBRoutedMoE": (block_program, ("x", "router", "w_gate", "w_up", "w_down")),
}
KERNEL, DOWN, BY_TOKEN = P("expert", "data", "model"), P("expert", "model", "data"), P(TOKEN_AXES)
SPECS = {"w_gate_up": KERNEL, "w_gate": KERNEL, "w_up": KERNEL, "w_down": DOWN}
SPECS |= {"router": P(), "router_bias": P()}


def make_mesh(shape: tuple[int, ...]) -> Mesh:
    """A mesh over the first devices, its axes Explicit as Levanter has them."""
    devices = np.asarray(jax.devices()[: math.prod(shape)], dtype=object).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def run(
    program: Callable[..., Any],
    shape: tuple[int, ...],
    tensors: Tensors,
    fixed: Tensors,
    name: str,
    factor: float,
) -> tuple[Tensors, int]:
    """(output and gradients, assignments dropped) of a program on a mesh."""

    def loss(tensors: Tensors, fixed: Tensors) -> Any:
        out, counts = program(tensors, fixed, name, factor)
        return jnp.sum(out * fixed["cotangent"]), (out, counts)

    mesh = make_mesh(shape)

    def place(values: Tensors) -> Tensors:
        return {
            key: jax.device_put(value, NamedSharding(mesh, SPECS.get(key, BY_TOKEN)))
            for key, value in values.items()
        }

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, has_aux=True))
        grads, (out, counts) = step(place(tensors), place(fixed))
    results = {"output": np.asarray(out)}
    results |= {f"d {key}": np.asarray(grads[key]) for key in tensors}
    return results, int(counts.sender_dropped) + int(counts.receiver_dropped)


def make_inputs(num_experts: int, padded: bool) -> tuple[Tensors, Tensors]:
    """(differentiable tensors, fixed ones) for both programs, float32 of order one."""
    rng = np.random.default_rng(7)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    # Favouring low expert ids skews the load, so that buffers differ and can overflow.
    favour = np.linspace(1.0, 0.0, num_experts)
    scores = rng.random((TOKENS, num_experts)) + favour
    gate, up = (normal(num_experts, HIDDEN, INNER, scale=HIDDEN**-0.5) for _ in range(2))
    tensors = {
        "x": normal(TOKENS, HIDDEN),
        "combine_weights": rng.uniform(0.1, 1.0, (TOKENS, TOP_K)).astype(np.float32),
        "router": normal(HIDDEN, num_experts, scale=HIDDEN**-0.5),
        "w_gate": gate,
        "w_up": up,
        "w_gate_up": np.concatenate([gate, up], axis=-1),
        "w_down": normal(num_experts, INNER, HIDDEN, scale=INNER**-0.5),
    }
    fixed = {
        "selected_experts": np.argsort(-scores, axis=1)[:, :TOP_K].astype(np.int32),
        "router_bias": favour.astype(np.float32),
        "token_valid": rng.random(TOKENS) > (0.15 if padded else 0.0),
        "cotangent": normal(TOKENS, HIDDEN, scale=TOKENS**-0.5),
    }
    return tensors, fixed


def pick(values: Tensors, names: Sequence[str]) -> Tensors:
    return {name: values[name] for name in names}


class Report:
    """A table of largest differences, and whether every one was small enough."""

    def __init__(self, title: str) -> None:
        self.table = Table("", "tensor", "largest", *PATHS, title=title, title_justify="left")
        self.passed = True

    def _add(self, what: str, tensor: str, size: str, cells: dict[str, tuple[str, bool]]) -> None:
        self.passed &= all(good for _, good in cells.values())
        shown = [cells.get(path, ("", True)) for path in PATHS]
        marked = [text if good else f"[bold red]{text}[/]" for text, good in shown]
        self.table.add_row(what, tensor, size, *marked)

    def compare(self, what: str, wanted: dict[str, Tensors], found: dict[str, Tensors]) -> None:
        """Adds a row per tensor; `wanted` and `found` are per path."""
        self.table.add_section()
        for tensor, value in next(iter(wanted.values())).items():
            cells = {}
            for path, results in found.items():
                difference = np.abs(results[tensor] - wanted[path][tensor]).max()
                cells[path] = (f"{difference:.1e}", bool(difference <= TOLERANCE))
            self._add(what, tensor, f"{np.abs(value).max():.2f}", cells)

    def count(self, what: str, wanted: int, found: dict[str, int]) -> None:
        """Adds a row of dropped assignments."""
        cells = {path: (str(number), number == wanted) for path, number in found.items()}
        self._add(what, "drops", str(wanted), cells)


@functools.cache
def dropless_case(label: str) -> tuple[Tensors, Tensors, Tensors]:
    """(tensors, fixed, results of Levanter's local path on one device) of a program."""
    program, names = PROGRAMS[label]
    tensors, fixed = make_inputs(num_experts=8, padded=True)
    chosen = pick(tensors, names)
    reference, _ = run(program, (1, 1, 1), chosen, fixed, "scatter", 1.0)
    return chosen, fixed, reference


def dropless(shape: tuple[int, ...], implementation: str | None) -> Report:
    """Padding tokens among the others, on buffers that no routing fills; the block on one mesh."""
    report = Report(f"mesh {dict(zip(AXES, shape, strict=True))}: every row fits")
    # Levanter cuts a buffer in two, one for each half of the local experts.
    factor = 2.0 * shape[AXES.index("expert")]
    for label in ("moe_mlp", "QBRoutedMoE") if shape == MESHES[0] else ("moe_mlp",):
        program, _ = PROGRAMS[label]
        chosen, fixed, reference = dropless_case(label)
        results, drops = {}, {}
        for path in PATHS:
            with levanter_over(path, implementation) as name:
                results[path], drops[path] = run(program, shape, chosen, fixed, name, factor)
        report.compare(label, dict.fromkeys(PATHS, reference), results)
        report.count(label, 0, drops)
    return report


def kept_by_plan(ids: np.ndarray, num_experts: int, capacity: int, mesh: Mesh) -> np.ndarray:
    """bool `[T, K]`: assignments to which jax_fusco's plan gives a slot."""

    def slots(ids: jax.Array) -> jax.Array:
        plan = jf.make_plan(ids, axis_name="expert", num_experts=num_experts, capacity=capacity)
        return plan.slot >= 0

    with jax.set_mesh(mesh):
        ids = jax.device_put(ids, NamedSharding(mesh, BY_TOKEN))
        kept = jax.jit(jax.shard_map(slots, in_specs=BY_TOKEN, out_specs=BY_TOKEN))(ids)
    return np.asarray(kept)


def overflowing(shape: tuple[int, ...], implementation: str | None) -> Report:
    """Buffers of the balanced load under skewed routing: drops are counted, and add nothing.

    Three local experts keep Levanter from halving its buffers, so that all paths must drop the same
    number. Which ones differs: Levanter keeps the first experts' rows (its ring and its ragged path
    alike), jax_fusco cuts the fullest cells.
    """
    report = Report(f"mesh {dict(zip(AXES, shape, strict=True))}: buffers overflow")
    data, ranks, _ = shape
    num_experts, factor = 3 * ranks, 1.0
    tensors, fixed = make_inputs(num_experts, padded=False)
    chosen, ids = pick(tensors, PROGRAMS["moe_mlp"][1]), fixed["selected_experts"]
    capacity = math.ceil(factor * TOKENS // (data * ranks) * TOP_K)

    owners = ids.reshape(data, -1) // 3
    loads = np.stack([np.bincount(part, minlength=ranks) for part in owners])
    forced = int(np.maximum(loads - capacity, 0).sum())

    results, drops = {}, {}
    for path in PATHS:
        with levanter_over(path, implementation) as name:
            results[path], drops[path] = run(experts_program, shape, chosen, fixed, name, factor)

    kept = kept_by_plan(ids, num_experts, capacity, make_mesh(shape))

    def without_dropped(tensors: Tensors, *args: Any) -> Any:
        weights = jnp.where(kept, tensors["combine_weights"], 0)
        return experts_program(tensors | {"combine_weights": weights}, *args)

    reference, _ = run(without_dropped, (1, 1, 1), chosen, fixed, "scatter", factor)
    wanted = {"seam": reference, "swap": results["ring"]}
    report.compare("moe_mlp", wanted, pick(results, ("seam", "swap")))
    report.count("moe_mlp", forced, drops)
    report.count("plan.slot", forced, {"seam": int((~kept).sum())})
    return report


@click.command()
@click.option(
    "--implementation", type=click.Choice(["fused", "xla"]), help="Default: the best here."
)
def main(implementation: str | None) -> None:
    """Compare Levanter's MoE over jax_fusco with Levanter's local path."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    console = Console()
    passed = True
    for check, shapes in ((dropless, MESHES), (overflowing, MESHES[:1])):
        for shape in shapes:
            report = check(shape, implementation)
            console.print(report.table)
            passed &= report.passed
    console.print(f"every difference within {TOLERANCE}" if passed else "[bold red]FAILED")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
