"""A run of several processes: joining them, what they must agree on, and noticing who has gone."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import click
import jax
from jax.experimental import multihost_utils

from jax_fusco.store import Store, job_store

START_SECONDS = 300
_WATCH_SECONDS = 1.0


@dataclass
class Processes:
    """The processes of this run; `index` is this one. A run of one process has no `store`."""

    index: int = 0
    count: int = 1
    heartbeat: int = 0
    store: Store | None = None
    hosts: list[str] = field(default_factory=list)

    @property
    def first(self) -> bool:
        """Whether this process prints, draws and writes what is not a checkpoint."""
        return self.index == 0

    def say(self, text: str) -> None:
        """Prints, in the first process alone."""
        if self.first:
            click.echo(text)

    def share(self, name: str, value: str) -> str:
        """The first process' `value`, in every process; each name once."""
        if self.store is None:
            return value
        return self._exchange(name, value, 0)

    def _exchange(self, name: str, value: str, source: int) -> str:
        assert self.store is not None
        if self.index == source:
            self.store.put(f"moe_lm/{name}", value)
            return value
        got = self.store.get(f"moe_lm/{name}", START_SECONDS)
        if got is None:
            raise click.ClickException(
                f"process {source} did not come to {name!r} within {START_SECONDS} s."
            )
        return got

    @contextlib.contextmanager
    def watching(self, remedy: str) -> Iterator[None]:
        """While open, the loss of any process ends this one with a sentence that names it.

        The coordination service counts a process as lost that sends no heartbeat for `heartbeat`
        seconds; a collective that fails before that waits here to hear who it was. The loss of
        process 0, where that service runs, makes JAX end the others at once, in its own words.
        """
        if self.store is None:
            yield
            return
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(done, remedy), daemon=True)
        watcher.start()
        try:
            yield
            multihost_utils.sync_global_devices("moe_lm: all done")
        except RuntimeError as error:  # JAX's own are
            first_line = str(error).partition("\n")[0]
            click.echo(f"process {self.index}: {first_line}; looking for who is missing", err=True)
            watcher.join(2 * self.heartbeat + 10)
            raise
        finally:
            done.set()
        multihost_utils.sync_global_devices("moe_lm: nobody watches any more")
        self._leave()

    def _leave(self) -> None:
        """Leaves the service before it ends: process 0, where it runs, is the last to go."""
        if not self.first:
            jax.distributed.shutdown()
            return
        while self._missing() != set(range(1, self.count)):
            time.sleep(0.1)

    def _missing(self) -> set[int]:
        """Those who have gone, as soon as everyone else has asked too."""
        try:
            with multihost_utils.live_devices(jax.devices()) as live:
                return set(range(self.count)) - {device.process_index for device in live}
        except multihost_utils.ProcessFailureError as error:
            return {device.process_index for device in error.failed_devices}

    def _watch(self, done: threading.Event, remedy: str) -> None:
        """Ends this process when another has gone."""
        while not done.is_set():
            try:
                missing = self._missing()
            except Exception:
                return  # the service has gone, and JAX says so
            if missing and not done.is_set():
                others = sorted(missing - {self.index})
                names = ", ".join(f"process {i} (on {self.hosts[i]})" for i in others)
                if self.index in missing:
                    names = (
                        f"{names}{' and ' if names else ''}this one (on {self.hosts[self.index]})"
                    )
                _end(
                    f"{names} {'has' if len(missing) == 1 else 'have'} gone: ended, or sent no "
                    f"heartbeat for {self.heartbeat} s. {remedy}"
                )
            time.sleep(_WATCH_SECONDS)


def _end(sentence: str) -> None:
    """Ends the process, whose main thread may wait for something that never comes."""
    print(f"\nError: {sentence}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def join(options: dict[str, Any]) -> Processes:
    """Joins the processes that --coordinator or the environment describe; before JAX's backend.

    Raises:
      click.ClickException: they did not all come, or nothing says who they are.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_recoverability", True)  # who is lost is ours to say
    jax.config.update("jax_enable_preemption_service", False)  # so are SIGTERM's consequences
    where = f"--coordinator: {options['coordinator']}"
    if not options["coordinator"]:
        where = "--distributed: the environment"
    # JAX would end the process with a stack trace.
    late = f"{where} did not bring all processes together within {START_SECONDS} s."
    timer = threading.Timer(START_SECONDS, _end, [late])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            options["coordinator"],
            options["processes"],
            options["process"],
            cluster_detection_method="deactivate" if options["coordinator"] else None,
            initialization_timeout=2 * START_SECONDS,
            heartbeat_timeout_seconds=options["heartbeat"],
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise click.ClickException(
            f"{where} did not bring the processes together: {reason}."
        ) from None
    finally:
        timer.cancel()
    processes = Processes(
        jax.process_index(), jax.process_count(), options["heartbeat"], job_store()
    )
    if processes.store is not None:
        for i in range(processes.count):
            host = processes._exchange(f"host {i}", socket.gethostname(), i)
            processes.hosts.append(host)
        if not processes.first:
            click.echo(
                f"process {processes.index} of {processes.count}; process 0, the leader, is on "
                f"{processes.hosts[0]}",
                err=True,
            )
    return processes
