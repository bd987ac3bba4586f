#!/usr/bin/env bash
# Compiles every CUDA source for sm_80, sm_90 and sm_90a. A register spill or a warning of ptxas fails
# the build (cmake/FsattnKernels.cmake). Needs nvcc, no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
cmake -S . -B build/cuda -G Ninja -DCMAKE_BUILD_TYPE=Release -DFSATTN_CUDA=ON \
  -DFSATTN_BUILD_TESTS=OFF -DFSATTN_BUILD_TORCH=OFF
cmake --build build/cuda -j "${JOBS:-$(nproc)}"
cuobjdump --list-elf build/cuda/src/libfsattn.a 2> /dev/null | grep -o 'sm_[0-9a]*' | sort | uniq -c
