"""examples/train_moe_lm.py as a job of two processes: interrupted, killed, and gone on with."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from example_run import SCRIPT, STEPS, TINY, losses, metrics, write_text
from launch import Done, Job, environment, free_port

from jax_fusco.cli import main as jax_fusco_command

# A busy machine may starve a process for many seconds, so only the run that is killed is impatient.
PATIENT, HEARTBEAT = 200, 20
OPTIONS = [*TINY, "--topology=2x2", "--save-every=10"]
# Most of the time goes into compiling.
ENVIRONMENT = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def arguments(text: Path, output: Path, *more: str) -> list[str]:
    return [
        *(str(SCRIPT), f"--data={text}", f"--output={output}", *OPTIONS),
        *(f"--save-routing={output / 'routing.npz'}", *more),
    ]


@contextlib.contextmanager
def two_processes(text: Path, output: Path, logs: Path, heartbeat: int = PATIENT) -> Iterator[Job]:
    with free_port() as port:
        place = f"--coordinator=localhost:{port}", "--processes=2", f"--heartbeat={heartbeat}"
        each = [arguments(text, output, *place, f"--process={i}") for i in range(2)]
        with Job(each, folder=logs, env=environment(**ENVIRONMENT)) as job:
            yield job


def interrupt(job: Job, output: Path, step: int, victim: int, number: int) -> list[Done]:
    """Sends a process a signal once a step is done, and waits for everyone's end."""
    job.until(lambda: steps_done(output) >= step, timeout=400)
    job.processes[victim].send_signal(number)
    return job.wait(timeout=500, check=False)


def steps_done(output: Path) -> int:
    log = output / "metrics.jsonl"
    return len(losses(output)) if log.exists() and log.read_text().endswith("\n") else 0


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the same topology in one process, which nothing interrupts."""
    output = tmp_path_factory.mktemp("alone")
    printed = run_alone(arguments(text, output))
    assert "mesh: data 1 x node 2 x expert 2" in printed
    return output


def run_alone(arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment(**ENVIRONMENT),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(1200)
def test_two_processes_train_like_one_through_a_stop_and_a_kill(
    text: Path, alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"

    # A polite signal to one of them: both end after the same step, which is saved.
    with two_processes(text, output, tmp_path / "stopped") as job:
        stopped = interrupt(job, output, 5, 1, signal.SIGTERM)
    assert [done.returncode for done in stopped] == [143, 143], stopped
    step = len(losses(output))
    assert f"Stopped by SIGTERM at step {step} of {STEPS}" in stopped[0].stdout
    assert (output / "checkpoints" / str(step)).is_dir()
    assert "text:" not in stopped[1].stdout
    assert "process 1 of 2; process 0, the leader, is on " in stopped[1].stderr

    # A kill: the other says who is missing, within its timeout.
    with two_processes(text, output, tmp_path / "killed", HEARTBEAT) as job:
        killed = interrupt(job, output, max(step + 3, 23), 1, signal.SIGKILL)
    assert [done.returncode for done in killed] == [1, -signal.SIGKILL], killed
    assert killed[0].seconds - killed[1].seconds < 3 * HEARTBEAT
    assert f"resuming from step {step} of {STEPS}" in killed[0].stdout
    last_line = killed[0].stderr.splitlines()[-1]
    assert last_line.startswith("Error: process 1 (on ")
    assert f"has gone: ended, or sent no heartbeat for {HEARTBEAT} s. Start all" in last_line
    assert steps_done(output) < STEPS

    # All again: it goes on to the end.
    with two_processes(text, output, tmp_path / "finished") as job:
        finished = job.wait(timeout=500)
    assert "resuming from step" in finished[0].stdout
    assert "Error" not in finished[0].stderr + finished[1].stderr
    np.testing.assert_allclose(losses(output), losses(alone), rtol=1e-4)
    np.testing.assert_allclose(losses(output)[:5], losses(alone)[:5], rtol=1e-6)
    assert [line["step"] for line in metrics(output)] == [line["step"] for line in metrics(alone)]
    assert (output / "sample.txt").exists()
    ours, theirs = np.load(output / "routing.npz"), np.load(alone / "routing.npz")
    assert ours["expert_ids"].shape == (4, 64, 2)
    assert (ours["expert_ids"] == theirs["expert_ids"]).mean() > 0.99

    # One process, with another mesh, goes on from what two have saved.
    sample = (output / "sample.txt").read_text()
    again = run_alone([str(SCRIPT), f"--data={text}", f"--output={output}", *TINY])
    assert f"resuming from step {STEPS} of {STEPS}" in again
    assert "mesh: data 1 x expert 4" in again
    assert (output / "sample.txt").read_text() == sample


def test_a_saved_routing_is_what_the_ledger_reads(alone: Path) -> None:
    file = str(alone / "routing.npz")
    counted = CliRunner().invoke(
        jax_fusco_command, ["ledger", file, "--ranks-per-node=2", "--row-bytes=128"]
    )
    assert counted.exit_code == 0, counted.output
    assert "2 nodes of 2 ranks, 64 tokens per rank, rows of 128 bytes: 512 assig" in counted.output
    with np.load(file, allow_pickle=False) as routing:
        assert sorted(routing) == ["expert_ids", "layer", "num_experts", "step"]
        assert [int(routing[name]) for name in ("layer", "num_experts", "step")] == [0, 8, STEPS]
        assert routing["expert_ids"].dtype == np.int32
    assert sorted(path.name for path in alone.glob("routing*")) == ["routing.npz"]


_MEMBER = """
import os, signal, sys, time
import jax
sys.path.insert(0, sys.argv[1])
from moe_lm.processes import join

index, port, killed = int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
processes = join(
    {"coordinator": f"localhost:{port}", "processes": 2, "process": index, "heartbeat": 60}
)
with processes.watching("Start again."):
    assert processes.share("word", f"from {index}") == "from 0"
    processes.say("there")
    if killed == str(index):
        os.kill(os.getpid(), signal.SIGKILL)
    if killed != "nobody":
        time.sleep(100)
"""


@pytest.mark.parametrize("killed", ["nobody", "0"])
def test_leaving_and_losing_the_leader(tmp_path: Path, killed: str) -> None:
    with free_port() as port:
        each = [["-c", _MEMBER, str(SCRIPT.parent), str(i), str(port), killed] for i in range(2)]
        with Job(each, folder=tmp_path, env=environment()) as job:
            done = job.wait(timeout=90, check=False)
    assert "there" in done[0].stdout
    assert "process 1 of 2; process 0, the leader, is on " in done[1].stderr
    codes = [process.returncode for process in done]
    if killed == "nobody":
        assert codes == [0, 0], done
        assert "there" not in done[1].stdout
        assert "rror" not in done[1].stderr
    else:
        assert codes == [-signal.SIGKILL, -signal.SIGABRT], done
        assert "the leader task" in done[1].stderr.lower()
        assert done[1].seconds - done[0].seconds < 20
