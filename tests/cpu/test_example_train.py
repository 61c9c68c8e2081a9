"""The training example as its users run it: a process, a folder, interruptions, and a placement."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import jax
import numpy as np
import pytest
from example_run import SCRIPT, STEPS, TINY, checkpoint, losses, metrics, write_text

import jax_fusco as jf


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def arguments(text: Path, output: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), f"--data={text}", f"--output={output}", *TINY, *more]


def environment() -> dict[str, str]:
    package = str(Path(jf.__file__).parents[1])
    return {
        **os.environ,
        # Most of the time goes into compiling.
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
    }


def train(text: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments(text, output, *more),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )


def succeed(text: Path, output: Path, *more: str) -> str:
    done = train(text, output, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def started(text: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments(text, output, *more),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(output: Path, step: int, process: subprocess.Popen[str]) -> None:
    log = output / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not log.exists() or log.read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="session")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole")
    printed = succeed(text, output, "--implementation=fused", "--save-every=20")
    assert "mesh: data 1 x expert 4, shuffle: fused" in printed
    return output


def test_learns_and_writes_everything(whole: Path) -> None:
    got = losses(whole)
    assert len(got) == STEPS
    assert np.mean(got[-5:]) < 0.6 * np.mean(got[:5])
    validation = [line["validation_loss"] for line in metrics(whole) if "validation_loss" in line]
    assert len(validation) == STEPS // 20
    assert validation[-1] < validation[0]
    for name in ("loss.png", "experts.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")
    assert (whole / "sample.txt").read_text().count("----") == 3
    last = metrics(whole)[-2]
    assert np.sum(last["expert_tokens"], axis=1).tolist() == [8 * 32 * 2]
    assert 1 <= last["load"] <= 8
    assert last["dropped"] == 0


def two_steps(balance_weight: float, z_weight: float) -> list[dict[str, float]]:
    """Two steps on the same bytes; the first has a learning rate of zero."""
    from moe_lm.model import ModelConfig  # type: ignore[import-not-found]
    from moe_lm.training import TrainConfig, Trainer, make_mesh  # type: ignore[import-not-found]

    model = ModelConfig(
        context=16,
        layers=1,
        width=16,
        heads=2,
        experts=4,
        top_k=2,
        expert_width=16,
        shared_experts=0,
        capacity_factor=None,
        dropout=0.5,
        implementation=None,
    )
    config = TrainConfig(
        steps=100,
        batch=2,
        learning_rate=0.01,
        warmup=10,
        weight_decay=0.0,
        clip=1.0,
        balance_weight=balance_weight,
        z_weight=z_weight,
        seed=0,
    )
    trainer = Trainer(model, config, make_mesh({"data": 1, "expert": 2}))
    state, key = trainer.initial_state(), np.asarray(jax.random.key_data(jax.random.key(0)))
    batch = np.random.default_rng(0).integers(0, 256, (2, 17), np.uint8)
    steps = []
    for _ in range(2):
        state, stats = trainer.train_step(state, trainer.put(batch), key)
        steps.append({name: float(stats[name]) for name in ("loss", "grad_norm", "learning_rate")})
    return steps


def test_steps_drop_other_features_and_router_losses_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    plain, balanced, squared = (two_steps(*weights) for weights in ((0, 0), (1, 0), (0, 1)))
    assert plain[0]["learning_rate"] == 0
    assert plain[0]["loss"] != plain[1]["loss"]
    assert plain[0]["loss"] == balanced[0]["loss"] == squared[0]["loss"]
    assert len({run[0]["grad_norm"] for run in (plain, balanced, squared)}) == 3


def test_resume_after_kill_is_bit_for_bit(text: Path, whole: Path, tmp_path: Path) -> None:
    options = ("--implementation=fused", "--save-every=20")
    process = started(text, tmp_path, *options)
    wait_for_step(tmp_path, 30, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (tmp_path / "checkpoints" / str(STEPS)).exists()
    assert "resuming from step" in succeed(text, tmp_path, *options)
    assert losses(tmp_path) == losses(whole)
    want, got = checkpoint(whole), checkpoint(tmp_path)
    assert want.keys() == got.keys()
    for name in want:
        np.testing.assert_array_equal(want[name], got[name], err_msg=name, strict=True)
    assert (tmp_path / "sample.txt").read_text() == (whole / "sample.txt").read_text()


def test_interrupt_saves_and_another_mesh_goes_on(text: Path, whole: Path, tmp_path: Path) -> None:
    process = started(text, tmp_path, "--save-every=1000")
    wait_for_step(tmp_path, 5, process)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=280)
    assert process.returncode == 130, printed
    assert "Stopped by SIGINT at step" in printed
    step = len(losses(tmp_path))
    assert 5 <= step < STEPS
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    printed = succeed(text, tmp_path, "--save-every=1000", "--devices=8", "--mesh=2x4")
    assert f"resuming from step {step} of {STEPS}" in printed
    assert "mesh: data 2 x expert 4" in printed
    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=2e-3)


def test_fused_and_xla_train_alike(text: Path, whole: Path, tmp_path: Path) -> None:
    succeed(text, tmp_path, "--implementation=xla")
    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=2e-3)
    np.testing.assert_allclose(losses(tmp_path)[:10], losses(whole)[:10], rtol=1e-5)


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
        (["--stepps=3"], "No such option '--stepps'. Did you mean '--steps'?"),
    ],
)
def test_bad_arguments_get_one_sentence(
    text: Path, tmp_path: Path, options: list[str], sentence: str
) -> None:
    done = train(text, tmp_path, *options)
    assert done.returncode == 2
    assert done.stderr == f"Error: {sentence}\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--topology=2x0"], "--topology: '2x0' is not NODESxRANKS, such as 2x4."),
        (["--topology=2x2", "--mesh=1x4"], "--mesh: got it and --topology, need one of them."),
        (
            ["--topology=2x4", "--devices=4"],
            "--devices: 4 is not the 8 ranks of --topology 2x4.",
        ),
        (["--topology=3x2"], "--experts: 16 cannot be divided over the mesh's 6 expert ranks."),
        (["--processes=2"], "--processes: got it without --coordinator."),
        (["--distributed"], "--topology: got nothing, and several processes need it."),
        (
            ["--coordinator=host", "--processes=2", "--process=0", "--topology=2x2"],
            "--coordinator: 'host' is not HOST:PORT.",
        ),
        (
            ["--coordinator=host:1234", "--processes=3", "--process=0", "--topology=2x2"],
            "--processes: 3 processes are not one for each of the 2 nodes of --topology.",
        ),
        (
            ["--coordinator=host:1234", "--processes=2", "--process=2", "--topology=2x2"],
            "--process: 2 is not one of 0 to 1.",
        ),
        (["--save-routing=/"], "--save-routing: / is a folder, and a file is needed."),
        (["--layers=1", "--routing-layer=1"], "--routing-layer: 1 is not one of 0 to 0."),
    ],
)
def test_bad_arguments_of_several_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], sentence: str
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import train_moe_lm  # type: ignore[import-not-found]

    with pytest.raises(click.ClickException) as raised:
        train_moe_lm.command.main([f"--output={tmp_path / 'run'}", *options], standalone_mode=False)
    assert raised.value.format_message() == sentence


def place(run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT.with_name("place_moe_lm.py")), f"--run={run}", *more],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_experts_of_a_run_are_placed_and_limited(text: Path, whole: Path, tmp_path: Path) -> None:
    small = ("--ranks=4", "--batches=2", "--eval-batches=1", "--tune-steps=2")
    done = place(whole, f"--data={text}", f"--out={tmp_path}", *small)
    assert done.returncode == 0, done.stderr
    before, after = re.findall(r"validation loss (\S+), after the move (\S+)", done.stdout)[0]
    assert float(after) == pytest.approx(float(before), rel=1e-4)
    placement = jf.Placement.from_file(tmp_path / "placement.json")
    stats = jf.RoutingStats.from_file(tmp_path / "stats.npz")
    assert (placement.num_layers, placement.num_ranks, stats.num_experts) == (1, 4, 8)
    assert stats.tokens.tolist() == [2 * 8 * 32]
    with np.load(tmp_path / "routing.npz", allow_pickle=False) as routing:
        assert routing["expert_ids"].shape == (4, 2 * 8 * 32 // 4, 2)
        load = np.bincount(routing["expert_ids"].reshape(-1), minlength=8)
    np.testing.assert_array_equal(load, stats.load[0])
    rows = json.loads((tmp_path / "pruning.json").read_text())["rows"]
    found = [(row["method"], row["max_ranks"]) for row in rows]
    assert found == [("none", 4), ("router", 1), ("similarity", 1)]
    free, *limited = rows
    assert free["as is"]["loss"] == pytest.approx(float(after), rel=1e-6)
    for row in limited:
        assert row["as is"]["ranks"] == row["tuned"]["ranks"] == 1 < free["as is"]["ranks"]
        assert free["as is"]["loss"] != row["as is"]["loss"] != row["tuned"]["loss"]
    assert (tmp_path / "pruning.png").read_bytes().startswith(b"\x89PNG")


def test_placing_needs_a_run_and_its_text(whole: Path, tmp_path: Path) -> None:
    for run, sentence in (
        (tmp_path, f"--run: {tmp_path} holds no checkpoint of train_moe_lm.py."),
        (whole, f"--data: the run in {whole} read another text."),
    ):
        done = place(run, f"--out={tmp_path / 'out'}")
        assert done.returncode == 1
        assert done.stderr == f"Error: {sentence}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ranks", "devices", "sentence"),
    [
        (3, 4, "--ranks: 3 does not divide the 8 experts."),
        (4, 5, "--devices: 5 does not divide the 8 experts."),
        (4, 4, "--devices: 4 does not divide the batch of 6."),
    ],
)
def test_placing_needs_sizes_that_fit(
    monkeypatch: pytest.MonkeyPatch, ranks: int, devices: int, sentence: str
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import place_moe_lm  # type: ignore[import-not-found]

    with pytest.raises(click.ClickException) as raised:
        place_moe_lm.check({"experts": 8, "batch": 6}, ranks, devices)
    assert raised.value.format_message() == sentence


def test_other_options_do_not_continue_a_run(text: Path, whole: Path) -> None:
    done = train(text, whole, "--width=64")
    assert done.returncode == 2
    assert done.stderr == (
        f"Error: --width: 64 was given but the run in {whole} has 32; "
        "start over with --fresh or choose another --output.\n"
    )


def test_another_text_does_not_continue_a_run(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("print('other')\n" * 200)
    done = train(tmp_path, whole)
    assert done.returncode == 2
    assert done.stderr == (
        f"Error: --data: the run in {whole} read another text; "
        "start over with --fresh or choose another --output.\n"
    )


def test_fresh_forgets_a_run_and_time_stops_one(text: Path, whole: Path, tmp_path: Path) -> None:
    output = shutil.copytree(whole, tmp_path / "run")
    printed = succeed(text, output, "--fresh", "--max-minutes=0.001")
    assert f"Stopped by --max-minutes at step 0 of {STEPS}" in printed
    assert metrics(output) == []
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["0"]
    assert not (output / "loss.png").exists()


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


def test_a_missing_engine_gets_one_sentence_and_no_folder(text: Path, tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules['jax_fusco._ffi'] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    script = arguments(text, tmp_path / "run", "--implementation=fused")[1:]
    done = subprocess.run(
        [sys.executable, "-c", code, *script],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.startswith("Error: --implementation: 'fused' needs the compiled module")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
