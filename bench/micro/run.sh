#!/usr/bin/env bash
# Builds and runs the microbenchmarks on the first GPU (sm_90a: Hopper only).
# usage: bench/micro/run.sh [reduce|gather|wgmma|overlap|exp2|traffic]...   (all without arguments)
#   OUT  folder for programs and outputs; default build/micro. Each output is <name>.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-build/micro}
names=("$@")
[ ${#names[@]} -gt 0 ] || names=(reduce gather wgmma overlap exp2 traffic)
export PATH=$PATH:/usr/local/cuda/bin
mkdir -p "$out"
for name in "${names[@]}"; do
  nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a "bench/micro/$name.cu" -o "$out/$name"
done
if ! nvidia-smi -L > /dev/null 2>&1; then
  echo "skipped: no CUDA device; the programs are in $out"
  exit 0
fi
for name in "${names[@]}"; do
  {
    echo "# $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1)," \
      "$(nvcc --version | sed -n 's/.*release //p'), $(date -u +%F), bench/micro/run.sh $name"
    "$out/$name"
  } | tee "$out/$name.txt"
done
if grep -l WRONG "$out"/*.txt || grep -lE 'wrong [1-9]' "$out"/*.txt; then
  echo "a result is wrong: its timings mean nothing" >&2
  exit 1
fi
