#!/usr/bin/env bash
# Compiles every CUDA source for sm_80, sm_90 and sm_90a into the release build. A register spill or a
# warning of ptxas fails it (cmake/FsattnKernels.cmake). Needs nvcc, no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
make build CMAKE_ARGS="-DFSATTN_CUDA=ON -DFSATTN_WERROR=ON"
if command -v cuobjdump > /dev/null; then
  echo "machine code in the library, kernels an architecture:"
  cuobjdump --list-elf build/release/src/libfsattn.a | grep -o 'sm_[0-9a]*' | sort | uniq -c
fi
