"""Tests that run in two processes."""

from __future__ import annotations

import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

from helpers import run_python


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run_pair(code: str) -> list[subprocess.CompletedProcess[str]]:
    """Runs code in two processes of four CPU devices, with their number and a port as arguments."""
    port = str(free_port())
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    with ThreadPoolExecutor(2) as pool:
        done = list(
            pool.map(
                lambda process: run_python(
                    code, arguments=[str(process), port], env=env, timeout=200
                ),
                range(2),
            )
        )
    for process in done:
        assert process.returncode == 0, process.stderr
    return done
