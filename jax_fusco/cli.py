"""The `jax-fusco` command."""

from __future__ import annotations

import json
import math
import pathlib
import sys
import tempfile
from typing import Any

import click

from jax_fusco import __version__


class _Finite(click.FloatRange):
    """Without NaN, which is outside of no range, and without infinity."""

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"got {number}, need a finite number", param, ctx)
        return number


def _make_folder(out: pathlib.Path) -> None:
    """Makes --out before the work that fills it; one sentence where nothing can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise click.ClickException(
            f"--out: got {out}, need a folder to write to ({error.strerror})"
        ) from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="jax-fusco")
def main() -> None:
    """Fused Mixture-of-Experts shuffles for JAX."""


@main.command()
def doctor() -> None:
    """Say what this machine can do, and why not more.

    Fails if something that is installed cannot work.
    """
    from rich.console import Console
    from rich.table import Table

    from jax_fusco import doctor

    table = Table(title="jax_fusco", title_justify="left")
    for column in ("", "found", "", "what to do"):
        table.add_column(column, overflow="fold")
    findings = doctor.examine()
    for finding in findings:
        table.add_row(finding.what, finding.found, finding.verdict, finding.remedy)
    Console().print(table)
    sys.exit(any(finding.verdict == doctor.BROKEN for finding in findings))


class _BenchCommand(click.Command):
    """Reads the lists of names when help is asked for, so that the command line starts fast."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from jax_fusco.bench.cases import OPS
        from jax_fusco.bench.routing import ROUTINGS
        from jax_fusco.bench.shapes import SHAPES

        for title, names in (
            ("Shapes", [(s.name, _describe(s)) for s in SHAPES.values()]),
            ("Routings", [(n, (f.__doc__ or "").splitlines()[0]) for n, f in ROUTINGS.items()]),
            ("Operations", list(OPS.items())),
        ):
            with formatter.section(title):
                formatter.write_dl(names)


def _describe(shape: Any) -> str:
    return f"{shape.features} features, top {shape.k} of {shape.experts} experts"


@main.command(cls=_BenchCommand)
@click.option("--shape", "shapes", multiple=True, help="A model's MoE layer; may be repeated.")
@click.option("--devices", multiple=True, type=int, help="CPU devices; may be repeated.")
@click.option("--routing", "routings", multiple=True, help="Where tokens go; may be repeated.")
@click.option("--op", "ops", multiple=True, help="What to time; may be repeated.")
@click.option("--tokens", multiple=True, type=int, help="Tokens a device; may be repeated.")
@click.option("--repeats", type=click.IntRange(1), help="Rounds, one run of everybody in each.")
@click.option(
    "--capacity-factor",
    type=_Finite(0, min_open=True),
    help="Receive buffers over the balanced load; default: as many rows as the routing needs.",
)
@click.option("--implementation", help="Ours: fused or xla; default: the library's choice.")
@click.option("--quick", is_flag=True, help="One small case, in less than a minute.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    default=pathlib.Path("runs/bench"),
    show_default=True,
    help="Folder for results.json and results.png.",
)
def bench(
    shapes: tuple[str, ...],
    devices: tuple[int, ...],
    routings: tuple[str, ...],
    ops: tuple[str, ...],
    tokens: tuple[int, ...],
    repeats: int | None,
    capacity_factor: float | None,
    implementation: str | None,
    quick: bool,
    out: pathlib.Path,
) -> None:
    """Time the shuffles, in turn with a ring, a padded all_to_all and plain memory copies.

    Without options: two models on 4 and 8 CPU devices, and in part skewed routings, decoding and
    other models, in about ten minutes. Naming a shape, devices, a routing, an operation or tokens
    measures every combination of what is named instead. Every result is compared with NumPy before
    it is timed.
    """
    from jax_fusco.bench import presets
    from jax_fusco.bench.run import run

    named = any((shapes, devices, routings, ops, tokens))
    if quick and named:
        raise click.ClickException("--quick: got other choices too, need it alone")
    if implementation not in (None, "fused", "xla"):
        raise click.ClickException(f"--implementation: got {implementation!r}, need fused or xla")
    try:
        if quick:
            cases = presets.quick_cases()
        elif named:
            cases = presets.chosen_cases(shapes, devices, routings, ops, tokens)
        else:
            cases = presets.default_cases()
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    changes: dict[str, Any] = {
        "repeats": repeats,
        "capacity_factor": capacity_factor,
        "implementation": implementation,
    }
    _make_folder(out)
    failed = run(cases, {k: v for k, v in changes.items() if v is not None}, out, _command())
    sys.exit(1 if failed else 0)


@main.command("bench-grouped-matmul")
@click.option("--shape", "shapes", multiple=True, help="A model's layer; may be repeated.")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["bfloat16", "float32"]),
    help="May be repeated; default: both.",
)
@click.option("--experts", multiple=True, type=click.IntRange(1), help="Of a rank; default: 16.")
@click.option("--rows", type=click.IntRange(1), default=8192, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=7, show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    default=pathlib.Path("runs/bench"),
    show_default=True,
    help="Folder for grouped_matmul.json and grouped_matmul.png.",
)
def bench_grouped_matmul(
    shapes: tuple[str, ...],
    dtypes: tuple[str, ...],
    experts: tuple[int, ...],
    rows: int,
    repeats: int,
    out: pathlib.Path,
) -> None:
    """Time the experts' products on one CPU device, in turn with one dense product.

    Forward and both gradients of both products of a layer, for equal and for Zipf groups.
    """
    from jax_fusco.bench import grouped

    try:
        cases = grouped.specs(
            shapes or ("qwen3-30b-a3b", "olmoe-1b-7b"),
            dtypes or ("bfloat16", "float32"),
            experts or (16,),
            rows,
        )
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    _make_folder(out)
    grouped.run(cases, repeats, out, " ".join(["jax-fusco", *sys.argv[1:]]))


@main.command()
@click.argument("routing", type=click.Path(path_type=pathlib.Path))
@click.option("--ranks-per-node", required=True, type=click.IntRange(1), help="Ranks of a node.")
@click.option("--row-bytes", required=True, type=click.IntRange(1), help="Bytes of a token's row.")
@click.option("--num-experts", type=click.IntRange(1), help="If the file does not say.")
@click.option("--slice-rows", type=click.IntRange(1), help="Rows of a slice; default: tokens / 16.")
@click.option(
    "--placement",
    type=click.Path(path_type=pathlib.Path),
    help="placement.json: where the experts lie, and their replicas.",
)
@click.option("--layer", type=click.IntRange(0), help="Of a placement for several layers.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    help="Folder for ledger.json and ledger.png; without it nothing is written.",
)
def ledger(
    routing: pathlib.Path,
    ranks_per_node: int,
    row_bytes: int,
    num_experts: int | None,
    slice_rows: int | None,
    placement: pathlib.Path | None,
    layer: int | None,
    out: pathlib.Path | None,
) -> None:
    """Count the bytes that a routing moves inside ranks, inside nodes and between nodes.

    ROUTING is an npz file with expert_ids [ranks, tokens, experts per token] and num_experts.
    """
    from rich.console import Console

    from jax_fusco import ledger_report
    from jax_fusco.ledger import ledger as count
    from jax_fusco.placement import Placement

    try:
        ids, experts = _read_routing(routing, num_experts, ranks_per_node, "--ranks-per-node")
        placed = None if placement is None else Placement.from_file(placement)
        if layer is not None:
            if placed is None:
                raise ValueError(f"--layer: got {layer} and no --placement, need both or none")
            placed = placed.layer(layer)
        elif placed is not None and placed.num_layers is not None:
            raise ValueError(
                f"--layer: got nothing, need one of the {placed.num_layers} layers of {placement}"
            )
        found = count(
            ids,
            (len(ids) // ranks_per_node, ranks_per_node),
            num_experts=experts,
            row_bytes=row_bytes,
            slice_rows=slice_rows,
            placement=placed,
        )
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    if out is not None:
        _make_folder(out)
    console = Console(width=None if Console().is_terminal else 150)
    console.print(ledger_report.describe(found))
    console.print(ledger_report.table(found))
    if out is not None:
        (out / "ledger.json").write_text(json.dumps(ledger_report.document(found), indent=1) + "\n")
        if not ledger_report.draw(found, out / "ledger.png"):
            console.print("Install jax-fusco[bench] for the picture")


@main.command()
@click.argument("routing", type=click.Path(path_type=pathlib.Path))
@click.option("--ranks", type=click.IntRange(1), help="Ranks; default: those of the routing.")
@click.option("--ranks-per-node", type=click.IntRange(1), help="Ranks of a node; default: all.")
@click.option("--row-bytes", type=click.IntRange(1), help="Bytes of a row; default: count rows.")
@click.option("--num-experts", type=click.IntRange(1), help="If the file does not say.")
@click.option("--slots", type=click.IntRange(1), help="Slots a rank, for replicas.")
@click.option("--groups", type=click.IntRange(1), default=1, help="Groups the router chooses from.")
@click.option(
    "--method",
    type=click.Choice(["search", "occult", "balance"]),
    default="search",
    show_default=True,
    help="Whose placement to keep.",
)
@click.option(
    "--load-weight",
    type=_Finite(0),
    default=1.0,
    show_default=True,
    help="Time of the experts over that of today's communication.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    help="Folder for placement.json, report.json and placement.png; without it nothing is written.",
)
def placement(
    routing: pathlib.Path,
    ranks: int | None,
    ranks_per_node: int | None,
    row_bytes: int | None,
    num_experts: int | None,
    slots: int | None,
    groups: int,
    method: str,
    load_weight: float,
    seed: int,
    out: pathlib.Path | None,
) -> None:
    """Find which experts should share a rank, and say what that saves before anything moves.

    ROUTING is an npz file that RoutingStats.save wrote, or one with expert_ids [ranks, tokens,
    experts per token] and num_experts; with logits [ranks, tokens, experts] in it, pruning is
    counted too.
    """
    from rich.console import Console

    from jax_fusco import placement_report

    try:
        stats, in_file, ids, logits = placement_report.read(routing, num_experts)
        if ranks is None and in_file is None:
            raise ValueError(f"--ranks: got nothing, and {routing} has no ranks, need a number")
        if out is not None:
            _make_folder(out)
        found = placement_report.study(
            stats,
            ids,
            logits,
            method=method,
            num_ranks=ranks or in_file or 1,
            row_bytes=row_bytes or 1,
            ranks_per_node=ranks_per_node,
            num_slots=slots,
            load_weight=load_weight,
            seed=seed,
            **({"num_groups": groups} if groups > 1 else {}),
        )
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    console = Console(width=None if Console().is_terminal else 150)
    console.print(placement_report.describe(found))
    console.print(placement_report.table(found))
    console.print(placement_report.verdict(found, method))
    if out is not None:
        found.placements[method].save(out / "placement.json")
        text = json.dumps(placement_report.document(found), indent=1)
        (out / "report.json").write_text(text + "\n")
        if not placement_report.draw(found, method, out / "placement.png"):
            console.print("Install jax-fusco[bench] for the picture")


@main.command()
@click.option("--routing", type=click.Path(path_type=pathlib.Path), help="Replay this npz instead.")
@click.option("--row-bytes", type=click.IntRange(1), default=14336, show_default=True)
@click.option("--num-experts", type=click.IntRange(1), help="If the routing's file does not say.")
@click.option("--gpus", type=click.IntRange(8), multiple=True, help="GPUs; default: 8 to 16384.")
@click.option("--gpus-per-node", type=click.IntRange(1), default=8, show_default=True)
@click.option("--nics-per-node", type=click.IntRange(1), default=10, show_default=True)
@click.option("--oversubscription", type=_Finite(1), default=1.0, show_default=True)
@click.option("--tokens", type=click.IntRange(1), help="A GPU; default: 4096.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    default=pathlib.Path("runs/simulate"),
    show_default=True,
    help="Folder for simulate.json, simulate_rails.json and simulate.png.",
)
def simulate(
    routing: pathlib.Path | None,
    row_bytes: int,
    num_experts: int | None,
    gpus: tuple[int, ...],
    gpus_per_node: int,
    nics_per_node: int,
    oversubscription: float,
    tokens: int | None,
    out: pathlib.Path,
) -> None:
    """Model shuffles on clusters of many hosts: a fit to published times, and what follows from it.

    A model, not a measurement. With --routing nothing is written.
    """
    try:
        from jax_fusco.simulate import run as study
    except ImportError as error:
        raise click.ClickException(
            f"simulate: got no module {error.name}, need pip install 'jax-fusco[simulate]'"
        ) from None
    from jax_fusco.simulate.cluster import Cluster
    from jax_fusco.simulate.study import GPUS

    changes = {
        "gpus_per_node": gpus_per_node,
        "nics_per_node": nics_per_node,
        "oversubscription": oversubscription,
    }
    odd = [number for number in gpus if number % gpus_per_node]
    if odd:
        raise click.ClickException(
            f"--gpus: got {odd[0]}, need a multiple of the {gpus_per_node} GPUs of a node"
        )
    if routing is None:
        _make_folder(out)
        study.run(out, changes, gpus or GPUS, tokens or 4096)
        return
    for option, value in (("--gpus", gpus), ("--tokens", tokens)):
        if value:
            raise click.ClickException(f"{option}: got it beside --routing, which has its own")
    from jax_fusco.plan import experts_per_rank
    from jax_fusco.simulate.traffic import from_routing

    try:
        ids, experts = _read_routing(routing, num_experts, gpus_per_node, "--gpus-per-node")
        experts_per_rank(experts, len(ids))
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    nodes = len(ids) // gpus_per_node
    cluster = Cluster(nodes, **changes)
    study.replay(from_routing(ids, nodes, gpus_per_node, experts), cluster, row_bytes)


def _read_routing(
    path: pathlib.Path, num_experts: int | None, ranks_per_node: int, option: str
) -> tuple[Any, int]:
    """A file's ids and number of experts; ValueError where they do not fit the options."""
    from jax_fusco import ledger_report

    ids, in_file = ledger_report.read_routing(path)
    experts = ledger_report.experts_of(path, in_file, num_experts)
    if len(ids) % ranks_per_node:
        raise ValueError(
            f"{option}: got {ranks_per_node}, need a divisor of the {len(ids)} ranks of the routing"
        )
    return ids, experts


def _command() -> str:
    arguments = [a if a.isprintable() and " " not in a else json.dumps(a) for a in sys.argv[1:]]
    arguments = [a for a in arguments if a != "bench"]
    return " ".join(["python -m jax_fusco.bench", *arguments])


if __name__ == "__main__":
    main()
