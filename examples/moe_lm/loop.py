"""The training loop: batches in order, one line of metrics a step, checkpoints, clean stops."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from .checkpoint import Checkpoints
from .data import Windows
from .training import Trainer

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What a process tells the others by a step's notice: the largest of all counts.
NOTICES = (None, "--max-minutes", *(number.name for number in SIGNALS))


@dataclass(frozen=True)
class LoopConfig:
    """How often what happens. `deadline` is a `time.monotonic()` or None."""

    steps: int
    batch: int
    context: int
    save_every: int
    eval_every: int
    deadline: float | None = None


@dataclass
class Progress:
    """A run's place: the state after `step` updates, and the next window of text to read."""

    state: nnx.State
    step: int
    position: int
    key: np.ndarray


class MetricsLog:
    """One JSON object a line, on disk after each one. `read` leaves out a line cut by a kill."""

    def __init__(self, path: Path, keep_steps: int):
        """Opens `path` to append; lines of steps after `keep_steps` (lost in a kill) go."""
        kept = [line for line in self.read(path) if line["step"] <= keep_steps]
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(scratch, path)
        self._file = path.open("a")

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        lines = []
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines


class StopRequest:
    """Whether Ctrl-C or a polite kill arrived. A second one ends the process."""

    name: str | None = None

    def _handle(self, number: int, _frame: Any) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    @classmethod
    @contextmanager
    def listening(cls) -> Iterator[StopRequest]:
        request = cls()
        before = {number: signal.signal(number, request._handle) for number in SIGNALS}
        try:
            yield request
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train(
    trainer: Trainer,
    progress: Progress,
    windows: Windows,
    validation: list[np.ndarray],
    checkpoints: Checkpoints,
    log: MetricsLog | None,
    config: LoopConfig,
    run_facts: dict[str, Any],
) -> str | None:
    """Advances `progress` to `config.steps` and returns None, or the reason for stopping early.

    The last thing it does is to save a checkpoint. Losses are read one step late, so that the
    devices never wait for this loop and never have more than two steps in hand (jax 0.11 and
    before can hang with tens of them). With them come the other processes' reasons to stop, so that
    all stop after the same step. `log` is None in all processes but the first.
    """
    pending: dict[str, jax.Array] | None = None
    reason = None
    alone = jax.process_count() == 1
    clock = _Clock(config.batch * config.context)
    bar = tqdm(
        total=config.steps,
        initial=progress.step,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10,
        smoothing=0.1,
        disable=log is None,
    )

    def report(step: int, stats: dict[str, jax.Array]) -> str | None:
        values = jax.device_get(stats)
        notice = NOTICES[int(values.pop("notice"))]
        line = _line(step, values, clock.tokens_per_second())
        if log is not None:
            log.write(line)
        bar.update(step - bar.n)
        bar.set_postfix_str(_postfix(line), refresh=False)
        return notice

    def save() -> None:
        checkpoints.save(
            progress.step,
            progress.state,
            {**run_facts, "position": progress.position, "key": progress.key.tolist()},
        )

    def read(start: int, stop: int) -> np.ndarray:
        return windows.batch(progress.position + start, stop - start)

    with bar, StopRequest.listening() as request:
        while progress.step < config.steps and reason is None:
            wish = request.name
            if wish is None and config.deadline is not None and time.monotonic() > config.deadline:
                wish = "--max-minutes"
            if wish and alone:
                reason = wish
                break
            batch = trainer.place(config.batch, read)
            progress.state, stats = trainer.train_step(
                progress.state, batch, progress.key, NOTICES.index(wish)
            )
            if pending is not None:
                reason = report(progress.step, pending)
            pending = stats
            progress.step += 1
            progress.position += config.batch
            last = progress.step == config.steps
            saves = progress.step % config.save_every == 0
            evaluates = last or progress.step % config.eval_every == 0
            if saves or evaluates:
                reason = report(progress.step, pending) or reason
                pending = None
            if evaluates:
                loss = trainer.validation_loss(progress.state, validation)
                if log is not None:
                    log.write({"step": progress.step, "validation_loss": loss})
                    bar.write(f"step {progress.step}: validation loss {loss:.4f} nats a byte")
            if saves:
                save()
            if saves or evaluates:
                clock.restart()
        if pending is not None:
            report(progress.step, pending)
        save()
    return reason if progress.step < config.steps else None


class _Clock:
    """Tokens per second over the last steps, without the time of saving and validating."""

    def __init__(self, tokens_per_step: int):
        self._tokens, self._rate = tokens_per_step, 0.0
        self.restart()

    def restart(self) -> None:
        self._last: float | None = None

    def tokens_per_second(self) -> float:
        now = time.monotonic()
        if self._last is not None:
            rate = self._tokens / (now - self._last)
            self._rate = 0.9 * self._rate + 0.1 * rate if self._rate else rate
        self._last = now
        return self._rate


def _line(step: int, stats: dict[str, Any], tokens_per_second: float) -> dict[str, Any]:
    expert_tokens = np.asarray(stats.pop("expert_tokens"))
    load = expert_tokens.max(axis=1) / np.maximum(1, expert_tokens.mean(axis=1))
    return {
        "step": step,
        **{name: float(value) for name, value in stats.items()},
        "load": float(load.mean()),
        "tokens_per_second": round(tokens_per_second, 1),
        "expert_tokens": expert_tokens.tolist(),
    }


def _postfix(line: dict[str, Any]) -> str:
    return (
        f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s, "
        f"load max/mean {line['load']:.2f}, dropped {line['dropped']:.1%}"
    )
