"""Bytes over links that are shared max-min fairly, as processes of SimPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import simpy

Array = np.ndarray
_DONE = 1e-9  # of a transfer's bytes: rounding, not work


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Alike flows: how many of them share one link of each class `[links]`, and bytes of each."""

    usage: Array
    size: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of every GPU: messages to peers in turn, each a latency, then the bytes."""

    name: str
    transfers: tuple[Transfer, ...]
    latency: float = 0.0


@dataclasses.dataclass(frozen=True)
class Chain:
    """Stages through which slices follow each other: slice i + 1 is a stage behind slice i."""

    stages: tuple[Stage, ...]
    slices: int = 1


def max_min_rates(usage: Array, capacity: Array) -> Array:
    """Max-min fair rates of classes of flows, by progressive filling (Bertsekas and Gallager).

    Args:
      usage: `[F, C]`, flows of class f that share one link of class c.
      capacity: `[C]`, of one link of each class.

    Returns:
      `[F]`, the rate of each flow: all rise together, and stop at the first of their links that is
      full. A flow that uses no link has an infinite rate.
    """
    rates = np.zeros(len(usage))
    left = capacity.astype(float)
    rising = usage.any(1)
    rates[~rising] = np.inf
    while rising.any():
        load = usage[rising].sum(0)
        room = np.divide(left, load, out=np.full(len(left), np.inf), where=load > 0)
        step = room.min()
        rates[rising] += step
        left = left - step * load
        full = room <= step * (1 + 1e-12)
        rising &= ~(usage[:, full] > 0).any(1)
    return rates


class Network:
    """Transfers in flight; rates change whenever one starts or ends."""

    def __init__(self, env: simpy.Environment, capacity: Array) -> None:
        self._env, self._capacity = env, capacity
        self._flying: dict[simpy.Event, list[Any]] = {}  # event -> [transfer, bytes left, rate]
        self._since, self._version = 0.0, 0

    def send(self, transfer: Transfer) -> simpy.Event:
        """An event that happens once the transfer has arrived."""
        event = self._env.event()
        if transfer.size <= 0 or not transfer.usage.any():
            return event.succeed()
        self._progress()
        self._flying[event] = [transfer, transfer.size, 0.0]
        self._share()
        return event

    def _progress(self) -> None:
        passed, self._since = self._env.now - self._since, self._env.now
        for flight in self._flying.values():
            flight[1] -= flight[2] * passed

    def _share(self) -> None:
        self._version += 1
        if not self._flying:
            return
        flights = list(self._flying.values())
        rates = max_min_rates(np.stack([f[0].usage for f in flights]), self._capacity)
        for flight, rate in zip(flights, rates, strict=True):
            flight[2] = rate
        times = [max(0.0, flight[1]) / flight[2] for flight in flights]
        after = min(times)
        first = {e for e, time in zip(self._flying, times, strict=True) if time == after}
        self._env.process(self._land(after, first, self._version))

    def _land(
        self, after: float, first: set[simpy.Event], version: int
    ) -> Generator[simpy.Event, None, None]:
        yield self._env.timeout(after)
        if version != self._version:
            return
        self._progress()
        # The first have arrived whatever is left of them: late in the day the clock cannot move by
        # times as short as theirs.
        arrived = [e for e, f in self._flying.items() if e in first or f[1] <= _DONE * f[0].size]
        for event in arrived:
            del self._flying[event]
            event.succeed()
        self._share()


def duration(phases: Sequence[Sequence[Chain]], capacity: Array) -> float:
    """Seconds of phases that follow each other, the chains of each side by side."""
    env = simpy.Environment()
    network = Network(env, capacity)

    def step(stage: Stage, slices: int, wait: list[simpy.Event]) -> Generator[Any, Any, None]:
        yield env.all_of(wait)
        if stage.latency:
            yield env.timeout(stage.latency)
        parts = [Transfer(t.usage, t.size / slices) for t in stage.transfers]
        yield env.all_of([network.send(part) for part in parts])

    def every() -> Generator[Any, Any, None]:
        for phase in phases:
            ends = []
            for chain in phase:
                last: list[simpy.Event | None] = [None] * len(chain.stages)
                for _ in range(chain.slices):
                    for at, stage in enumerate(chain.stages):
                        wait = [e for e in (last[at], last[at - 1] if at else None) if e]
                        last[at] = env.process(step(stage, chain.slices, wait))
                ends.append(last[-1])
            yield env.all_of(ends)

    env.run(env.process(every()))
    return float(env.now)
