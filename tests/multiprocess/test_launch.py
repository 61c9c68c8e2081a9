"""The helper that the tests of several processes start them with."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import Done, Job, environment

_SLEEP = "import time; print('asleep', flush=True); time.sleep(600)"
# A process that starts another, says its number, and waits.
_PARENT = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(600)\n"
)


def _gone(pid: int) -> bool:
    """Whether a process has ended within ten seconds; one that nobody has waited for yet counts."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_collects_output_and_exit_status(tmp_path):
    code = "import sys; print('out', sys.argv[1]); print('err', file=sys.stderr)"
    with Job([["-c", code, "a"], ["-c", code, "b"]], folder=tmp_path) as job:
        done = job.wait(timeout=60)
    assert [(d.returncode, d.stdout, d.stderr) for d in done] == [
        (0, "out a\n", "err\n"),
        (0, "out b\n", "err\n"),
    ]
    assert all(isinstance(d, Done) and 0 < d.seconds < 60 for d in done)


def test_a_failure_shows_every_tail_and_ends_the_others(tmp_path):
    fail = "import sys; print('x' * 5000); sys.exit('the reason')"
    with (
        pytest.raises(AssertionError) as raised,
        Job([["-c", _SLEEP], ["-c", fail]], folder=tmp_path) as job,
    ):
        job.wait(timeout=60)
    message = str(raised.value)
    assert message.startswith("process 1 failed\n---- process 0: was still running\n")
    assert "-- stdout:\nasleep\n" in message
    assert "---- process 1: exit status 1\n" in message
    assert message.endswith("-- stderr:\nthe reason")
    assert len(message) < 4000
    assert [process.returncode for process in job.processes] == [-signal.SIGKILL, 1]


def test_time_is_limited(tmp_path):
    start = time.monotonic()
    with (
        pytest.raises(AssertionError, match=r"^processes \[0\] did not end within 0.5 s"),
        Job([["-c", _SLEEP]], folder=tmp_path) as job,
    ):
        job.wait(timeout=0.5)
    assert time.monotonic() - start < 20
    assert _gone(job.processes[0].pid)


def test_what_a_process_started_ends_with_it(tmp_path):
    job = Job([["-c", _PARENT]], folder=tmp_path)
    with contextlib.suppress(KeyboardInterrupt), job:
        job.until(lambda: job.stdout(0).endswith("\n"), timeout=60)
        raise KeyboardInterrupt
    assert _gone(job.processes[0].pid)
    assert _gone(int(job.stdout(0)))


def test_waiting_for_a_condition_ends_with_a_process(tmp_path):
    with (
        pytest.raises(AssertionError, match=r"^a process ended too early"),
        Job([["-c", "pass"]], folder=tmp_path) as job,
    ):
        job.until(lambda: False, timeout=60)


def test_processes_end_with_a_killed_parent(tmp_path):
    code = (
        "import pathlib, sys, time\n"
        "from launch import Job\n"
        f"with Job([['-c', {_SLEEP!r}]], folder=pathlib.Path(sys.argv[1])) as job:\n"
        "    job.until(lambda: job.stdout(0), timeout=60)\n"
        "    print(job.processes[0].pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(parent.pid, signal.SIGKILL)
    assert _gone(pid)
