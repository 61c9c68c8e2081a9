"""Starts a process for every case and collects its events."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import jax_fusco
from jax_fusco.bench.cases import Spec

TIMEOUT_S = 900


class CaseFailed(RuntimeError):
    """A case's process ended with an error."""


def run_case(spec: Spec, progress: Callable[[str], None]) -> dict[str, Any]:
    """Runs one case in a process of its own.

    Args:
      spec: what to measure.
      progress: told what happens now.

    Returns:
      The spec, the buffer's capacity, the rows moved, and `ops`: for each operation its timings,
      what every formulation took when tried, and memory.

    Raises:
      CaseFailed: the process failed; the message ends with its last line.
    """
    command = [sys.executable, "-m", "jax_fusco.bench.worker", json.dumps(vars(spec))]
    case: dict[str, Any] = {"spec": dataclasses.asdict(spec), "ops": {}}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            env=_environment(spec.devices),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        killer = threading.Timer(TIMEOUT_S, process.kill)
        killer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                _take(json.loads(line), case, progress)
            code = process.wait()
        finally:
            killer.cancel()
            process.kill()
            process.communicate()
        if code:
            errors.seek(0)
            lines = [line for line in errors.read().splitlines() if line.strip()]
            reason = lines[-1] if lines else "no message"
            raise CaseFailed(f"{spec.title}: the process ended with status {code}: {reason}")
    return case


def _take(event: dict[str, Any], case: dict[str, Any], progress: Callable[[str], None]) -> None:
    kind = event.pop("event")
    if kind == "progress":
        progress(event["text"])
    elif kind == "case":
        case.update(event)
    else:
        case["ops"][event.pop("op")] = event


def _environment(devices: int) -> dict[str, str]:
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    root = str(pathlib.Path(jax_fusco.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "XLA_FLAGS": " ".join(flags),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path,
    }
