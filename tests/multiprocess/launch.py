"""Jobs of several Python processes on this machine, for tests; none outlives its `with` block.

    with Job([["-c", code, str(i)] for i in range(2)], folder=tmp_path) as job:
        done = job.wait(timeout=100)

`run` does this for code that joins its job by `join`. A process is ended with all that it started:
each leads a process group of its own, which the block kills however it is left, and the kernel
kills a process whose parent (pytest) is killed itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

_TAIL = 3000  # characters of each stream in a failure's message
_GRACE = 3.0  # seconds that the others have to say their part after the first failure
# The parent's death kills the process (PR_SET_PDEATHSIG is 1); the setting survives execv. So would
# an ignored SIGINT, which background jobs of a shell inherit.
_GUARD = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, 9); "
    "signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


@dataclasses.dataclass(frozen=True)
class Done:
    """What a process left: `returncode` is negative after a signal; `seconds` it ran."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A TCP port of this machine that nobody else is given meanwhile.

    The socket that keeps it never listens, and gRPC shares ports, so a coordinator may bind it.
    """
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        keeper.bind(("", 0))
        yield keeper.getsockname()[1]


def environment(**changes: str) -> dict[str, str]:
    """This process' environment, in which Python finds the package under test and test modules."""
    package = importlib.util.find_spec("jax_fusco")
    assert package is not None
    assert package.origin is not None
    here = Path(__file__).parent
    places = [str(Path(package.origin).parents[1]), str(here.parent), str(here)]
    path = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
    # Devices are each process' own choice: flags for this process' devices would overrule it.
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    return {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": " ".join(flags), **changes}


class Job:
    """Processes of this Python (or of `program`), started together, whose output goes to files."""

    def __init__(
        self,
        arguments: Sequence[Sequence[str]],
        *,
        folder: Path,
        env: Mapping[str, str] | None = None,
        program: str = sys.executable,
    ):
        self._arguments, self._folder, self._program = arguments, folder, program
        self._env = environment() if env is None else dict(env)
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Job:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._start = time.monotonic()
        self._ends: dict[int, float] = {}
        guard = [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), self._program]
        try:
            for index, arguments in enumerate(self._arguments):
                with (
                    self._file(index, "out").open("wb") as out,
                    self._file(index, "err").open("wb") as err,
                ):
                    process = subprocess.Popen(
                        [*guard, *arguments],
                        env=self._env,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                        start_new_session=True,
                    )
                self.processes.append(process)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Kills every process with all that it started, and waits for the processes."""
        for process in self.processes:
            # The group may outlive its leader, whose number stays taken while the group lives.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def stdout(self, index: int) -> str:
        """What a process has written so far."""
        return self._file(index, "out").read_text(errors="replace")

    def stderr(self, index: int) -> str:
        return self._file(index, "err").read_text(errors="replace")

    def until(self, condition: Callable[[], object], timeout: float) -> None:
        """Returns as soon as the condition holds; fails if a process ends or time is up first."""
        while not condition():
            if any(code is not None for code in self._poll()):
                raise AssertionError(self._report("a process ended too early"))
            if time.monotonic() > self._start + timeout:
                raise AssertionError(self._report(f"no end of waiting within {timeout:g} s"))
            time.sleep(0.02)

    def wait(self, timeout: float, *, check: bool = True) -> list[Done]:
        """Waits until all have ended, at most `timeout` seconds after their start.

        With `check`, the first that ends in another way than well makes the call fail soon: its
        peers may wait for it for minutes.
        """
        deadline = self._start + timeout
        failed = None
        while None in (codes := self._poll()):
            if check and failed is None and any(codes):
                failed = next(i for i, code in enumerate(codes) if code)
                deadline = min(deadline, time.monotonic() + _GRACE)
            if time.monotonic() > deadline:
                running = [i for i, code in enumerate(codes) if code is None]
                what = f"processes {running} did not end within {timeout:g} s"
                raise AssertionError(
                    self._report(what if failed is None else f"process {failed} failed")
                )
            time.sleep(0.02)
        if check and any(codes):
            raise AssertionError(self._report("a process failed"))
        return [
            Done(process.returncode, self.stdout(i), self.stderr(i), self._ends[i] - self._start)
            for i, process in enumerate(self.processes)
        ]

    def _file(self, index: int, kind: str) -> Path:
        return self._folder / f"process-{index}.{kind}"

    def _poll(self) -> list[int | None]:
        codes = [process.poll() for process in self.processes]
        for index, code in enumerate(codes):
            if code is not None:
                self._ends.setdefault(index, time.monotonic())
        return codes

    def _report(self, what: str) -> str:
        parts = [what]
        for index, process in enumerate(self.processes):
            code = process.poll()
            parts.append(f"---- process {index}: {_spell(code)}")
            for name, text in (("stdout", self.stdout(index)), ("stderr", self.stderr(index))):
                if text:
                    cut = "[...] " if len(text) > _TAIL else ""
                    parts.append(f"-- {name}:\n{cut}{text[-_TAIL:].rstrip()}")
        return "\n".join(parts)


def _spell(code: int | None) -> str:
    if code is None:
        return "was still running"
    return f"exit status {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"


def run(
    code: str,
    *,
    processes: int = 2,
    devices: int = 4,
    arguments: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    timeout: float = 200,
) -> list[Done]:
    """Runs `code` in several processes of a JAX job with so many CPU devices each.

    The code finds `join` imported; `arguments` are in `sys.argv[1:]`. Every process must end well.
    """
    with free_port() as port, tempfile.TemporaryDirectory() as folder:
        job = {
            "JOB_PORT": str(port),
            "JOB_PROCESSES": str(processes),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
        }
        each = [
            ["-c", f"from launch import join\n{code}", str(i), *arguments] for i in range(processes)
        ]
        with Job(each, folder=Path(folder), env=environment(**job, **(env or {}))) as started:
            return started.wait(timeout)


def join() -> int:
    """In a process of `run`: joins the job; returns this process' index."""
    import jax

    process = int(sys.argv.pop(1))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"localhost:{os.environ['JOB_PORT']}"
    jax.distributed.initialize(address, int(os.environ["JOB_PROCESSES"]), process)
    return process
