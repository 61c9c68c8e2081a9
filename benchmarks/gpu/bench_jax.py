"""The shuffle on one GPU through the public functions, against the pipeline of plain JAX.

    python benchmarks/gpu/bench_jax.py measure --out graphs.json --label "command buffers"
    python benchmarks/gpu/bench_jax.py show --picture gpu.png --kernels kernels.json graphs.json

`measure` times forward (plan, dispatch, combine) and train (with the gradients) on one device, in
this process's XLA_FLAGS. The rival sorts its assignments by expert, gathers the rows, and sums them
at home, in several formulations of which the fastest counts. All see the same inputs; results are
compared with NumPy before anything is timed. `show` makes a table and a picture of what was
measured, with that of bench_kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import click
import jax
import jax.numpy as jnp
from jax import lax
from rich.console import Console
from rich.table import Table

from jax_fusco.bench import measure as timing
from jax_fusco.bench import report
from jax_fusco.bench import rows as rw
from jax_fusco.bench.cases import Case, Fusco, Spec
from jax_fusco.bench.check import Oracle
from jax_fusco.bench.rivals import Shuffle, Sizes
from jax_fusco.bench.rows import Permutation

LARGE = {
    "qwen3-30b-a3b": 16384,
    "deepseek-v3": 8192,
    "gpt-oss-120b": 16384,
    "mixtral-8x7b": 16384,
}
"""Tokens of each model: so many that a call's time is the GPU's and not the host's."""

DECODING = (8, 128)
OPS = ("forward", "train")
TURN_S = 0.01
"""A turn makes so many calls, and waits for the last one."""


@jax.custom_vjp
def stand_in(rows: jax.Array, times: jax.Array) -> jax.Array:
    """Experts that do nothing but have their rows in memory, there and back. A loop of no turns, as
    on CPU devices, would make the host wait for the GPU."""
    return lax.optimization_barrier(rows)


stand_in.defvjp(
    lambda rows, times: (stand_in(rows, times), None),
    lambda _, g: (lax.optimization_barrier(g), None),
)


class GpuCase(Case):
    experts = staticmethod(stand_in)


@dataclasses.dataclass(frozen=True)
class Plain:
    """Sort by expert, gather; gather through the inverse permutation, weight and sum.

    sums: "gather" adds one gathered row after another, "einsum" gathers all rows of a token first,
      "scatter32" and "scatter16" add each row to its token in float32 or bf16.
    helped: permutations and sums carry hand-written adjoints that gather, where autodiff scatters.
    """

    sizes: Sizes
    sums: str = "gather"
    helped: bool = False

    @property
    def name(self) -> str:
        return "plain/helped" if self.helped else f"plain/{self.sums}"

    def plan(self, ids: jax.Array) -> tuple[Permutation, jax.Array]:
        s = self.sizes
        flat = ids.reshape(-1)
        order = rw.sorted_positions(flat, s.experts)
        slots = rw.inverse(order, order.shape[0], jnp.ones(order.shape, bool))
        bounds = jnp.searchsorted(rw.take(flat, order), jnp.arange(s.experts + 1))
        return Permutation(order, slots.reshape(-1, s.k)), jnp.diff(bounds)

    def group_sizes(self, plan: tuple[Permutation, jax.Array]) -> jax.Array:
        return plan[1]

    def dispatch(self, x: jax.Array, plan: tuple[Permutation, jax.Array]) -> jax.Array:
        return rw.helped_take(x, plan[0]) if self.helped else rw.take(x, plan[0].row)

    def combine(
        self, y: jax.Array, weights: jax.Array, plan: tuple[Permutation, jax.Array]
    ) -> jax.Array:
        p = plan[0]
        if self.helped:
            out = rw.helped_sum(y, weights, p)
        elif self.sums == "gather":
            out = rw.sum_rows(y, weights, p.slots)
        elif self.sums == "einsum":
            rows = rw.take(y, p.slots.reshape(-1)).reshape(*p.slots.shape, -1)
            out = jnp.einsum("tk,tkd->td", weights, rows, preferred_element_type=jnp.float32)
        else:
            out = rw.scatter_rows(
                y, weights, p, jnp.float32 if self.sums == "scatter32" else y.dtype
            )
        return out.astype(y.dtype)


def contestants(op: str, sizes: Sizes) -> list[Shuffle]:
    sums = ("gather", "einsum", "scatter16")
    if op == "train":  # autodiff turns each of gather's k gathers into a scatter
        sums = ("einsum", "scatter32", "scatter16")
    plain = [Plain(sizes, name) for name in sums]
    helped = [Plain(sizes, helped=True)] if op == "train" else []
    return [Fusco(sizes, implementation="fused"), *plain, *helped]


def seconds(step: Callable[..., Any], arguments: tuple[Any, ...], calls: int) -> float:
    """Of one call, where they follow one another."""
    start = time.perf_counter()
    for _ in range(calls):
        result = step(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def compile_all(case: Case) -> dict[str, list[tuple[Shuffle, Future[Any]]]]:
    """The contestants of each operation with their programs, compiled side by side: most of a run
    would be spent on that."""

    def compiled(op: str, shuffle: Shuffle) -> Any:
        return case.function(op, shuffle).lower(*case.arguments(op, None)).compile()

    with ThreadPoolExecutor() as pool:
        return {
            op: [(s, pool.submit(compiled, op, s)) for s in contestants(op, case.sizes)]
            for op in case.spec.ops
        }


def run_op(
    case: Case, oracle: Oracle, op: str, programs: list[tuple[Shuffle, Future[Any]]], rounds: int
) -> dict[str, Any]:
    """Checks all contestants, then times in turn those that neither fail nor are wrong."""
    turns: dict[str, Callable[[], float]] = {}
    memory, failed = {}, {}
    arguments = case.arguments(op, None)
    for shuffle, program in programs:
        try:
            step = program.result()
            oracle.check(op, shuffle, jax.block_until_ready(step(*arguments)), None)
        except Exception as error:  # it ends neither its rivals' run nor the next model's
            failed[shuffle.name] = f"{type(error).__name__}: {error}".partition("\n")[0]
            continue
        analysis = step.memory_analysis()
        memory[shuffle.name] = getattr(analysis, "temp_size_in_bytes", None)
        seconds(step, arguments, 2)
        calls = max(1, min(200, round(TURN_S / seconds(step, arguments, 3))))
        turns[shuffle.name] = functools.partial(seconds, step, arguments, calls)
    timings = timing.in_turn(turns, rounds, lambda: None) if turns else {}
    return {
        "timings": {name: t.to_json() for name, t in timings.items()},
        "temporary_bytes": memory,
        "failed": failed,
    }


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Time the shuffle on one GPU through JAX, and show what was measured."""


@main.command("measure")
@click.option("--out", type=click.Path(path_type=pathlib.Path), default="bench_jax.json")
@click.option("--label", default="default flags", help="What to call this process's XLA_FLAGS.")
@click.option("--platform", default="gpu", help="Another one to try this script.")
@click.option("--share", default=1, help="Divide the large numbers of tokens.")
@click.option("--rounds", default=11)
@click.option("--budget", default=150.0, help="Seconds after which no case is started.")
def run(out: pathlib.Path, label: str, platform: str, share: int, rounds: int, budget: float):
    """Measure every model, and write JSON after each."""
    found = jax.devices()[0]
    if found.platform != platform:
        raise click.ClickException(f"JAX runs on {found.platform}, not on {platform}")
    begin = time.monotonic()
    large = {name: max(1, tokens // share) for name, tokens in LARGE.items()}
    qwen = "qwen3-30b-a3b"
    specs = [Spec(qwen, 1, tokens, "uniform", OPS) for tokens in DECODING]  # the quick ones first
    specs += [Spec(name, 1, tokens, "uniform", OPS) for name, tokens in large.items()]
    specs.append(Spec(qwen, 1, large[qwen], "zipf", OPS))
    document: dict[str, Any] = {
        "label": label,
        "device": found.device_kind,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "machine": report.machine(),
        "versions": report.versions(),
        "left_out": [],
        "failed": [],
        "cases": [],
    }
    for spec in specs:
        if time.monotonic() - begin > budget:
            document["left_out"].append(spec.title)
        else:
            case = GpuCase(spec)
            oracle, programs = Oracle(case), compile_all(case)
            ops = {op: run_op(case, oracle, op, programs[op], rounds) for op in spec.ops}
            for op, measured in ops.items():
                for name, reason in measured["failed"].items():
                    document["failed"].append(f"{spec.title}, {op}, {name}: {reason}")
            compared = {op: measured for op, measured in ops.items() if is_comparison(measured)}
            document["cases"].append({"spec": dataclasses.asdict(spec), "ops": compared})
            print_cases(document, document["cases"][-1:])
        out.write_text(json.dumps(document, indent=1) + "\n")
    if document["left_out"]:
        click.echo(f"Note: no time was left for {'; '.join(document['left_out'])}")
    if document["failed"]:
        raise click.ClickException("\n".join(document["failed"]))


def is_comparison(op: dict[str, Any]) -> bool:
    """Whether one of ours and one of theirs were timed."""
    return all(any(n.startswith(f) for n in op["timings"]) for f in ("jax_fusco", "plain"))


def best(op: dict[str, Any], family: str) -> tuple[float, str]:
    """The least median in ms of those whose name begins with `family`, and its name."""
    return min(
        (t["median_ms"], name) for name, t in op["timings"].items() if name.startswith(family)
    )


def print_cases(document: dict[str, Any], cases: Sequence[dict[str, Any]]) -> None:
    table = Table(title=f"{document['device']}, {document['label']}", title_justify="left")
    table.add_column("ms, median")
    for head in ("jax_fusco", "plain JAX", "its fastest way", "plain / jax_fusco", "MB", "MB, it"):
        table.add_column(head, justify="right")
    for case in cases:
        spec = case["spec"]
        for name, op in case["ops"].items():
            ours, rival = best(op, "jax_fusco"), best(op, "plain")
            spread = op["timings"]["jax_fusco"]
            memory = [op["temporary_bytes"].get(key) for key in (ours[1], rival[1])]
            table.add_row(
                f"{spec['shape']}, {spec['tokens']} tokens, {spec['routing']}: {name}",
                f"{ours[0]:.3g} ({spread['p25_ms']:.3g} to {spread['p75_ms']:.3g})",
                f"{rival[0]:.3g}",
                rival[1],
                f"{rival[0] / ours[0]:.2f}",
                *("" if size is None else f"{size / 1e6:.0f}" for size in memory),
            )
    Console(width=140).print(table)


@main.command("show")
@click.argument("documents", nargs=-1, type=click.Path(exists=True, path_type=pathlib.Path))
@click.option("--kernels", type=click.Path(path_type=pathlib.Path), default=None)
@click.option("--picture", type=click.Path(path_type=pathlib.Path), default=None)
def show(
    documents: Sequence[pathlib.Path], kernels: pathlib.Path | None, picture: pathlib.Path | None
):
    """Print what was measured, and draw it."""
    read = [json.loads(path.read_text()) for path in documents]
    for document in read:
        print_cases(document, document["cases"])
    records = None
    if kernels is not None and kernels.exists():
        records = json.loads(kernels.read_text())
        print_kernels(records)
    if picture is not None:
        draw(read, records, picture)
        click.echo(f"Wrote {picture}")


def of_copy(record: dict[str, Any], name: str) -> float | None:
    """The share of a copy's speed, None where there is no copy of the same bytes."""
    us = record["us"]
    if "copy" not in us or name not in us:
        return None
    return us["copy"]["median"] / us[name]["median"]


def print_kernels(records: dict[str, Any]) -> None:
    table = Table(title=f"{records['gpu']}, kernels", title_justify="left")
    for head in ("", "ranks", "tokens", "what", "us", "of copy", "of memset"):
        table.add_column(head, justify="left" if head in ("", "what") else "right")
    for record in records["records"]:
        for name, us in record["us"].items():
            share = of_copy(record, name)
            memset = record["us"].get("memset")
            table.add_row(
                f"{record['model']}, {record['routing']}: {record['op']}",
                str(record["ranks"]),
                str(record["tokens"]),
                name,
                f"{us['median']:.1f} ±{(us['p75'] - us['p25']) / 2:.1f}",
                "" if share is None else f"{share:.3f}",
                "" if memset is None else f"{memset['median'] / us['median']:.3f}",
            )
    Console(width=140).print(table)


KERNELS = ("gather_rows", "reduce_rows", "gather_rows_weighted", "ragged_all_to_all")


def draw(documents: list[dict[str, Any]], records: dict[str, Any] | None, path: pathlib.Path):
    """Left: the kernels' share of a copy's speed. Right: times of JAX programs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(15, 6), layout="constrained")
    if records is not None:
        _draw_kernels(axes[0], records)
    _draw_programs(axes[1], documents)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_kernels(axis: Any, records: dict[str, Any]) -> None:
    kept = [r for r in records["records"] if "copy" in r["us"]]
    groups = list(dict.fromkeys((r["model"], r["routing"], r["ranks"]) for r in kept))
    for place, kernel in enumerate(KERNELS):
        shares = {
            (r["model"], r["routing"], r["ranks"]): share
            for r in kept
            if (share := of_copy(r, kernel)) is not None
        }
        at = [i + (place - 1.5) * 0.2 for i, group in enumerate(groups) if group in shares]
        axis.bar(at, [shares[g] for g in groups if g in shares], 0.2, label=kernel)
    axis.axhline(1, color="black", linewidth=0.6, linestyle=":")
    names = [f"{model} {'' if routing == 'uniform' else routing} R={ranks}"
             for model, routing, ranks in groups]  # fmt: skip
    axis.set_xticks(range(len(groups)), names, rotation=60, ha="right", fontsize=8)
    axis.set_title(f"{records['gpu']}: speed of a copy of the same bytes = 1", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def _draw_programs(axis: Any, documents: list[dict[str, Any]]) -> None:
    labels: list[str] = []
    width = 0.8 / max(1, 2 * len(documents))
    for place, document in enumerate(documents):
        bars = [(case, name) for case in document["cases"] for name in case["ops"]]
        for index, (family, color) in enumerate((("jax_fusco", "#1b7837"), ("plain", "#d6604d"))):
            values = [best(case["ops"][name], family)[0] for case, name in bars]
            at = [i - 0.4 + (2 * place + index + 0.5) * width for i in range(len(bars))]
            label = f"{family}, {document['label']}"
            axis.bar(at, values, width, color=color, alpha=1 - 0.4 * place, label=label)
        if len(bars) > len(labels):
            labels = [
                f"{c['spec']['shape']} x {c['spec']['tokens']}"
                f"{'' if c['spec']['routing'] == 'uniform' else ' ' + c['spec']['routing']}\n{name}"
                for c, name in bars
            ]
    axis.set_yscale("log")
    axis.set_ylabel("ms")
    axis.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)
    axis.set_title("The shuffle through JAX on one device", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
