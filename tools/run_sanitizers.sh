#!/usr/bin/env bash
# Builds the C++ library and its tests with the address and undefined-behaviour sanitizers, then with
# the thread sanitizer, and runs the tests. CPU only. usage: tools/run_sanitizers.sh [address|thread]
set -euo pipefail
cd "$(dirname "$0")/.."
which=${1:-all}
jobs=${JOBS:-$(nproc)}

run() {  # name, CMake value
  cmake -S . -B "build/$1" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFSATTN_BUILD_TESTS=ON \
    -DFSATTN_BUILD_TORCH=OFF -DFSATTN_CUDA=OFF -DFSATTN_INSTALL=OFF -DFSATTN_SANITIZE="$2"
  cmake --build "build/$1" -j "$jobs"
  ctest --test-dir "build/$1" --output-on-failure -E 'headers|layers'
}

export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export TSAN_OPTIONS=halt_on_error=1
[ "$which" = thread ] || run asan address,undefined
[ "$which" = address ] || run tsan thread
