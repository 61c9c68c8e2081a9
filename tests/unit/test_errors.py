"""Every argument error: its type, and its message to the letter."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import P, make_mesh, sharded

import jax_fusco as jf

RANKS = 4
IDS = jnp.zeros((6, 2), jnp.int32)
X = jnp.zeros((6, 5))
NEED_X = "need 6 rows in its first dimension, one for each token of expert_ids"
NEED = "need one or more distinct mesh axes"


def under_shard_map(function):
    """Traces `function()` on every rank of a mesh; nothing is compiled."""

    def local(_):
        function()
        return jnp.zeros(1)

    spec = P("expert")
    run = sharded(local, make_mesh(RANKS), in_specs=spec, out_specs=spec)
    jax.eval_shape(run, jax.ShapeDtypeStruct((RANKS,), jnp.float32))


def said(caught):
    """The message without the lines that JAX appends to errors that pass through it."""
    return str(caught.value).partition("\n")[0]


def raises(error, message, function):
    with pytest.raises(error) as caught:
        under_shard_map(function)
    assert said(caught) == message


def plan(expert_ids=IDS, **changes):
    arguments = {"axis_name": "expert", "num_experts": 8} | changes
    return jf.make_plan(expert_ids, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"expert_ids": "ids"}, TypeError, "expert_ids: got str, need an array"),
        ({"expert_ids": None}, TypeError, "expert_ids: got NoneType, need an array"),
        (
            {"expert_ids": jnp.zeros((6, 2))},
            TypeError,
            "expert_ids: got dtype float32, need int32",
        ),
        (
            {"expert_ids": np.zeros((6, 2), np.int16)},
            TypeError,
            "expert_ids: got dtype int16, need int32",
        ),
        (
            {"expert_ids": jnp.zeros(6, jnp.int32)},
            ValueError,
            "expert_ids: got shape (6,), need [tokens, experts per token]",
        ),
        (
            {"expert_ids": jnp.zeros((2, 3, 4), jnp.int32)},
            ValueError,
            "expert_ids: got shape (2, 3, 4), need [tokens, experts per token]",
        ),
        (
            {"axis_name": "nowhere"},
            ValueError,
            "axis_name: got 'nowhere', need a mesh axis that is bound by an enclosing "
            "jax.shard_map (bound here: expert)",
        ),
        (
            {"axis_name": ("expert", "nowhere")},
            ValueError,
            "axis_name: got 'nowhere', need a mesh axis that is bound by an enclosing "
            "jax.shard_map (bound here: expert)",
        ),
        ({"axis_name": ()}, ValueError, f"axis_name: got (), {NEED}"),
        (
            {"axis_name": ("expert", "expert")},
            ValueError,
            f"axis_name: got ('expert', 'expert'), {NEED}",
        ),
        (
            {"axis_name": 3},
            TypeError,
            "axis_name: got 3, need a mesh axis name, a tuple of them, or None",
        ),
        (
            {"num_experts": 6},
            ValueError,
            "num_experts: got 6, need a multiple of the number of ranks (4)",
        ),
        ({"num_experts": 0}, ValueError, "num_experts: got 0, need an integer of at least 1"),
        ({"num_experts": 8.0}, TypeError, "num_experts: got 8.0, need an integer of at least 1"),
        ({"capacity": -1}, ValueError, "capacity: got -1, need an integer of at least 0"),
        ({"capacity": 1.5}, TypeError, "capacity: got 1.5, need an integer of at least 0"),
        ({"capacity": True}, TypeError, "capacity: got True, need an integer of at least 0"),
        (
            {"capacity": 2**31},
            ValueError,
            "capacity: got 2147483648 rows, need fewer than 2**31; pass a smaller capacity",
        ),
        ({"alignment": 0}, ValueError, "alignment: got 0, need an integer of at least 1"),
        (
            {"alignment": 2**31},
            ValueError,
            "alignment: got 2147483648, need fewer than 2**31 rows",
        ),
        ({"alignment": "8"}, TypeError, "alignment: got '8', need an integer of at least 1"),
        (
            {"topology": "node"},
            TypeError,
            "topology: got str, need a jax_fusco.Topology",
        ),
        (
            {"topology": jf.Topology("node", "expert")},
            ValueError,
            "axis_name: got ('expert',), need ('node', 'expert') for this topology",
        ),
        (
            {"topology": jf.Topology(None, "expert", 3)},
            ValueError,
            "ranks_per_node: got 3, need a divisor of the 4 ranks along 'expert'",
        ),
        (
            {"placement": 1},
            TypeError,
            "placement: got int, need a jax_fusco.Placement or None",
        ),
        (
            {"placement": jf.Placement.identity(8, 4, num_layers=2)},
            ValueError,
            "placement: got one for 2 layers, need that of one layer",
        ),
        (
            {"placement": jf.Placement.identity(8, 2)},
            ValueError,
            "placement: got one for 2 ranks, need one for the 4 ranks here",
        ),
        (
            {"placement": jf.Placement.identity(16, 4)},
            ValueError,
            "num_experts: got 8, need 16, the experts of the placement",
        ),
        (
            {"placement": jf.Placement(np.arange(2, dtype=np.int32), 8, 4, 4)},
            ValueError,
            "placement: got 2 slots, need those of all 4 ranks (into shard_map by PartitionSpec())",
        ),
        (
            {"implementation": "cuda"},
            ValueError,
            "implementation: got 'cuda', need 'xla', 'fused', or None",
        ),
        (
            {"implementation": ("fastest", "xla")},
            ValueError,
            "implementation: got 'fastest', need 'xla', 'fused', or None",
        ),
        (
            {"implementation": 3},
            ValueError,
            "implementation: got 3, need 'xla', 'fused', or None",
        ),
        (
            {"implementation": {}},
            ValueError,
            "implementation: got {}, need 'xla', 'fused', or None",
        ),
        (
            {"implementation": ()},
            ValueError,
            "implementation: got (), need one or more of 'xla', 'fused'",
        ),
    ],
)
def test_make_plan(changes, error, message):
    raises(error, message, lambda: plan(**changes))


def test_an_axis_without_shard_map():
    message = (
        "axis_name: got 'expert', need a mesh axis that is bound by an enclosing jax.shard_map "
        "(bound here: none)"
    )
    with pytest.raises(ValueError, match="axis_name") as caught:
        plan()
    assert said(caught) == message


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            jnp.zeros((5, 3)),
            ValueError,
            f"x: got shape (5, 3), {NEED_X}",
        ),
        (
            jnp.zeros(()),
            ValueError,
            f"x: got shape (), {NEED_X}",
        ),
        (
            {"a": X, "b": X[:2]},
            ValueError,
            f"x: got shape (2, 5), {NEED_X}",
        ),
        ("rows", TypeError, "x: got str, need an array"),
        (
            jnp.zeros((6, 2), jnp.int4),
            TypeError,
            "x: got dtype int4, need one of 8, 16, 32 or 64 bits",
        ),
        (
            jax.random.key(0),
            TypeError,
            "x: got dtype key<fry>, need one of 8, 16, 32 or 64 bits",
        ),
    ],
)
def test_dispatch_x(x, error, message):
    raises(error, message, lambda: jf.dispatch(x, plan()))


def test_dispatch_other_arguments():
    for other, got in (((1, 2), "tuple"), (X, "an array")):
        message = f"plan: got {got}, need the jax_fusco.Plan that make_plan returned"
        raises(TypeError, message, lambda: jf.dispatch(X, other))  # noqa: B023
    raises(
        ValueError,
        "padding: got 'nan', need 'zero' or 'undefined'",
        lambda: jf.dispatch(X, plan(), padding="nan"),
    )
    with jax.enable_x64(True):
        raises(
            TypeError,
            "x: got dtype complex128, need one of 8, 16, 32 or 64 bits",
            lambda: jf.dispatch(jnp.zeros((6, 2), jnp.complex128), plan()),
        )


ROWS = 4 * 6 * 2


@pytest.mark.parametrize(
    ("y", "weights", "out_dtype", "error", "message"),
    [
        (
            jnp.zeros((ROWS, 3), jnp.int32),
            None,
            None,
            TypeError,
            "y: got dtype int32, need a floating dtype",
        ),
        (
            jnp.zeros((ROWS, 3), jnp.complex64),
            None,
            None,
            TypeError,
            "y: got dtype complex64, need a floating dtype",
        ),
        (
            jnp.zeros((ROWS - 1, 3)),
            None,
            None,
            ValueError,
            f"y: got shape ({ROWS - 1}, 3), need {ROWS} rows in its first dimension, one for "
            "each row that dispatch gave",
        ),
        (
            jnp.zeros((ROWS, 3)),
            jnp.zeros((6, 3)),
            None,
            ValueError,
            "weights: got shape (6, 3), need (6, 2)",
        ),
        (
            jnp.zeros((ROWS, 3)),
            jnp.zeros((6, 2), jnp.int32),
            None,
            TypeError,
            "weights: got dtype int32, need a floating dtype",
        ),
        (
            jnp.zeros((ROWS, 3)),
            None,
            jnp.int8,
            TypeError,
            "out_dtype: got dtype int8, need a floating dtype",
        ),
        (
            jnp.zeros((ROWS, 3)),
            None,
            "flaot",
            TypeError,
            "out_dtype: got 'flaot', need a dtype",
        ),
    ],
)
def test_combine(y, weights, out_dtype, error, message):
    raises(error, message, lambda: jf.combine(y, weights, plan(), out_dtype=out_dtype))


def test_a_plan_of_another_mesh():
    made = []
    under_shard_map(lambda: made.append(plan()))

    def elsewhere(_):
        jf.dispatch(X, made[0])
        return jnp.zeros(1)

    run = sharded(elsewhere, make_mesh(2), in_specs=P("expert"), out_specs=P("expert"))
    message = "plan: got one for 4 ranks, need one for the 2 ranks here"
    with pytest.raises(ValueError, match="plan") as caught:
        jax.eval_shape(run, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert said(caught) == message


TABLE = jnp.zeros(4, jnp.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"operand": jnp.zeros(())},
            ValueError,
            "operand: got shape (), need rows along a leading dimension",
        ),
        (
            {"output": jnp.zeros((7, 4))},
            ValueError,
            "output: got float32[7, 4], need rows like operand's (float32[6, 3])",
        ),
        (
            {"output": jnp.zeros((7, 3), jnp.int32)},
            ValueError,
            "output: got int32[7, 3], need rows like operand's (float32[6, 3])",
        ),
        (
            {"input_offsets": jnp.zeros(4)},
            TypeError,
            "input_offsets: got dtype float32, need an integer dtype",
        ),
        (
            {"send_sizes": jnp.zeros(5, jnp.int32)},
            ValueError,
            "send_sizes: got shape (5,), need one dimension, a multiple of 4 ranks",
        ),
        (
            {"output_offsets": jnp.zeros((4, 1), jnp.int32)},
            ValueError,
            "output_offsets: got shape (4, 1), need one dimension, a multiple of 4 ranks",
        ),
        (
            {"recv_sizes": jnp.zeros(8, jnp.int32)},
            ValueError,
            "recv_sizes: got shape (8,), need (4,)",
        ),
        (
            {"axis_index_groups": [[0, 1], [2]]},
            ValueError,
            "axis_index_groups: got [[0, 1], [2]], need equally long lists that hold each of the "
            "4 axis indices once",
        ),
        (
            {"axis_index_groups": [[0, 1], [2, 2]]},
            ValueError,
            "axis_index_groups: got [[0, 1], [2, 2]], need equally long lists that hold each of "
            "the 4 axis indices once",
        ),
        (
            {"axis_index_groups": []},
            ValueError,
            "axis_index_groups: got [], need equally long lists that hold each of the 4 axis "
            "indices once",
        ),
        (
            {"axis_index_groups": 3},
            TypeError,
            "axis_index_groups: got 3, need lists of axis indices, or None",
        ),
        (
            {"implementation": "ring"},
            ValueError,
            "implementation: got 'ring', need 'xla', 'fused', or None",
        ),
    ],
)
def test_ragged_all_to_all(changes, error, message):
    tables = ("input_offsets", "send_sizes", "output_offsets", "recv_sizes")
    arguments = {"operand": jnp.zeros((6, 3)), "output": jnp.zeros((7, 3))}
    arguments |= dict.fromkeys(tables, TABLE) | {"axis_name": "expert"} | changes
    raises(error, message, lambda: jf.ragged_all_to_all(**arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 2, 8, 4), ValueError, "tokens_per_rank: got -1, need an integer of at least 0"),
        ((1.0, 2, 8, 4), TypeError, "tokens_per_rank: got 1.0, need an integer of at least 0"),
        ((6, -2, 8, 4), ValueError, "k: got -2, need an integer of at least 0"),
        ((6, 2, 8, 0), ValueError, "num_ranks: got 0, need an integer of at least 1"),
        (
            (6, 2, 8, 3),
            ValueError,
            "num_experts: got 8, need a multiple of the number of ranks (3)",
        ),
        (
            (6, 2, 8, 4, -1.0),
            ValueError,
            "factor: got -1.0, need a finite number above 0",
        ),
        ((6, 2, 8, 4, 0), ValueError, "factor: got 0, need a finite number above 0"),
        (
            (6, 2, 8, 4, float("inf")),
            ValueError,
            "factor: got inf, need a finite number above 0",
        ),
        ((6, 2, 8, 4, 1.0, 0), ValueError, "alignment: got 0, need an integer of at least 1"),
    ],
)
def test_capacity(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        jf.capacity(*arguments)


def test_every_message_is_one_sentence_without_a_stop():
    """The same shape everywhere: `argument: got <value>, need <need>`."""
    with pytest.raises(ValueError, match="alignment") as caught:
        jf.make_plan(IDS, axis_name=None, num_experts=8, alignment=-3)
    assert re.fullmatch(r"\w+: got .+, need .+[^.]", str(caught.value))
