#!/usr/bin/env bash
# Builds, tests and times everything that needs a GPU, on a machine with CUDA 13, jax[cuda13] and
# one GPU; nothing is fetched. From anywhere:
#
#   tests/gpu/run.sh              all steps in the order of --list: what measures before what repeats
#   tests/gpu/run.sh STEP...      those, with what an earlier run has built
#   tests/gpu/run.sh --continue   those that no earlier run came to, and what it could not build; what
#                                 it measured is kept
#
# Each step has a time limit, and all together have BUDGET seconds (default 590); a failed step does
# not stop the next ones. Up to api_graphs it should be eight minutes with 16 cores. Everything lands
# in $OUT (default runs/gpu): log.txt with all output, summary.txt, the measurements as JSON, a
# picture. What later runs need stays in $BUILD and, the modules, in jax_fusco/. The exit status is
# that of the worst step.
# Other settings: PYTHON, BUILD (folder), ARCHITECTURES (90), JOBS, WORKERS (processes of the tests
# through JAX), LIMIT_SCALE (percent, for machines that are slower).
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1

PYTHON=${PYTHON:-python3}
BUILD=${BUILD:-_skbuild/gpu}
OUT=${OUT:-runs/gpu}
ARCHITECTURES=${ARCHITECTURES:-90}
JOBS=${JOBS:-$(nproc)}
WORKERS=${WORKERS:-6}
BUDGET=${BUDGET:-590}
LIMIT_SCALE=${LIMIT_SCALE:-100}
MEASURED=$BUILD/measured
PROGRAMS=$BUILD/tests/gpu
GRAPHS="--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL --xla_gpu_graph_min_graph_size=1"
NO_GRAPHS="--xla_gpu_enable_command_buffer="

mkdir -p "$OUT" "$MEASURED"
OUT=$(cd "$OUT" && pwd)
export OUT BUILD PYTHON ARCHITECTURES JOBS WORKERS
export PATH=$PATH:/usr/local/cuda/bin
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
WITHOUT_BULK=$BUILD/without_bulk  # exists where bulk copies have failed
[ ! -e "$WITHOUT_BULK" ] || export JAX_FUSCO_BULK_COPIES=0

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

# All at once, which takes little longer than the slowest file; one that does not compile stops no
# other. Where Python has not what the modules need, the programs alone.
build() {
  local keep_going=-k
  command -v ninja > /dev/null && keep_going=-k0
  configure -DJAX_FUSCO_MODULES=ON \
    -DPython_EXECUTABLE="$($PYTHON -c 'import sys; print(sys.executable)')" ||
    configure -DJAX_FUSCO_MODULES=OFF || return
  cmake --build "$BUILD" --parallel "$JOBS" -- $keep_going
}

# Into the tree, where PYTHONPATH finds them. Modules that are there already are used where these
# were not built.
modules() {
  if ! cmake --install "$BUILD" --prefix .; then
    echo "The modules were not built here."
    ls jax_fusco/*.so || return
  fi
  $PYTHON -c '
import datetime, os, jax
from jax_fusco import ffi
module = ffi.cuda_module()
assert module is not None, "jax_fusco._cuda is missing"
print(module.__file__, "of", datetime.datetime.fromtimestamp(os.path.getmtime(module.__file__)))
print(jax.devices(), ffi.may_run_on_gpu())'
}

doctor() { $PYTHON -c 'from jax_fusco.cli import main; main(["doctor"])'; }

# Each test in a process of its own: what CUDA refuses, or what hangs, ends that test alone.
each_test() {  # program
  local names name worst=0
  names=$("$1" --list) || return
  for name in $names; do
    timeout --foreground --kill-after=2 $((60 * LIMIT_SCALE / 100)) "$1" "$name" || {
      echo "FAIL $name: status $?"
      worst=1
    }
  done
  return $worst
}
kernels() { each_test "$PROGRAMS/test_kernels"; }
handshake() { each_test "$PROGRAMS/gpu_handshake"; }

# Nearly everything gathers rows in bulk. If that alone fails, all else goes without.
bulk() {
  local gather=(timeout --foreground --kill-after=2 "$((20 * LIMIT_SCALE / 100))"
    "$PROGRAMS/test_kernels" --small GatherIsTheLiteralLoop)
  rm -f "$WITHOUT_BULK"
  JAX_FUSCO_BULK_COPIES=1 "${gather[@]}" && return
  JAX_FUSCO_BULK_COPIES=0 "${gather[@]}" || return
  touch "$WITHOUT_BULK"
  echo "Bulk copies fail, words do not: every later step runs with JAX_FUSCO_BULK_COPIES=0."
  return 1
}

# tests/conftest.py is for CPU devices. Another JAX than CI's may warn of something. Several processes
# share a GPU: none may take all its memory. Products of float32 are of float32.
gpu_pytest() {
  local limits=()  # a test that hangs in native code is ended by the thread method alone
  $PYTHON -c 'import pytest_timeout' 2> /dev/null && limits=(--timeout=60 --timeout-method=thread)
  XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_DEFAULT_MATMUL_PRECISION=highest \
    $PYTHON -m pytest --confcutdir=tests/gpu -p no:cacheprovider -W default -q --tb=short \
    --durations=5 ${limits[@]+"${limits[@]}"} "$@"
}
# Most of their time goes to compiling, one program on one core. Ranks on several GPUs wait for each
# other, and with them whoever else is there.
api() {
  local workers=()
  if [ "$(nvidia-smi -L | wc -l)" = 1 ] && $PYTHON -c 'import xdist' 2> /dev/null; then
    workers=(-n "$WORKERS")
  fi
  gpu_pytest ${workers[@]+"${workers[@]}"} tests/gpu --ignore=tests/gpu/test_processes.py
}
api_graphs() { XLA_FLAGS=$GRAPHS api; }
processes() { gpu_pytest tests/gpu/test_processes.py; }

sanitizer() { compute-sanitizer --error-exitcode 9 --print-limit 20 "$@" "$PROGRAMS/test_kernels" --small; }
memcheck() { sanitizer --tool memcheck; }
racecheck() { sanitizer --tool racecheck; }

bench_kernels() { "$PROGRAMS/bench_kernels" "$MEASURED/kernels.json" "${ROUNDS:-11}"; }
bench_jax() {  # label, JSON, XLA_FLAGS
  XLA_FLAGS=$3 $PYTHON benchmarks/gpu/bench_jax.py measure --label "$1" --out "$MEASURED/$2" \
    --budget 150
}
bench_jax_plain() { bench_jax "no CUDA graphs" jax.json "$NO_GRAPHS"; }
bench_jax_graphs() { bench_jax "CUDA graphs" jax_graphs.json "$GRAPHS"; }
picture() {
  local found=()
  for name in jax.json jax_graphs.json; do
    [ -e "$MEASURED/$name" ] && found+=("$MEASURED/$name")
  done
  $PYTHON benchmarks/gpu/bench_jax.py show --picture "$MEASURED/gpu.png" \
    --kernels "$MEASURED/kernels.json" ${found[@]+"${found[@]}"}
}

# name, seconds it may take
STEPS="
machine 30
build 200
bulk 45
kernels 130
handshake 45
bench_kernels 110
modules 40
api 120
bench_jax_plain 190
bench_jax_graphs 190
picture 30
processes 150
api_graphs 120
memcheck 100
racecheck 100
doctor 30
"

if [ "${1:-}" = --step ]; then  # a step runs in a shell of its own, which can be ended
  "$2"
  exit
fi
if [ "${1:-}" = --list ]; then
  awk 'NF { print $1 }' <<< "$STEPS"
  exit
fi
FINISHED=$BUILD/finished  # the steps that a run came to, whatever became of them; built if it was
continued=no
if [ "${1:-}" = --continue ]; then
  continued=yes
  shift
elif [ $# = 0 ]; then
  rm -rf "$FINISHED" "$WITHOUT_BULK" "${MEASURED:?}"/*
fi
touch "$FINISHED"
for wanted in "$@"; do
  grep -q "^$wanted " <<< "$STEPS" || { echo "run.sh: no step $wanted; see --list" >&2; exit 2; }
done

worst=0
if [ $continued = no ] || [ ! -e "$OUT/summary.txt" ]; then
  : > "$OUT/log.txt"
  printf '%-18s %-10s %s\n' step result seconds > "$OUT/summary.txt"
fi
note() { printf '%-18s %-10s %s\n' "$@" | tee -a "$OUT/summary.txt"; }

while read -r name limit; do
  [ -n "$name" ] || continue
  case " ${*:-$name} " in *" $name "*) ;; *) continue ;; esac
  [ $continued = no ] || ! grep -qx "$name" "$FINISHED" || continue
  limit=$((limit * LIMIT_SCALE / 100))
  left=$((BUDGET - SECONDS))
  if [ "$left" -lt 5 ]; then
    note "$name" "no time" 0
    worst=1
    continue
  fi
  cut=no
  [ "$limit" -le "$left" ] || { limit=$left; cut=yes; }
  begin=$SECONDS
  printf '\n===== %s\n' "$name" >> "$OUT/log.txt"
  at=$(wc -l < "$OUT/log.txt")
  # An interrupt lets pytest say what has failed so far.
  timeout --signal=INT --kill-after=10 "$limit" "$BASH" tests/gpu/run.sh --step "$name" \
    < /dev/null >> "$OUT/log.txt" 2>&1
  status=$?
  cp "$MEASURED"/* "$OUT/" 2> /dev/null
  case $name-$cut$status in
    *-yes124 | *-yes137 | build-*[1-9]* | modules-*[1-9]*) ;;
    *) echo "$name" >> "$FINISHED" ;;
  esac
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
