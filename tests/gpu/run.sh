#!/usr/bin/env bash
# Builds, tests and times everything that needs a GPU, on a machine with CUDA 13, jax[cuda13] and
# one GPU; nothing is fetched. From anywhere:
#
#   tests/gpu/run.sh [STEP...]        all steps, or those named (--list names them)
#
# Each step has a time limit, and all together have BUDGET seconds (default 460); a failed step does
# not stop the next ones. Everything lands in $OUT (default runs/gpu): log.txt with all output,
# summary.txt, the measurements as JSON, a picture. The exit status is that of the worst step.
# Other settings: PYTHON, BUILD (folder), ARCHITECTURES (90), JOBS, LIMIT_SCALE (percent, for
# machines that are slower).
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1

PYTHON=${PYTHON:-python3}
BUILD=${BUILD:-_skbuild/gpu}
OUT=${OUT:-runs/gpu}
ARCHITECTURES=${ARCHITECTURES:-90}
JOBS=${JOBS:-$(nproc)}
BUDGET=${BUDGET:-460}
LIMIT_SCALE=${LIMIT_SCALE:-100}
PROGRAMS=$BUILD/tests/gpu
GRAPHS="--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL --xla_gpu_graph_min_graph_size=1"
NO_GRAPHS="--xla_gpu_enable_command_buffer="

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export OUT BUILD PYTHON ARCHITECTURES JOBS
export PATH=$PATH:/usr/local/cuda/bin
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

machine() {
  uname -a
  nvidia-smi || return
  nvcc --version | tail -n 2
  $PYTHON -c 'import sys, jax, jaxlib; print(sys.version, jax.__version__, jaxlib.__version__)'
}

configure() {  # options...
  command -v ninja > /dev/null && set -- -G Ninja "$@"
  cmake -S . -B "$BUILD" --log-level=WARNING -DCMAKE_BUILD_TYPE=Release -DJAX_FUSCO_CUDA=ON \
    -DJAX_FUSCO_GPU_TESTS=ON -DCMAKE_CUDA_ARCHITECTURES="$ARCHITECTURES" \
    -DCMAKE_CUDA_FLAGS=-lineinfo "$@"
}

# The programs first: they need no Python.
build() {
  configure -DJAX_FUSCO_MODULES=OFF && cmake --build "$BUILD" --parallel "$JOBS"
}

# Into the tree, where PYTHONPATH finds them. Modules that are there already are used where these
# cannot be built.
modules() {
  if configure -DJAX_FUSCO_MODULES=ON -DPython_EXECUTABLE="$($PYTHON -c 'import sys; print(sys.executable)')" &&
    cmake --build "$BUILD" --parallel "$JOBS"; then
    cmake --install "$BUILD" --prefix . || return
  else
    echo "The modules do not build here."
    ls jax_fusco/*.so || return
  fi
  $PYTHON -c '
from jax_fusco import ffi
assert ffi.cuda_module() is not None, "jax_fusco._cuda is missing"
import jax
print(jax.devices(), ffi.may_run_on_gpu())'
}

doctor() { $PYTHON -c 'from jax_fusco.cli import main; main(["doctor"])'; }
kernels() { "$PROGRAMS/test_kernels"; }
handshake() { "$PROGRAMS/gpu_handshake"; }

# tests/conftest.py is for CPU devices. Another JAX than CI's may warn of something.
gpu_pytest() {
  $PYTHON -m pytest --confcutdir=tests/gpu -p no:cacheprovider -W default -q --durations=5 "$@"
}
api() { gpu_pytest tests/gpu --ignore=tests/gpu/test_processes.py; }
api_graphs() { XLA_FLAGS=$GRAPHS api; }
processes() {
  # Several processes on one GPU: none may take all its memory.
  XLA_PYTHON_CLIENT_PREALLOCATE=false gpu_pytest tests/gpu/test_processes.py
}

sanitizer() { compute-sanitizer --error-exitcode 9 --print-limit 20 "$@" "$PROGRAMS/test_kernels" --small; }
memcheck() { sanitizer --tool memcheck; }
racecheck() { sanitizer --tool racecheck; }

bench_kernels() { "$PROGRAMS/bench_kernels" "$OUT/kernels.json" "${ROUNDS:-11}"; }
bench_jax() {  # label, JSON, XLA_FLAGS
  XLA_FLAGS=$3 $PYTHON benchmarks/gpu/bench_jax.py measure --label "$1" --out "$OUT/$2" --budget 55
}
bench_jax_plain() { bench_jax "no CUDA graphs" jax.json "$NO_GRAPHS"; }
bench_jax_graphs() { bench_jax "CUDA graphs" jax_graphs.json "$GRAPHS"; }
picture() {
  local found=()
  for name in jax.json jax_graphs.json; do
    [ -e "$OUT/$name" ] && found+=("$OUT/$name")
  done
  $PYTHON benchmarks/gpu/bench_jax.py show --picture "$OUT/gpu.png" --kernels "$OUT/kernels.json" \
    ${found[@]+"${found[@]}"}
}

# name, seconds it may take
STEPS="
machine 30
build 200
kernels 130
handshake 45
modules 120
doctor 30
api 110
api_graphs 110
processes 90
memcheck 80
racecheck 80
bench_kernels 100
bench_jax_plain 85
bench_jax_graphs 85
picture 30
"

if [ "${1:-}" = --step ]; then  # a step runs in a shell of its own, which can be ended
  "$2"
  exit
fi
if [ "${1:-}" = --list ]; then
  awk 'NF { print $1 }' <<< "$STEPS"
  exit
fi
for wanted in "$@"; do
  grep -q "^$wanted " <<< "$STEPS" || { echo "run.sh: no step $wanted; see --list" >&2; exit 2; }
done

worst=0
: > "$OUT/log.txt"
printf '%-18s %-10s %s\n' step result seconds > "$OUT/summary.txt"
note() { printf '%-18s %-10s %s\n' "$@" | tee -a "$OUT/summary.txt"; }

while read -r name limit; do
  [ -n "$name" ] || continue
  case " ${*:-$name} " in *" $name "*) ;; *) continue ;; esac
  limit=$((limit * LIMIT_SCALE / 100))
  left=$((BUDGET - SECONDS))
  if [ "$left" -lt 5 ]; then
    note "$name" "no time" 0
    worst=1
    continue
  fi
  [ "$limit" -lt "$left" ] || limit=$left
  begin=$SECONDS
  printf '\n===== %s\n' "$name" >> "$OUT/log.txt"
  at=$(wc -l < "$OUT/log.txt")
  timeout --kill-after=10 "$limit" "$BASH" tests/gpu/run.sh --step "$name" \
    < /dev/null >> "$OUT/log.txt" 2>&1
  status=$?
  case $status in
    0) note "$name" ok $((SECONDS - begin)) ;;
    124 | 137) note "$name" "too long" $((SECONDS - begin)) ;;
    *) note "$name" "failed $status" $((SECONDS - begin)) ;;
  esac
  case $name in bench_* | picture | handshake) shown=60 ;; *) shown=4 ;; esac
  if [ $status -ne 0 ]; then
    worst=1
    shown=40
  fi
  tail -n +$((at + 1)) "$OUT/log.txt" | tail -n "$shown" | sed 's/^/    /'
done <<< "$STEPS"
exit $worst
