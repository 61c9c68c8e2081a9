"""Shuffles over several processes of this machine, each a node: two levels against plain XLA.

    python benchmarks/hosts.py --processes 2 --devices 4 --out benchmarks/results

The processes talk through gloo over this machine's own network, so times are those of a slow link
that costs processor time. Results are compared first, then all ways are timed in turn.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

# Two levels (partial sums cross in bfloat16, or in float32); implementation="xla" without a
# topology; and all-gather, local select, reduce-scatter.
WAYS = ("two levels", "two levels, float32 back", "flat xla", "ring")
# forward: plan, dispatch, combine; moves: dispatch and combine, by a plan that was made before.
OPS = ("plan", "dispatch", "moves", "forward", "train")


def launch(processes: int, devices: int, arguments: list[str]) -> int:
    """Runs this file once for each process; returns the first exit status that is not zero."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started = []
    try:
        for index in range(processes):
            job = {"HOSTS_JOB": f"{index} {processes} {devices} {port}"}
            quiet = {} if index == 0 else {"stdout": subprocess.DEVNULL}
            command = [sys.executable, __file__, *arguments]
            started.append(subprocess.Popen(command, env={**os.environ, **job}, **quiet))
        return next((code for process in started if (code := process.wait())), 0)
    finally:
        for process in started:
            process.kill()


def join() -> int:
    """Joins the job; returns this process' index."""
    import jax

    index, processes, devices, port = map(int, os.environ["HOSTS_JOB"].split())
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, index)
    return index


class Shuffle:
    """A layer's shuffle over the mesh of all processes, its experts a stand-in."""

    def __init__(self, tokens: int, features: int, experts: int, k: int):
        import jax
        import jax.numpy as jnp

        import jax_fusco as jf
        from jax_fusco.bench.rivals import Ring, Sizes

        local = jax.local_device_count()
        ranks = jax.device_count()
        self.mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("expert",))
        self.local = local
        self.experts, self.capacity = experts, jf.capacity(tokens, k, experts, ranks, 1.25)
        sizes = Sizes(ranks, tokens, k, experts, features, self.capacity, 0)
        self.ring = Ring(sizes)
        self.spec = jax.P("expert")
        sharding = jax.sharding.NamedSharding(self.mesh, self.spec)

        def place(seed: int, shape: tuple[int, ...], draw: Any) -> jax.Array:
            def shard(index: tuple[slice, ...]) -> np.ndarray:
                return draw(np.random.default_rng([seed, index[0].start or 0]))

            return jax.make_array_from_callback((ranks * tokens, *shape), sharding, shard)

        def routing(rng: np.random.Generator) -> np.ndarray:
            return np.argsort(rng.random((tokens, experts)), 1)[:, :k].astype(np.int32)

        def normal(rng: np.random.Generator) -> np.ndarray:
            return rng.standard_normal((tokens, features), np.float32).astype(jnp.bfloat16)

        self.operands = (
            place(0, (features,), normal),
            place(1, (k,), routing),
            place(2, (k,), lambda rng: rng.random((tokens, k), np.float32)),
        )

    def program(self, way: str, op: str) -> Any:
        import jax

        import jax_fusco as jf

        topology = None
        if way.startswith("two"):
            wire = "float32" if "float32" in way else None
            topology = jf.Topology(None, "expert", self.local, wire_dtype=wire)

        def make_plan(ids: Any) -> jf.Plan:
            return jf.make_plan(
                ids,
                axis_name="expert",
                num_experts=self.experts,
                capacity=self.capacity,
                topology=topology,
                implementation="fused" if topology else "xla",
            )

        def forward(x: Any, ids: Any, weights: Any) -> Any:
            if way == "ring":
                plan = self.ring.plan(ids)
                rows = self.ring.dispatch(x, plan)
                return self.ring.combine(rows, weights, plan).astype(x.dtype)
            plan = make_plan(ids)
            return jf.combine(jf.dispatch(x, plan), weights, plan)

        def local(x: Any, ids: Any, weights: Any) -> Any:
            if op == "plan":
                return jax.tree.map(lambda leaf: leaf[None], make_plan(ids))
            if op == "dispatch":
                if way == "ring":
                    return self.ring.dispatch(x, self.ring.plan(ids))
                return jf.dispatch(x, make_plan(ids))
            if op == "forward":
                return forward(x, ids, weights)
            out, pull = jax.vjp(lambda x, weights: forward(x, ids, weights), x, weights)
            return pull(out)

        def moves(x: Any, plan: jf.Plan, weights: Any) -> Any:
            plan = jax.tree.map(lambda leaf: leaf[0], plan)
            return jf.combine(jf.dispatch(x, plan), weights, plan)

        mapped = jax.shard_map(
            moves if op == "moves" else local,
            mesh=self.mesh,
            in_specs=self.spec,
            out_specs=self.spec,
            check_vma=False,
        )
        x, ids, weights = self.operands
        given = self.program(way, "plan")() if op == "moves" else ids
        return partial(jax.jit(mapped), x, given, weights)


def compare(shuffle: Shuffle, ways: list[str]) -> None:
    """Fails unless all ways give the flat shuffle's rows, and its sums but for rounding."""
    import jax

    def shards(way: str, op: str) -> list[np.ndarray]:
        result = jax.block_until_ready(shuffle.program(way, op)())
        return [np.asarray(shard.data) for shard in result.addressable_shards]

    want = {op: shards("flat xla", op) for op in ("dispatch", "forward")}
    for way in ways:
        for got, expected in zip(shards(way, "forward"), want["forward"], strict=True):
            expected = expected.astype(np.float32)
            error = np.abs(got.astype(np.float32) - expected).max()
            assert error <= 0.02 * np.abs(expected).max(), f"{way}: forward differs by {error}"
        if way.startswith("two"):
            for got, expected in zip(shards(way, "dispatch"), want["dispatch"], strict=True):
                assert (got.view(np.uint16) == expected.view(np.uint16)).all(), f"{way}: dispatch"


def times(shuffle: Shuffle, ways: list[str], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds by way and operation, taken in turn: the median of each turn's calls."""
    import jax
    from jax.experimental.multihost_utils import sync_global_devices
    from tqdm import tqdm

    found: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
    cases = [
        (op, way) for op in OPS for way in ways if way != "ring" or op in ("dispatch", "forward")
    ]
    programs = {case: shuffle.program(case[1], case[0]) for case in cases}
    rounds = [(n, case) for n in range(-1, repeats) for case in cases]
    for n, (op, way) in tqdm(rounds, disable=jax.process_index() != 0):
        # What follows a call that took much memory is slow, whatever it is, and again when the
        # system takes back what that one freed: nobody is timed first, nor but once.
        taken = []
        for _ in range(1 + (15 if op == "plan" else 3)):  # plans are short, so noisy
            sync_global_devices(f"{n} {op} {way}")
            start = time.perf_counter()
            jax.block_until_ready(programs[op, way]())
            taken.append((time.perf_counter() - start) * 1e3)
        if n >= 0:  # the first time is XLA's to compile
            found[way].setdefault(op, []).append(statistics.median(taken[1:]))
    return found


def report(found: dict[str, Any], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    table.add_column("", no_wrap=True)
    for op in OPS:
        table.add_column(op, justify="right", no_wrap=True)
    ours = found["two levels"]
    for way, ops in found.items():
        cells = []
        for op in OPS:
            if op not in ops:
                cells.append("")
                continue
            middle = statistics.median(ops[op])
            ratio = middle / statistics.median(ours[op])
            cells.append(f"{middle:.1f} ms" + (f"  {ratio:.1f}x" if way != "two levels" else ""))
        table.add_row(way, *cells)
    Console(width=130).print(table)


@click.command(context_settings={"show_default": True})
@click.option("--processes", type=click.IntRange(2), default=2, help="Processes, each a node.")
@click.option("--devices", type=click.IntRange(1), default=4, help="CPU devices of each.")
@click.option("--tokens", type=click.IntRange(1), default=1024, help="Tokens of each device.")
@click.option("--features", type=click.IntRange(1), default=2048, help="Length of a row.")
@click.option("--experts", type=click.IntRange(1), default=128)
@click.option("--k", type=click.IntRange(1), default=8, help="Experts of each token.")
@click.option("--repeats", type=click.IntRange(1), default=7)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for JSON.")
def main(processes: int, devices: int, out: Path | None, **sizes: int) -> None:
    """Times shuffles over several processes (by default Qwen3-30B-A3B's)."""
    if "HOSTS_JOB" not in os.environ:
        sys.exit(launch(processes, devices, sys.argv[1:]))
    index, repeats = join(), sizes.pop("repeats")
    import jax

    shuffle, ways = Shuffle(**sizes), list(WAYS)
    compare(shuffle, ways)
    found = times(shuffle, ways, repeats)
    if index:
        return
    title = f"{processes} processes x {devices} devices x {sizes['tokens']} tokens, median"
    report(found, title)
    ours = found["two levels"]
    whole = statistics.median(ours["forward"]) / 100
    within = [a - b for a, b in zip(ours["forward"], ours["moves"], strict=True)]
    low, middle, high = statistics.quantiles(within, n=4) if repeats > 1 else within * 3
    print(
        f"planning takes {statistics.median(ours['plan']) / whole:.1f} % of plan, dispatch and "
        f"combine in a call of its own; within one, by what a round takes less without it, "
        f"{middle / whole:.1f} % ({low / whole:.1f} to {high / whole:.1f}, quartiles)"
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        record = {
            "command": f"python benchmarks/hosts.py {' '.join(sys.argv[1:])}",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "jax": jax.__version__,
            "processes": processes,
            "devices": devices,
            **sizes,
            "milliseconds": found,
        }
        (out / "hosts.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
