"""`jax-fusco doctor`: what it finds, and when it fails."""

import types
from importlib import metadata

import pytest
from click.testing import CliRunner
from helpers import run_python

from jax_fusco import doctor, ffi
from jax_fusco.cli import main


def gpu(name="H100", capability=(9, 0), reaches=(True,), shares=True):
    return {
        "name": name,
        "compute_capability": capability,
        "memory_bytes": 80 << 30,
        "shares": shares,
        "reaches": list(reaches),
    }


@pytest.fixture
def cuda(monkeypatch):
    """Sets what the CUDA engine says of the machine."""

    def set_machine(driver=13000, runtime=13000, error="", devices=(), nccl=(23203, "")):
        machine = {"driver": driver, "runtime": runtime, "error": error, "devices": list(devices)}
        module = types.SimpleNamespace(
            machine=lambda: machine, nccl=lambda path: {"version": nccl[0], "error": nccl[1]}
        )
        monkeypatch.setattr(ffi, "cuda_module", lambda: module)

    return set_machine


def findings():
    return {finding.what: finding for finding in doctor.examine()}


def run():
    result = CliRunner().invoke(main, ["doctor"], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_finds_the_cpu_engine_and_succeeds():
    code, output = run()
    assert code == 0
    assert "row kernels" in output
    assert findings()["CPU engine"].verdict == doctor.GOOD


@pytest.mark.parametrize("module", ["jax_fusco", "jax_fusco.cli"])
def test_the_package_runs_as_a_module(module):
    done = run_python(
        "import runpy, sys; sys.argv[1:] = ['doctor']\n"
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    assert done.returncode == 0, done.stderr
    assert "CPU engine" in done.stdout


def test_a_build_without_cuda_is_missing_something_but_not_broken(monkeypatch):
    monkeypatch.setattr(ffi, "cuda_module", lambda: None)
    found = findings()["CUDA engine"]
    assert found.verdict == doctor.MISSING
    assert "nvcc" in found.remedy
    assert run()[0] == 0


def test_a_variable_that_makes_no_sense_is_broken(monkeypatch):
    monkeypatch.setenv("JAX_FUSCO_THREADS", "many")
    assert "JAX_FUSCO_THREADS" in findings()["CPU engine"].found
    assert run()[0] == 1


def test_a_build_for_a_newer_jaxlib_is_broken(monkeypatch):
    monkeypatch.setattr(ffi, "runtime_ffi_version", lambda: (0, 0))
    ffi.cpu_module.cache_clear()
    try:
        assert findings()["CPU engine"].verdict == doctor.BROKEN
        assert run()[0] == 1
    finally:
        ffi.cpu_module.cache_clear()


def test_no_driver_is_missing(cuda):
    cuda(driver=0)
    assert findings()["NVIDIA driver"].verdict == doctor.MISSING
    assert run()[0] == 0


def test_an_old_driver_is_broken(cuda):
    cuda(driver=12040, devices=[gpu()])
    found = findings()["NVIDIA driver"]
    assert found.verdict == doctor.BROKEN
    assert found.found == "serves CUDA 12.4, this build needs 13.0"
    assert run()[0] == 1


def test_devices_that_cannot_be_listed_are_broken(cuda):
    cuda(error="no CUDA-capable device is detected")
    assert findings()["GPUs"].verdict == doctor.BROKEN


def test_lists_gpus_and_pairs_that_cannot_reach_each_other(cuda):
    cuda(devices=[gpu(reaches=(True, True)), gpu(reaches=(False, True))])
    found = findings()
    assert found["GPU 1"].found == "H100, 80 GiB, sm_90"
    assert "GPUs 0 and 1" in found["peer access"].found
    cuda(devices=[gpu(reaches=(True, True)), gpu(reaches=(True, True))])
    assert findings()["peer access"].verdict == doctor.GOOD


@pytest.mark.parametrize(
    ("nccl", "found", "verdict"),
    [
        ((23203, ""), "across hosts of one NVLink domain by windows of NCCL 2.32.3", "ok"),
        ((22703, "too old"), "not across hosts: NCCL 2.27.3 is too old", "missing"),
        ((0, "none"), "not across hosts: there is no NCCL", "missing"),
    ],
)
def test_says_how_several_processes_can_meet(cuda, nccl, found, verdict):
    cuda(devices=[gpu()], nccl=nccl)
    finding = findings()["several processes"]
    assert finding.found == f"on this host by CUDA IPC; {found}"
    assert finding.verdict == verdict
    cuda(devices=[gpu(shares=False)], nccl=nccl)
    assert findings()["several processes"].found.startswith("not on this host")


def test_an_old_gpu_is_broken(cuda):
    cuda(devices=[gpu("V100", (7, 0))])
    assert findings()["GPU 0"].verdict == doctor.BROKEN


@pytest.mark.parametrize(
    ("plugin", "verdict"), [("same", "ok"), ("0.0.1", "broken"), (None, "missing")]
)
def test_the_plugin_must_be_of_jaxlibs_version(cuda, monkeypatch, plugin, verdict):
    cuda(driver=0)
    true_version = metadata.version

    def version(package):
        if package == "jax-cuda12-plugin" or (package == "jax-cuda13-plugin" and plugin is None):
            raise metadata.PackageNotFoundError(package)
        if package == "jax-cuda13-plugin":
            return true_version("jaxlib") if plugin == "same" else plugin
        return true_version(package)

    monkeypatch.setattr(doctor.metadata, "version", version)
    assert findings()["JAX on GPUs"].verdict == verdict
