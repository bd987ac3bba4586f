// dense_attn_round_dq: the sums of dQ of dense_attn_bwd_sm90.cuh, scaled, rounded and put in order.
//
// Tiles   one CTA per (64 queries of a sequence, head).
// Bound   memory: 4 bytes in, 2 out an element.
#pragma once
#include "cuda/dense_attn/query_tile.cuh"

namespace fsattn {

inline constexpr int kRoundThreads = 256;

template <class Element>
__global__ void __launch_bounds__(kRoundThreads)
    dense_attn_round_dq_kernel(const __grid_constant__ AttnBwdTensors p,
                               const __grid_constant__ device::KeySet keys,
                               const __grid_constant__ DenseBwdBuffers buffers) {
  __shared__ QueryTileWork work;
  __shared__ bool has_sums;
  if (threadIdx.x == 0) {
    work = find_query_tile<kTurnQueries>(p, keys);
    // Tiles are numbered from the last one on here.
    const int num_heads = static_cast<int>(p.shape.num_heads_q);
    const int tile = gridDim.x / num_heads - 1 - blockIdx.x / num_heads;
    const int64_t turn = 1 + int64_t{tile} * num_heads + work.head;
    has_sums = buffers.turns[turn] > 0;
  }
  __syncthreads();
  const int chunk = threadIdx.x % 16;
  if (chunk * 8 >= p.shape.head_dim) return;
  const float scale = static_cast<float>(p.shape.softmax_scale);
#pragma unroll
  for (int i = 0; i < kTurnQueries / (kRoundThreads / 16); ++i) {
    const int row = i * (kRoundThreads / 16) + threadIdx.x / 16;
    if (row >= work.num_queries) return;
    uint4 x{};
    if (has_sums) {
      const auto* from = reinterpret_cast<const float4*>(
          buffers.dq_sums + (work.head * p.packing.total_q + work.token + row) * 128 +
          ((chunk ^ (row & 7)) * 8));
      const float4 a = from[0], b = from[1];
      x = {device::pack_pair<Element>(a.x * scale, a.y * scale),
           device::pack_pair<Element>(a.z * scale, a.w * scale),
           device::pack_pair<Element>(b.x * scale, b.y * scale),
           device::pack_pair<Element>(b.z * scale, b.w * scale)};
    }
    auto* to = reinterpret_cast<uint4*>(static_cast<Element*>(p.dq.data) +
                                        (work.token + row) * p.dq.token_stride +
                                        work.head * p.dq.head_stride + chunk * 8);
    *to = p.accumulate_dq ? device::add_packed<Element>(*to, x) : x;
  }
}

}  // namespace fsattn
