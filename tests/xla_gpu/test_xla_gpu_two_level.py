"""What the real XLA:GPU makes of a shuffle over 8 servers of 8 H100s."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from gpu_programs import Layer, compiled, custom_calls, forward, make_node_mesh, train
from rich.console import Console
from rich.table import Table

import jax_fusco as jf

TOKENS, WIDTH = 4096, 2048


@pytest.fixture(scope="module")
def programs():
    """Compiled forward and backward, by name; forward also for two servers."""
    found = {}
    for name, program, nodes, exchange in (
        ("forward", forward, 8, "dense"),
        ("train", train, 8, "dense"),
        ("two", forward, 2, "dense"),
        ("ragged", train, 8, "ragged"),
    ):
        topology = jf.Topology(exchange=exchange)
        mesh, layer = make_node_mesh(nodes), Layer(8 * nodes, topology=topology)
        options = topology.compiler_options
        found[name] = compiled(program(layer, mesh), layer.arguments(mesh), **options)
    return found


def bodies_with_exchanges(text):
    """Lines of each loop body that exchanges rows, in the order of the schedule."""
    names = set(re.findall(r"body=%([\w.\-]+)", text))
    for name in names:
        opening = re.search(rf"^%{re.escape(name)} .*\{{$", text, re.MULTILINE)
        assert opening
        lines = text[opening.end() : text.index("\n}", opening.end())].splitlines()
        if any("all-to-all-start(" in line for line in lines):
            yield lines


TRAIN = [{"gather_rows": 2}, {"gather_rows": 2}, {"reduce_rows": 1}, {"reduce_rows": 1}]


@pytest.mark.parametrize(
    ("name", "movers"),
    [
        ("forward", [{"gather_rows": 2}, {"reduce_rows": 1}]),
        ("two", [{"gather_rows": 2}, {"reduce_rows": 1}]),
        ("train", TRAIN),
        ("ragged", TRAIN),
    ],
)
def test_a_slice_crosses_while_its_neighbours_are_packed_and_forwarded(programs, name, movers):
    """The schedule puts all local movers of a slice between the exchange's start and its end."""
    between = []
    for lines in bodies_with_exchanges(programs[name].as_text()):
        wide = [line if f",{WIDTH}]" in line else "" for line in lines]  # weights cross too
        (start,) = (n for n, line in enumerate(wide) if "all-to-all-start(" in line)
        (end,) = (n for n, line in enumerate(wide) if "all-to-all-done(" in line)
        between.append(dict(custom_calls("\n".join(lines[start:end]))))
        assert between[-1] == dict(custom_calls("\n".join(lines)))
        # What was packed makes room for the next, and what arrived goes where the loop keeps it.
        assert sum(" copy(" in line for line in wide) == 2
    assert sorted(between, key=str) == sorted(movers, key=str)


@pytest.mark.parametrize("name", ["forward", "train", "two", "ragged"])
def test_nothing_else_goes_over_the_slow_link(programs, name):
    """All-to-alls over nodes alone. Inside a node the engine exchanges all there is."""
    text = programs[name].as_text()
    other = "all-gather|all-reduce|collective-permute|reduce-scatter|sort"
    assert not re.search(rf"\b({other})(-start)?\(", text)
    assert ("ragged-all-to-all" in text) == (name == "ragged")
    exchanges = [line for line in text.splitlines() if re.search(r"all-to-all(-start)?\(", line)]
    assert exchanges
    nodes = 2 if name == "two" else 8
    rails = [range(rail, 8 * nodes, 8) for rail in range(8)]
    listed = ",".join("{" + ",".join(map(str, rail)) + "}" for rail in rails)
    for line in exchanges:
        assert f"replica_groups={{{listed}}}" in line or re.search(
            r"replica_groups=\S+ \{'node'\}", line
        )


def test_real_sizes_cross_where_xla_is_told_not_to_gather(programs):
    """Rows as ragged exchanges alone, given the topology's options; without them XLA gathers."""
    layer, mesh = Layer(64, topology=jf.Topology(exchange="ragged")), make_node_mesh()
    plain = compiled(train(layer, mesh), layer.arguments(mesh))
    found = []
    for program in (programs["ragged"], plain):
        wide = "\n".join(line for line in program.as_text().splitlines() if f",{WIDTH}]" in line)
        exchanges = re.findall(r" ((?:ragged-)?all-to-all|all-gather)(?:-start)?\(", wide)
        found.append(Counter(exchanges))
    assert found == [{"ragged-all-to-all": 4}, {"ragged-all-to-all": 4, "all-gather": 4}]


def test_memory_is_by_formula(programs, capsys):
    """Rows, sums as they come back from the nodes, sums in float32, and slices under way."""
    layer, nodes, row = Layer(64), 8, 2 * WIDTH
    slice_rows = jf.Topology().rows_of_slices(TOKENS, row)
    parts = {
        "rows [C, d]": layer.capacity * row,
        "partial sums that came back [N, T, d]": nodes * TOKENS * row,
        "sums of this node and of the others, float32 [T, d]": 2 * TOKENS * 4 * WIDTH,
        "slices packed, crossing, arrived [N, slice, d]": 3 * nodes * slice_rows * row,
    }
    table = Table(title=f"MB, 8 x 8 GPUs x {TOKENS} tokens, capacity factor 1.25")
    table.add_column("forward")
    table.add_column("", justify="right")
    for name, size in parts.items():
        table.add_row(name, f"{size / 1e6:.1f}")
    found = {
        name: programs[name].memory_analysis().temp_size_in_bytes for name in ("forward", "train")
    }
    table.add_row("in all", f"{sum(parts.values()) / 1e6:.1f}")
    for name, size in found.items():
        table.add_row(f"XLA's temporaries, {name}", f"{size / 1e6:.1f}")
    with capsys.disabled():
        Console().print(table)
    assert found["forward"] <= 1.05 * sum(parts.values())
    assert found["train"] <= 1.05 * sum(parts.values()) + layer.capacity * row
