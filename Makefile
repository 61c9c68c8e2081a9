# One rule for each thing a developer does; `make help` lists them.
# Another Python or JAX beside the default one: make PYTHON=python3.12 VENV=.venv312 JAX='jax==0.10.2' test

PYTHON ?= python3
VENV ?= .venv
JAX ?= jax
PYTEST_ARGS ?=
# Test files run at once: compiling a test's programs takes one core.
JOBS ?= 2
TRAIN_ARGS ?=
BENCH_ARGS ?=
QUIET ?= -qq
# The engine of NVIDIA GPUs: ON, OFF, or AUTO (if nvcc is found).
CUDA ?= OFF
BUILD_ARGS ?=
ifneq ($(filter cuda,$(MAKECMDGOALS)),)  # builds with the package the programs that test and time kernels
CUDA := ON
BUILD_ARGS += --config-settings=cmake.define.JAX_FUSCO_GPU_TESTS=ON --config-settings=cmake.define.JAX_FUSCO_WERROR=ON
BUILT_TESTS := $(shell find tests/gpu benchmarks/gpu -type f)
endif

BIN := $(VENV)/bin
NATIVE := $(shell find CMakeLists.txt cmake xla_ffi -type f)
NATIVE_TESTS := $(shell find tests/native tests/gpu benchmarks/gpu -type f)
FORMATTED := $(filter %.h %.cc %.cu,$(NATIVE) $(NATIVE_TESTS))

.PHONY: help test native native-cuda pytest protocol cuda levanter train bench lint format types bazel wheel clean
.DELETE_ON_ERROR:
.SECONDARY:

help:  ## list the rules
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

# The package is built once, in isolation, and again when C++ or the build changes; Python edits need nothing.
# What the compilers say is in build.log.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(QUIET) --upgrade "pip>=25.1"

$(VENV)/.package: pyproject.toml $(NATIVE) $(BUILT_TESTS) | $(BIN)/python
	@echo "Building and installing jax_fusco into $(VENV): a minute or two"
	@$(BIN)/python -m pip install -v --config-settings=cmake.define.JAX_FUSCO_CUDA=$(CUDA) $(BUILD_ARGS) \
	  "$(JAX)" --editable . > $(VENV)/build.log 2>&1 || (tail -n 100 $(VENV)/build.log; false)
	@touch $@

# Tools (pyproject's dependency groups) need no built package.
$(VENV)/.group-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install $(QUIET) --group $*
	@touch $@

# Extras go on top of the installed package, so that asking for one builds nothing again.
$(VENV)/.extra-%: pyproject.toml $(VENV)/.package
	$(BIN)/python -m pip install $(QUIET) "$(JAX)" "jax-fusco[$*]"
	@touch $@

test: native pytest  ## set up, then run every native and Python test

TESTED := CPU
native: native-plain native-address native-thread  ## C++ tests: plain, then under the sanitizers

native-cuda: native-cuda-address native-cuda-thread  ## the CUDA engine's programs, on host threads

native-address native-cuda-address: SANITIZE := address,undefined
native-thread native-cuda-thread: SANITIZE := thread
native-cuda-%: TESTED := CUDA
native-%: $(VENV)/.group-native
	$(BIN)/cmake -S . -B _skbuild/native-$* -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DJAX_FUSCO_MODULES=OFF -DJAX_FUSCO_TESTS=$(TESTED) -DJAX_FUSCO_CUDA=OFF -DJAX_FUSCO_SANITIZE=$(SANITIZE) --log-level=WARNING
	$(BIN)/cmake --build _skbuild/native-$*
	$(BIN)/ctest --test-dir _skbuild/native-$* --output-on-failure --no-tests=error

pytest: $(VENV)/.extra-test  ## Python tests: make pytest PYTEST_ARGS='tests/unit -k plan'
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

protocol: $(VENV)/.extra-test  ## the handshake of GPUs, in all interleavings; wants spin
	@command -v spin > /dev/null || { echo "make protocol: needs spin (Debian's package spin)"; exit 1; }
	$(BIN)/python -m pytest tests/protocol

# No GPU is needed: nvcc compiles the kernels, and the real XLA:GPU programs that call them.
cuda: $(VENV)/.extra-test  ## wants nvcc, VENV=.venv-cuda JAX='jax[cuda13]' and Python 3.12
	$(BIN)/python tools/ptxas_report.py $(VENV)/build.log
	$(BIN)/python -m pytest tests/xla_gpu tests/multiprocess/test_store.py
	$(BIN)/jax-fusco doctor

levanter: $(VENV)/.package  ## Levanter's own MoE over jax_fusco; wants VENV=.venv-levanter and Python 3.12
	$(BIN)/python -m pip install $(QUIET) --requirement examples/levanter_requirements.txt
	$(BIN)/python -m pip install $(QUIET) --no-deps --requirement examples/levanter_packages.txt
	$(BIN)/python examples/levanter_moe.py

train: $(VENV)/.extra-train  ## train the example language model: make train TRAIN_ARGS='--help'
	$(BIN)/python examples/train_moe_lm.py $(TRAIN_ARGS)

bench: $(VENV)/.extra-bench  ## time the shuffles against their rivals
	$(BIN)/python -m jax_fusco.bench $(BENCH_ARGS)

lint: $(VENV)/.group-lint  ## ruff and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

format: $(VENV)/.group-lint  ## let ruff and clang-format change what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

types: $(VENV)/.group-lint $(VENV)/.extra-test  ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

bazel: $(VENV)/.group-bazel $(VENV)/.extra-test  ## build and test with Bazel, offline
	PATH="$(abspath $(BIN)):$$PATH" JAX_FUSCO_PYTHON=$(abspath $(BIN))/python bazel test //:all

wheel: $(VENV)/.group-release  ## sdist, and a wheel built from it, into dist/
	$(BIN)/python -m build --quiet

clean:  ## remove what the rules above made, environments included
	rm -rf .venv* _skbuild dist
