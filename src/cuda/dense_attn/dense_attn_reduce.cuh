// dense_attn_reduce: the partial dK or dV of a split group, summed in the order of the splits.
//
// Bound   memory: splits * 4 bytes in, 2 out an element.
#pragma once
#include "base/cuda_check.h"
#include "cuda/dense_attn/dense_attn.h"
#include "cuda/device/tile_sm80.cuh"

namespace fsattn {

inline constexpr int kReduceThreads = 256;

struct DenseReduceParams {
  const float* partial;  // [splits, partial_rows, heads, cols]
  Rows out;
  int splits;
  int64_t partial_rows;  // rows behind them are zero
  int64_t rows;
  int heads;
  int cols;  // a multiple of 8
  bool accumulate;
};

// A thread sums eight columns.
template <class Element>
__global__ void __launch_bounds__(kReduceThreads)
    dense_attn_reduce_kernel(const __grid_constant__ DenseReduceParams p) {
  const int chunks = p.cols / 8;
  const int64_t index = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x;
  const int64_t row = index / (p.heads * chunks);
  if (row >= p.rows) return;
  const int head = static_cast<int>(index / chunks % p.heads);
  const int col = static_cast<int>(index % chunks) * 8;
  float sum[8] = {};
  if (row < p.partial_rows) {
    for (int i = 0; i < p.splits; ++i) {
      const auto* from = reinterpret_cast<const float4*>(
          p.partial + ((i * p.partial_rows + row) * p.heads + head) * p.cols + col);
      const float4 x = from[0], y = from[1];
      const float part[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] += part[e];
    }
  }
  const uint4 packed = {
      device::pack_pair<Element>(sum[0], sum[1]), device::pack_pair<Element>(sum[2], sum[3]),
      device::pack_pair<Element>(sum[4], sum[5]), device::pack_pair<Element>(sum[6], sum[7])};
  auto* to = reinterpret_cast<uint4*>(static_cast<Element*>(p.out.data) + row * p.out.token_stride +
                                      head * p.out.head_stride + col);
  *to = p.accumulate ? device::add_packed<Element>(*to, packed) : packed;
}

}  // namespace fsattn
