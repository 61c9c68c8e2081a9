"""examples/launch: what the scripts start and end, with commands in the place of ssh and srun."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launch import Job, environment

SCRIPTS = Path(__file__).parents[2] / "examples" / "launch"
# What ssh does: runs a line in a shell on a host.
_SSH = '#!/bin/bash\necho "$1" >>hosts\nexec bash -c "$2"\n'
_SHOW = 'printf "<%s>" "$@"; echo; cat'  # and nothing to read
_WAIT = """
trap 'echo stopped; exit 143' TERM
echo waiting
while :; do sleep 0.05; done
"""
_FAIL = """
echo "the last words of $*"
[[ "${@: -1}" == 0 ]]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (
        ("ssh", _SSH),
        *((n, f"#!/bin/bash\n{t}") for n, t in (("show", _SHOW), ("wait", _WAIT), ("fail", _FAIL))),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ssh(*arguments: str) -> list[str]:
    return [str(SCRIPTS / "ssh.sh"), *arguments]


def settings(folder: Path) -> dict[str, str]:
    return environment(
        SSH=str(folder / "ssh"), LOGS=str(folder / "logs"), PORT="1234", TMPDIR=str(folder)
    )


def finished(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ssh(*arguments),
        env=settings(folder),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def test_ssh_starts_a_process_on_each_host(folder: Path) -> None:
    done = finished(folder, "me@a,b", "./show", "x y", "$z'")
    assert (done.returncode, done.stderr) == (0, "")
    place = "<--coordinator><a:1234><--processes><2><--process>"
    assert done.stdout == f"<x y><$z'>{place}<0>\n"
    assert (folder / "logs" / "process-1.log").read_text() == f"<x y><$z'>{place}<1>\n"
    assert sorted((folder / "hosts").read_text().split()) == ["b", "me@a"]


def test_ssh_says_who_failed(folder: Path) -> None:
    done = finished(folder, "a,b", "./fail")
    assert done.returncode == 1
    assert "ssh.sh: process 1 on b ended with status 1\nthe last words of " in done.stderr


@pytest.mark.parametrize("arguments", [(), ("a",), ("", "x"), ("a,,b", "x"), ("a,-o", "x")])
def test_ssh_wants_hosts_and_a_command(folder: Path, arguments: tuple[str, ...]) -> None:
    done = finished(folder, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    assert not (folder / "hosts").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_ssh_stops_all(folder: Path, number: signal.Signals) -> None:
    log = folder / "logs" / "process-1.log"
    with Job(
        [ssh("a,b", "./wait")], folder=folder / "job", env=settings(folder), program="/bin/bash"
    ) as job:
        job.until(lambda: "waiting" in job.stdout(0) and log.exists() and log.read_text(), 60)
        job.processes[0].send_signal(number)
        (done,) = job.wait(60, check=False)
        if number != signal.SIGKILL:
            assert done.returncode == 143
            assert "process 0 on a ended with status 143" in done.stderr
        deadline = time.monotonic() + 30
        while "stopped" not in job.stdout(0) or log.read_text() != "waiting\nstopped\n":
            assert time.monotonic() < deadline, (job.stdout(0), log.read_text())
            time.sleep(0.02)


def test_slurm_starts_one_process_a_node(folder: Path) -> None:
    (folder / "srun").symlink_to(folder / "show")
    done = subprocess.run(
        [str(SCRIPTS / "slurm.sh"), "--output", "/shared/run"],
        env=environment(
            PATH=f"{folder}:{os.environ['PATH']}", SLURM_NNODES="3", RANKS="8", PYTHON="python"
        ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == (
        "<--kill-on-bad-exit=0><--wait=60><--label><python><examples/train_moe_lm.py>"
        "<--distributed><--topology><3x8><--max-minutes><0><--output></shared/run>\n"
    )
