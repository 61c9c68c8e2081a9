"""examples/train_moe_lm.py as its users run it: a process, a folder, and interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_moe_lm.py"
TINY = [
    *("--layers=2", "--width=32", "--heads=2", "--experts=8", "--expert-width=32", "--dropout=0.1"),
    *("--context=32", "--batch=8", "--eval-every=20", "--eval-batches=1", "--sample-bytes=24"),
    *("--warmup=4", "--learning-rate=0.01", "--max-minutes=0"),
]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small, predictable files."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        lines = [f"def f{i}_{j}(x):\n    return x + {j}\n" for j in range(20)]
        (folder / f"m{i:02}.py").write_text("\n".join(lines))
    return folder


def arguments(text: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), f"--data={text}", f"--output={output}", *TINY, *more]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def train(text: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments(text, output, *more),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def succeed(text: Path, output: Path, *more: str) -> str:
    done = train(text, output, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in metrics(output) if "loss" in line]


def checkpoint(output: Path, step: int) -> dict:
    """The saved arrays, as NumPy ones by path."""
    with ocp.StandardCheckpointer() as reader:
        path = (output / "checkpoints" / str(step) / "state").absolute()
        meta = reader.metadata(path)
        item = getattr(meta, "item_metadata", meta)
        target = jax_tree_map_numpy(item)
        return flatten(reader.restore(path, target))


def jax_tree_map_numpy(tree):
    import jax

    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), tree)


def flatten(tree, prefix: str = "") -> dict:
    if isinstance(tree, dict):
        return {k: v for name in tree for k, v in flatten(tree[name], f"{prefix}/{name}").items()}
    return {prefix: tree}


def started(text: Path, output: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        arguments(text, output, *more),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(output: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not (output / "metrics.jsonl").exists() or len(losses_so_far(output)) < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "no steps in 90 s"
        time.sleep(0.02)


def losses_so_far(output: Path) -> list[str]:
    return (output / "metrics.jsonl").read_text().split("\n")


@pytest.fixture(scope="session")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 steps that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole")
    printed = succeed(text, output, "--steps=60", "--save-every=20")
    assert "mesh: data 1 x expert 4" in printed
    return output


def test_learns_and_writes_everything(whole: Path) -> None:
    got = losses(whole)
    assert len(got) == 60
    assert np.mean(got[-5:]) < 0.6 * np.mean(got[:5])
    validation = [line["validation_loss"] for line in metrics(whole) if "validation_loss" in line]
    assert len(validation) == 3
    assert validation[-1] < validation[0]
    for name in ("loss.png", "experts.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")
    assert (whole / "sample.txt").read_text().count("----") == 3
    last = metrics(whole)[-2]
    tokens = np.array(last["expert_tokens"])
    assert tokens.shape == (2, 8)
    assert 1 <= last["load"] <= 8
    assert 0 <= last["dropped"] < 1
    assert tokens.sum() == 2 * 8 * 32 * 2


def test_resume_after_kill_is_bit_for_bit(text: Path, whole: Path, tmp_path: Path) -> None:
    process = started(text, tmp_path, "--steps=60", "--save-every=20")
    wait_for_step(tmp_path, 30, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (tmp_path / "checkpoints" / "60").exists()
    assert "resuming from step" in succeed(text, tmp_path, "--steps=60", "--save-every=20")
    assert losses(tmp_path) == losses(whole)
    want, got = checkpoint(whole, 60), checkpoint(tmp_path, 60)
    assert want.keys() == got.keys()
    for name in want:
        np.testing.assert_array_equal(want[name], got[name], err_msg=name, strict=True)
    assert (tmp_path / "sample.txt").read_text() == (whole / "sample.txt").read_text()


def test_interrupt_saves_and_another_mesh_goes_on(text: Path, whole: Path, tmp_path: Path) -> None:
    often = ("--steps=60", "--save-every=1000", "--capacity-factor=16")
    process = started(text, tmp_path, *often)
    wait_for_step(tmp_path, 5, process)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "Stopped by SIGINT at step" in printed
    step = len(losses(tmp_path))
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    printed = succeed(text, tmp_path, *often, "--devices=8", "--mesh=2x4")
    assert f"resuming from step {step} of 60" in printed
    assert "mesh: data 2 x expert 4" in printed
    assert len(losses(tmp_path)) == 60
    assert losses(tmp_path)[-1] < losses(tmp_path)[step]


def test_fused_and_xla_train_alike(text: Path, tmp_path: Path) -> None:
    runs = {}
    for name in ("fused", "xla"):
        succeed(text, tmp_path / name, "--steps=12", f"--implementation={name}", "--mesh=2x2")
        runs[name] = losses(tmp_path / name)
    np.testing.assert_allclose(runs["fused"], runs["xla"], rtol=2e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data=/nowhere"], "--data: /nowhere is neither a file nor a folder."),
        (["--mesh=2-2"], "--mesh: '2-2' is not DATAxEXPERT, such as 2x2."),
        (["--mesh=3x2"], "--mesh: 3x2 has 6 places for 4 devices."),
        (["--experts=6"], "--experts: 6 cannot be divided over the mesh's 4 expert ranks."),
        (["--top-k=9"], "--top-k: 9 is more than the 8 experts there are."),
        (["--batch=6"], "--batch: 6 sequences cannot be divided over 4 devices."),
        (["--steps=0"], "Invalid value for '--steps': 0 is not in the range x>=1."),
        (["--stepps=3"], "No such option: --stepps Did you mean --steps?"),
    ],
)
def test_bad_arguments_get_one_sentence(
    text: Path, tmp_path: Path, options: list[str], sentence: str
) -> None:
    done = train(text, tmp_path, *options)
    assert done.returncode == 2
    assert done.stderr == f"Error: {sentence}\n"


def test_other_options_do_not_continue_a_run(text: Path, whole: Path) -> None:
    done = train(text, whole, "--width=64", "--steps=60")
    assert done.returncode == 2
    assert done.stderr == (
        f"Error: --width: 64 was given but the run in {whole} has 32; "
        "start over with --fresh or choose another --output.\n"
    )


def test_bad_text_gets_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").write_text("too short")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 100)
    for name, sentence in (
        ("empty", f"found no UTF-8 text in {tmp_path / 'empty'}."),
        ("binary", f"found no UTF-8 text in {tmp_path / 'binary'}."),
        ("short", "8 bytes of training text are too few for --context 32, which needs 65."),
    ):
        done = train(tmp_path / name, tmp_path / "run")
        assert done.returncode == 2
        assert done.stderr == f"Error: --data: {sentence}\n"
