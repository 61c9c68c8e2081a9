"""Runs one case in this process and prints events as JSON lines; `runner` starts it.

The number of CPU devices is fixed when JAX starts, so every case has a process of its own.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jax_fusco.bench import measure
from jax_fusco.bench.cases import Case, Fusco, Spec
from jax_fusco.bench.check import Oracle
from jax_fusco.bench.limit import CopyLimit
from jax_fusco.bench.rivals import Shuffle, family_of, rivals_for

CLOSE, SLOW_S = 1.15, 0.5
"""A formulation within the factor `CLOSE` of its family's fastest in the first two runs goes into
the final too, unless they take longer than `SLOW_S`."""

MOVES = ("dispatch", "forward", "train")
"""Operations whose time depends on what the rows past the last group hold."""

LIMIT_FROM = 8 << 20
"""Bytes of rows from which copies are a limit; of fewer, what a call takes is."""

ROUNDS = {"train": 3, "layer": 3}
"""Most rounds of the slow operations."""

Event = dict[str, Any]


class Worker:
    """Measures the operations of one case."""

    def __init__(self, case: Case):
        self.case, self.oracle, self.chill = case, Oracle(case), measure.ColdCaches()
        token_bytes = case.x.nbytes
        self.limit = CopyLimit(token_bytes, case.sizes.k)
        self.plans: dict[str, Any] = {}
        self.rows_bytes = token_bytes // case.sizes.tokens * case.sizes.capacity

    def ours(self, op: str) -> list[Shuffle]:
        paddings = ("undefined", "zero") if op in MOVES else ("undefined",)
        name = self.case.spec.implementation
        return [Fusco(self.case.sizes, padding, name) for padding in paddings]

    def plan(self, shuffle: Shuffle) -> Any:
        """The plan of a contestant, made once for all formulations that plan alike."""
        key = type(shuffle).__name__
        if key not in self.plans:
            plan = self.case.function("plan", shuffle)(self.case.ids)
            sizes = self.case.jit(shuffle.group_sizes)(plan)
            self.oracle.groups(shuffle.name, sizes)
            self.plans[key] = plan
        return self.plans[key]

    def run(self, op: str) -> Iterator[Event]:
        """Compiles, checks, picks the finalists, times them in turn, measures memory."""
        shuffles = [*self.ours(op), *rivals_for(op, self.case.sizes)]
        calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
        first: dict[str, float] = {}
        for shuffle in shuffles:
            yield {"event": "progress", "text": f"{op}: {shuffle.name}"}
            step = self.case.function(op, shuffle)
            arguments = self.case.arguments(op, self.plan(shuffle))
            result = jax.block_until_ready(step(*arguments))
            self.oracle.check(op, shuffle, result, self.plan(shuffle))
            output_bytes = measure.num_bytes(result)
            del result
            calls[shuffle.name] = step, arguments
            first[shuffle.name] = min(measure.seconds(step, arguments) for _ in range(2))
        yield {"event": "progress", "text": f"{op}: timing in turn"}
        finalists = _finalists(first)
        contestants = {name: functools.partial(measure.seconds, *calls[name]) for name in finalists}
        if op not in ("plan", "layer") and self.rows_bytes >= LIMIT_FROM:
            contestants["limit"] = functools.partial(self.limit.seconds, op)
            contestants["limit/once"] = functools.partial(self.limit.seconds, op, "once")
        if op == "plan":
            launch = self.case.jit(lambda ids: ids + 1)
            contestants["launch"] = functools.partial(measure.seconds, launch, (self.case.ids,))
        repeats = self.case.spec.repeats
        rounds = min(repeats, ROUNDS.get(op, repeats))
        timings = measure.in_turn(contestants, rounds, self.chill)
        yield {
            "event": "result",
            "op": op,
            "timings": {name: timing.to_json() for name, timing in timings.items()},
            "tried_ms": {name: round(value * 1e3, 3) for name, value in first.items()},
            "memory": self.memory(op, finalists, calls, output_bytes),
        }

    def memory(self, op: str, names: list[str], calls: dict[str, Any], output_bytes: int) -> Event:
        """Peak bytes over those that the operation cannot do without: inputs, outputs, and where
        the experts' rows are made inside, one buffer of them, or two with their gradients."""
        if op in ("plan", "layer"):
            return {}
        inputs = measure.num_bytes(calls[names[0]][1])
        buffers = {"forward": 1, "train": 2}.get(op, 0) * self.rows_bytes
        needed, peaks = inputs + output_bytes + buffers, {}
        for name in names:
            added = measure.added_memory(*calls[name])
            if added is not None:
                peaks[name] = round((inputs + added) / needed, 4)
        return {"needed_bytes": needed, "peak_ratio": peaks}


def _finalists(first: dict[str, float]) -> list[str]:
    """Of each family the fastest, and the next if it is close."""
    chosen: list[str] = []
    for group in dict.fromkeys(map(family_of, first)):
        ranked = sorted((value, name) for name, value in first.items() if family_of(name) == group)
        fastest = ranked[0][0]
        worst = fastest if fastest > SLOW_S else CLOSE * fastest
        chosen += [name for value, name in ranked[:2] if value <= worst]
    return chosen


def events(spec: Spec) -> Iterator[Event]:
    yield {"event": "progress", "text": "data"}
    worker = Worker(Case(spec))
    yield {"event": "case", "capacity": worker.case.sizes.capacity, "rows": worker.case.kept}
    for op in spec.ops:
        yield from worker.run(op)
    worker.limit.close()


def main() -> None:
    """Reads a spec as JSON from the first argument."""
    asked = json.loads(sys.argv[1])
    for event in events(Spec(**{**asked, "ops": tuple(asked["ops"])})):
        print(json.dumps(event), flush=True)


if __name__ == "__main__":
    main()
