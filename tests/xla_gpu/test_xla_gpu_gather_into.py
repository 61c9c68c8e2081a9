"""What the real XLA:GPU makes of gathers that fill one array slice by slice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from gpu_programs import compiled, custom_calls, make_mesh, unwanted
from jax import lax
from jax.sharding import NamedSharding

from jax_fusco import ffi
from jax_fusco.mesh import expert_axis


def fill(source_rank, source, slice_of_row, count, x, scale, out, out_scale):
    """Moves the rows of slices 0 to count - 1, known when the program runs, into `out`."""

    def move(i, into):
        here = jnp.where(slice_of_row == i, source, -2)
        return ffi.gather_rows(
            (x, scale),
            source_rank,
            here,
            axis=expert_axis("expert"),
            fanout=1,
            zero_tail=False,
            into=into,
        )

    return lax.fori_loop(0, count[0], move, (out, out_scale))


@pytest.mark.parametrize("num_gpus", [1, 8])
def test_slices_fill_one_array_in_place(num_gpus):
    mesh = make_mesh(num_gpus)

    def array(rows, *row, dtype):
        return jax.ShapeDtypeStruct(
            (num_gpus * rows, *row), dtype, sharding=NamedSharding(mesh, jax.P("expert"))
        )

    ints = [array(640, dtype=jnp.int32)] * 3 + [array(1, dtype=jnp.int32)]
    x = [array(256, 2048, dtype=jnp.bfloat16), array(256, dtype=jnp.float32)]
    out = [array(640, 2048, dtype=jnp.bfloat16), array(640, dtype=jnp.float32)]
    function = jax.shard_map(fill, mesh=mesh, in_specs=jax.P("expert"), out_specs=jax.P("expert"))
    program = compiled(function, (*ints, *x, *out))
    text = program.as_text()
    assert custom_calls(text) == {"gather_rows": 1}
    assert unwanted(text) == []
    assert "output_to_operand_aliasing={{0}: (7, {}), {1}: (8, {})}" in text
    # The loop's buffers are the results, filled from the arguments before it begins.
    entry = text.index("ENTRY ")
    assert " copy(" not in text[:entry]
    assert program.memory_analysis().temp_size_in_bytes < 640 * 2048
