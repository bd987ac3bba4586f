#!/usr/bin/env bash
# Everything that needs a GPU to be checked, in one command: build, kernel tests, Python tests, and the
# four tools of compute-sanitizer on small cases. Ends with a table of steps; fails if one failed.
# Without a GPU it builds and says what it skipped. usage: tools/check_gpu.sh [step name part]...
#   PYTHON     interpreter with PyTorch, numpy and pytest; default .venv/bin/python, else python3
#   BUILD_DIR  default build/gpu; logs of the steps go to its folder check/
#   JOBS       parallel compilations and sanitizer runs; default all cores
set -uo pipefail
cd "$(dirname "$0")/.."
default_python=python3
[ -x .venv/bin/python ] && default_python=$PWD/.venv/bin/python
PYTHON=${PYTHON:-$default_python}
BUILD_DIR=${BUILD_DIR:-build/gpu}
JOBS=${JOBS:-$(nproc)}
WANTED=("$@")
LOGS=$BUILD_DIR/check
[ -d "$PWD/.venv/bin" ] && PATH=$PWD/.venv/bin:$PATH
export PATH=$PATH:/usr/local/cuda/bin PYTHONPATH=$PWD/python
mkdir -p "$LOGS"

table=()
num_failed=0
note() { table+=("$(printf '%-26s %-9s %7s' "$1" "$2" "$3")"); }

is_wanted() {
  [ ${#WANTED[@]} -eq 0 ] && return 0
  local part
  for part in "${WANTED[@]}"; do [[ $1 == *"$part"* ]] && return 0; done
  return 1
}

# step <name> <command>...: a failing step is shown and the next one runs.
step() {
  local name=$1 start=$SECONDS result=passed
  local log=$LOGS/${name// /_}.log
  shift
  is_wanted "$name" || return 0
  echo "== $name"
  if ! "$@" > "$log" 2>&1; then
    result=FAILED
    num_failed=$((num_failed + 1))
    tail -n 40 "$log"
    echo "-- log: $log"
  fi
  note "$name" "$result" "$((SECONDS - start))"
}

finish() {
  printf '\n%-26s %-9s %7s\n' step result seconds
  printf '%s\n' "${table[@]}"
  [ "$num_failed" -eq 0 ]
  exit
}

build() {
  cmake -S . -B "$BUILD_DIR" -G "$(command -v ninja > /dev/null && echo Ninja || echo 'Unix Makefiles')" \
    -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_COMPILER="$(command -v nvcc)" -DFSATTN_CUDA=ON \
    -DFSATTN_BUILD_TESTS=ON -DFSATTN_BUILD_TORCH=ON -DPython_EXECUTABLE="$(command -v "$PYTHON")" &&
    cmake --build "$BUILD_DIR" -j "$JOBS"
}

# Tests that use much of the GPU's memory or measure it run one at a time; the others share the GPU
# where pytest-xdist is there. Those of the CPU alone are `make test`'s.
run_pytest() { "$PYTHON" -m pytest tests/python -q -rsfE -p no:cacheprovider -k cuda "$@"; }
python_tests() {
  local workers=()
  "$PYTHON" -c 'import xdist' 2> /dev/null && workers=(-n 4)
  run_pytest -m "not alone" "${workers[@]}"
}
python_tests_alone() { run_pytest -m alone; }

# What racecheck leaves out, by parts of names. Hopper kernels: one lane arrives on a barrier for its warp,
# behind __syncwarp(); racecheck credits an arrival to its thread alone and reports the other lanes'
# accesses. Decoding: docs/kernels/decode.md.
export BARRIER_KERNELS='regex=sm90|wgmma|selected_attn_fwd_tiles|decode_'

# sanitize <tool> <program>...: what it printed in one piece, since several run at a time; its summary
# alone if nothing was found.
sanitize() {
  local tool=$1 options=() output status
  shift
  [ "$tool" = racecheck ] && options=(--kernel-name-exclude "$BARRIER_KERNELS")
  output=$(timeout 600 compute-sanitizer --tool "$tool" "${options[@]}" --error-exitcode 1 \
    --print-limit 5 "$@" 2>&1)
  status=$?
  [ "$status" -eq 0 ] && output=${output##*$'\n'}
  printf -- '-- %s %s\n%s\n-- exit status %s\n' "$tool" "$*" "$output" "$status"
  return "$status"
}
export -f sanitize

# Shell commands, one a line of the input, side by side. Fails if one does.
side_by_side() { xargs -d '\n' -n 1 -P "$JOBS" bash -c; }

# The C++ programs with arguments that choose small cases. racecheck would take minutes for those of
# whole operators: run_operators.py has their kernels on one small batch.
sanitize_kernels() {
  local programs=("test_device_mma" "test_device_util" "test_device_sm90 sm90")
  [[ $1 != racecheck ]] && programs+=(
    "test_decode ragged" "test_dense_attn tiny" "test_dense_attn sm90 tiny" "test_select_blocks lengths"
    "test_selected_fwd hostile" "test_selected_bwd hostile")
  printf "sanitize $1 $BUILD_DIR/tests/kernels/%s\n" "${programs[@]}" | side_by_side
}

# Without PyTorch's cache every tensor is an allocation of its own, so an access behind it is seen.
# Wrong lengths are about such accesses: they are memcheck's alone. With head_dim 128 Hopper adds up dQ by
# bulk copies, which initcheck does not count as writes.
sanitize_operators() {
  local dim dims="64 128" parts=valid
  [[ $1 == memcheck ]] && parts=
  [[ $1 == initcheck ]] && dims=64
  for dim in $dims; do
    echo "DIM=$dim PYTORCH_NO_CUDA_MEMORY_CACHING=1" \
      "sanitize $1 '$PYTHON' tests/kernels/run_operators.py cuda $parts"
  done | side_by_side
}

if ! command -v nvcc > /dev/null; then
  echo "nvcc: must be on the PATH or in /usr/local/cuda/bin" >&2
  exit 1
fi
start=$SECONDS
echo "== build"
if ! build > "$LOGS/build.log" 2>&1; then
  tail -n 40 "$LOGS/build.log"
  num_failed=1
  note build FAILED "$((SECONDS - start))"
  finish
fi
note build passed "$((SECONDS - start))"

if ! nvidia-smi -L > /dev/null 2>&1; then
  for name in "kernel tests" "python tests" "python tests alone" memcheck racecheck initcheck \
    synccheck; do
    note "$name" skipped 0
  done
  echo "skipped: no CUDA device"
  finish
fi

step "kernel tests" ctest --test-dir "$BUILD_DIR" -L gpu --output-on-failure
step "python tests" python_tests
step "python tests alone" python_tests_alone
for tool in memcheck racecheck initcheck synccheck; do
  if ! command -v compute-sanitizer > /dev/null; then
    note "$tool" skipped 0
    continue
  fi
  step "$tool kernels" sanitize_kernels "$tool"
  step "$tool operators" sanitize_operators "$tool"
done
finish
