"""Which cases a run of the benchmark measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax_fusco.bench.cases import OPS, Spec
from jax_fusco.bench.routing import ROUTINGS
from jax_fusco.bench.shapes import SHAPES

DEVICES = (4, 8)
LARGE = ("qwen3-30b-a3b", "deepseek-v3")
MOVES = ("dispatch", "combine", "forward")


def default_cases() -> list[Spec]:
    """All moves of two models on 4 and 8 devices; the layer, skewed routings, decoding and other
    models in part."""
    moves = tuple(op for op in OPS if op != "layer")
    cases = [
        Spec(name, devices, _tokens(name, devices), "uniform", moves)
        for name in LARGE
        for devices in DEVICES
    ]
    cases[0] = dataclasses.replace(cases[0], ops=tuple(OPS))
    cases.append(Spec("qwen3-30b-a3b", 4, 2048, "zipf", ("dispatch", "forward"), 5))
    cases.append(Spec("qwen3-30b-a3b", 4, 512, "one-rank", ("dispatch", "forward"), 5))
    decoding = ("plan", *MOVES)
    cases += [Spec("qwen3-30b-a3b", 4, tokens, "uniform", decoding, 25) for tokens in (1, 8)]
    cases += [
        Spec(name, 4, _tokens(name, 4), "uniform", ("forward",), 5)
        for name in ("mixtral-8x7b", "gpt-oss-120b")
    ]
    return cases


def quick_cases() -> list[Spec]:
    """One model on 4 devices with few tokens."""
    return [Spec("qwen3-30b-a3b", 4, 512, "uniform", ("plan", *MOVES, "train"), 3)]


def chosen_cases(
    shapes: Sequence[str],
    devices: Sequence[int],
    routings: Sequence[str],
    ops: Sequence[str],
    tokens: Sequence[int],
) -> list[Spec]:
    """Every combination of what is named; what is not named has one value.

    Raises:
      ValueError: a name that does not exist, or a number that does not fit, in one sentence.
    """
    for option, names, known in (
        ("--shape", shapes, SHAPES),
        ("--routing", routings, ROUTINGS),
        ("--op", ops, OPS),
    ):
        for name in names:
            if name not in known:
                raise ValueError(f"{option}: got {name!r}, need one of {', '.join(known)}")
    cases = []
    for name in shapes or LARGE[:1]:
        for count in devices or DEVICES[:1]:
            if count < 1 or SHAPES[name].experts % count:
                raise ValueError(
                    f"--devices: got {count}, need a divisor of the {SHAPES[name].experts} "
                    f"experts of {name}"
                )
            for routing in routings or ("uniform",):
                for number in tokens or (_tokens(name, count),):
                    if number < 1:
                        raise ValueError(f"--tokens: got {number}, need at least 1 token a device")
                    cases.append(Spec(name, count, number, routing, tuple(ops or OPS)))
    return cases


def _tokens(shape: str, devices: int) -> int:
    return max(1, SHAPES[shape].tokens // devices)
