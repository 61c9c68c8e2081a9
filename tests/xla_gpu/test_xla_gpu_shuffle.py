"""What the real XLA:GPU makes of a shuffle for 1, 8 and 64 H100s."""

from __future__ import annotations

import functools
import math
import re

import jax
import pytest
from gpu_programs import (
    Layer,
    compiled,
    computation_calls,
    custom_calls,
    forward,
    make_mesh,
    train,
    unwanted,
)
from rich.console import Console
from rich.table import Table

import jax_fusco as jf


def test_a_layer_is_three_calls_and_nothing_else_moves(mesh):
    layer = Layer(mesh.size)
    text = compiled(forward(layer, mesh), layer.arguments(mesh)).as_text()
    assert custom_calls(text) == {"plan": 1, "gather_rows": 1, "reduce_rows": 1}
    assert unwanted(text) == []


def test_gradients_are_three_calls_more(mesh):
    layer = Layer(mesh.size)
    text = compiled(train(layer, mesh), layer.arguments(mesh)).as_text()
    assert custom_calls(text) == {
        "plan": 1,
        "gather_rows": 2,  # dispatch, and the weights' gradient on its way home
        "gather_rows_weighted": 1,
        "reduce_rows": 2,
    }
    assert unwanted(text) == []


def test_the_oracle_holds_what_the_engine_avoids():
    """So that the search above is known to find something."""
    mesh = make_mesh(8)
    layer = Layer(8, implementation="xla")
    text = compiled(forward(layer, mesh), layer.arguments(mesh)).as_text()
    assert not custom_calls(text)
    assert any("all-gather" in line for line in unwanted(text))


def test_plain_xla_moves_what_is_asked_for():
    """Over many GPUs: slices of what a balanced routing needs, and no rows to all ranks."""
    mesh = make_mesh(64)
    layer = Layer(64, implementation="xla")
    text = compiled(train(layer, mesh), layer.arguments(mesh)).as_text()
    exchanges = [line for line in unwanted(text) if re.search(r"all-(to-all|gather)", line)]
    of_rows = [line for line in exchanges if f",{layer.features}]" in line]
    assert len(of_rows) == 4  # dispatch, combine, and their gradients
    assert all("all-to-all" in line for line in of_rows)
    sizes = [
        math.prod(map(int, shape.split(",")))
        for line in exchanges
        for shape in re.findall(r"\w\[([\d,]+)\]", line)
    ]
    assert max(sizes) <= 1.1 * layer.tokens * layer.k * layer.features / 4


LAYERS = 3
SAVE = jax.checkpoint_policies.save_only_these_names(*jf.REMAT_SAVE_NAMES)


def layers_in_a_scan(layer, mesh, wrap):
    def local(x, ids, weights):
        def body(x, _):
            return wrap(layer)(x, ids, weights), None

        return jax.lax.scan(body, x, None, length=LAYERS)[0]

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(jax.P("expert"),) * 3, out_specs=jax.P("expert")
    )
    return jax.grad(lambda *args: mapped(*args).astype("float32").sum(), argnums=(0, 2))


@pytest.mark.parametrize(
    ("wrap", "again"),
    [
        (functools.partial(jax.checkpoint, policy=SAVE), 0),
        (functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable), 1),
    ],
    ids=["named", "nothing"],
)
def test_remat_with_names_does_not_repeat_the_exchange(wrap, again):
    mesh = make_mesh(8)
    layer = Layer(8)
    text = compiled(layers_in_a_scan(layer, mesh, wrap), layer.arguments(mesh)).as_text()
    bodies = [
        calls for calls in computation_calls(text).values() if "gather_rows_weighted" in calls
    ]
    assert len(bodies) == 1
    assert bodies[0] == {
        "plan": again,
        "gather_rows": 1 + again,
        "gather_rows_weighted": 1,
        "reduce_rows": 1,
    } or (
        not again and bodies[0] == {"gather_rows": 1, "gather_rows_weighted": 1, "reduce_rows": 1}
    )


def test_calls_go_into_command_buffers(tmp_path):
    """The handlers say that they launch the same work each time, so XLA may record them."""
    mesh = make_mesh(8)
    layer = Layer(8)
    compiled(
        forward(layer, mesh),
        layer.arguments(mesh),
        xla_gpu_enable_command_buffer="FUSION,CUSTOM_CALL",
        xla_gpu_graph_min_graph_size="1",
        xla_dump_to=str(tmp_path),
    )
    (dump,) = tmp_path.glob("*.thunk_sequence_after_thunk_passes.txt")
    lines = dump.read_text().splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [lines[0]], lines
    assert "kCommandBuffer" in lines[0]
    assert sum(" kCustomCall " in line for line in lines[1:]) == 3


@pytest.mark.parametrize("num_gpus", [8, 64])
def test_memory_is_that_of_the_row_buffers(num_gpus, capsys):
    """Qwen3-30B-A3B's shuffle at 32k tokens per rank. The experts are a stand-in that works in
    place, so one buffer of rows is needed, and two for gradients."""
    mesh = make_mesh(num_gpus)
    table = Table(title=f"GB of temporaries, {num_gpus} GPUs x 32768 tokens, capacity factor 1.25")
    for column in ("", "forward", "forward and backward"):
        table.add_column(column, justify="right")
    found = {}
    for name in ("fused", "xla", "ring"):
        layer = Layer(num_gpus, tokens=32768, implementation=name)
        found[name] = [
            compiled(f(layer, mesh), layer.arguments(mesh)).memory_analysis().temp_size_in_bytes
            for f in (forward, train)
        ]
        table.add_row(name, *(f"{n / 1e9:.2f}" for n in found[name]))
    rows = layer.capacity * layer.features * 2
    table.add_row("rows alone", f"{rows / 1e9:.2f}", f"{2 * rows / 1e9:.2f}")
    with capsys.disabled():
        Console().print(table)
    assert found["xla"][0] <= 2.5 * rows
    assert found["xla"][1] <= 3.5 * rows
    assert rows <= found["fused"][0] <= 1.1 * rows
    assert 2 * rows <= found["fused"][1] <= 1.1 * 2 * rows
