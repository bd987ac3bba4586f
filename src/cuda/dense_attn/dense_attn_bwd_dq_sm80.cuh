// dense_attn_bwd_dq: the gradient of q over an interval of keys.
//
// Math     P = exp(S - lse),  dP = dO V^T,  dS = P * (dP - delta),  dQ = softmax_scale dS K.
// Shapes   params/attention.h; delta: dense_attn_delta.cuh; the visible interval: device/band.h.
// Tiles    one CTA of 4 warps per (128 queries, head), 32 keys a step in two stages. A warp owns 32
//          rows: S, dP and dQ take 32 + 32 + 128 registers. 64 queries where a head dim exceeds
//          128; 16 keys at head_dim 256 on a device with 99 KiB of shared memory.
// Memory   Q, dO and two stages of K and V: 96 KB at head_dim 128, two CTAs an SM.
// Bound    tensor cores: 768 FLOP a (query, key) at head_dim 128.
// Numbers  scores, dP and dQ fp32; dS rounded to the input type before dS K. No atomics.
#pragma once
#include "base/cuda_check.h"
#include "cuda/dense_attn/query_tile.cuh"
#include "cuda/device/softmax.cuh"
#include "cuda/device/tile_sm80.cuh"

namespace fsattn {

template <DenseAttnConfig kConfig>
struct DenseDqTraits {
  using Element = device::ElementOf<kConfig.dtype>;
  static constexpr int kDim = kConfig.head_dim, kDimV = kConfig.head_dim_v;
  static constexpr int kM = kDim <= 128 ? 2 : 1;
  static constexpr int kRowsPerWarp = 16 * kM;
  static constexpr int kWarps = 4, kThreads = kWarps * device::kWarpSize;
  static constexpr int kTileQ = kWarps * kRowsPerWarp, kStages = 2;
  static constexpr int kTileKv = kDim > 192 && kConfig.smem_kib < 163 ? 16 : 32;
  static constexpr int kMinCtas = kDim <= 192 ? 2 : 1;
  static constexpr int kQBytes = device::tile_bytes<kDim>(kTileQ);
  static constexpr int kDoutBytes = device::tile_bytes<kDimV>(kTileQ);
  static constexpr int kKBytes = device::tile_bytes<kDim>(kTileKv);
  static constexpr int kStageBytes = kKBytes + device::tile_bytes<kDimV>(kTileKv);
  static constexpr int kSmemBytes = kQBytes + kDoutBytes + kStages * kStageBytes;
  static_assert(kSmemBytes + kTileQ * 8 + 128 + sizeof(QueryTileWork) <= kConfig.smem_kib * 1024);
  static_assert(kDimV <= kDim && kTileQ <= kThreads);
};

// lse in base 2 and delta of each query. A row without keys, or behind the sequence, must get P =
// 0: its lse is +inf.
template <int kTileQ>
__device__ __forceinline__ void load_statistics(float2* stats, const AttnBwdTensors& p,
                                                const float* deltas, const QueryTileWork& work) {
  const int row = threadIdx.x;
  if (row >= kTileQ) return;
  float2 x{INFINITY, 0.f};
  if (row < work.num_queries) {
    const int64_t token = work.token + row;
    const float lse = static_cast<const float*>(p.lse.data)[work.head * p.lse.head_stride + token];
    if (lse != -INFINITY) x.x = lse * device::kLog2E;
    x.y = deltas[work.head * p.packing.total_q + token];
  }
  stats[row] = x;
}

// dS, rounded and packed. s and dp belong to the same rows and keys; `stats`: of the lane's first
// row.
template <class Element, int kM, int kN>
__device__ __forceinline__ void score_gradient(uint32_t (&ds)[kM][kN][2],
                                               const float (&s)[kM][kN][4],
                                               const float (&dp)[kM][kN][4], const float2* stats,
                                               float scale_log2) {
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i) {
    const int m = i / 2, e = i % 2 * 2;
    const auto [lse_log2, delta] = stats[i * 8];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float p0 = device::probability(s[m][n][e], scale_log2, lse_log2);
      const float p1 = device::probability(s[m][n][e + 1], scale_log2, lse_log2);
      ds[m][n][i % 2] =
          device::pack_pair<Element>(p0 * (dp[m][n][e] - delta), p1 * (dp[m][n][e + 1] - delta));
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    dense_attn_bwd_dq_kernel(const __grid_constant__ AttnBwdTensors p,
                             const __grid_constant__ device::KeySet keys,
                             const float* __restrict__ deltas) {
  using namespace device;
  using Element = typename Traits::Element;
  constexpr int kM = Traits::kM, kN = Traits::kTileKv / 8, kThreads = Traits::kThreads;
  constexpr int kTileKv = Traits::kTileKv;
  extern __shared__ __align__(128) unsigned char smem[];
  __shared__ QueryTileWork shared_work;
  __shared__ float2 stats[Traits::kTileQ];
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  if (thread == 0) shared_work = find_query_tile<Traits::kTileQ>(p, keys);
  __syncthreads();
  // Read where it is used, which keeps registers free for the loop.
  const QueryTileWork& work = shared_work;
  if (work.num_queries <= 0) return;

  const uint32_t q_tile = smem_address(smem), dout_tile = q_tile + Traits::kQBytes,
                 stages = dout_tile + Traits::kDoutBytes;
  const int row = warp * Traits::kRowsPerWarp;
  const uint32_t q_rows = q_tile + tile_bytes<Traits::kDim>(row);
  float dq[kM][Traits::kDim / 8][4] = {};

  if (work.first_key <= work.last_key) {
    int step = work.last_key / kTileKv;
    const auto stage_of = [&](int at) { return stages + at % 2 * Traits::kStageBytes; };
    const auto load_keys = [&](int at) {
      const uint32_t stage = stage_of(at);
      load_rows<kTileKv, Traits::kDim, kThreads, Element>(stage, p.k, work.k_offset, work.num_keys,
                                                          p.shape.head_dim, at * kTileKv);
      load_rows<kTileKv, Traits::kDimV, kThreads, Element>(stage + Traits::kKBytes, p.v,
                                                           work.v_offset, work.num_keys,
                                                           p.shape.head_dim_v, at * kTileKv);
      cp_async_commit();
    };
    load_rows<Traits::kTileQ, Traits::kDim, kThreads, Element>(
        q_tile, p.q, work.token * p.q.token_stride + work.head * p.q.head_stride, work.num_queries,
        p.shape.head_dim, 0);
    load_rows<Traits::kTileQ, Traits::kDimV, kThreads, Element>(
        dout_tile, p.dout, work.token * p.dout.token_stride + work.head * p.dout.head_stride,
        work.num_queries, p.shape.head_dim_v, 0);
    load_keys(step);

    load_statistics<Traits::kTileQ>(stats, p, deltas, work);
    const uint32_t q_lane = lane_rows16<Traits::kDim>(q_rows, lane);
    const uint32_t dout_lane =
        lane_rows16<Traits::kDimV>(dout_tile + tile_bytes<Traits::kDimV>(row), lane);

    for (; step >= work.first_key / kTileKv; --step) {
      cp_async_wait<0>();
      __syncthreads();  // this stage has landed, and nobody reads the other one
      if (step > work.first_key / kTileKv) load_keys(step - 1);
      const uint32_t stage = stage_of(step);
      float s[kM][kN][4] = {}, dp[kM][kN][4] = {};
      mma_a_bt<Element, Traits::kDim, Traits::kDim>(s, q_lane,
                                                    lane_rows8x2<Traits::kDim>(stage, lane));
      mma_a_bt<Element, Traits::kDimV, Traits::kDimV>(
          dp, dout_lane, lane_rows8x2<Traits::kDimV>(stage + Traits::kKBytes, lane));
      const int base = step * kTileKv;
      if (base < work.full_first || base + kTileKv - 1 > work.full_last) {
        mask_scores(s, keys.band, work, base);
      }
      uint32_t ds[kM][kN][2];
      score_gradient<Element>(ds, s, dp, stats + row + lane / 4, work.scale_log2);
      mma_p_b<Element, Traits::kDim>(dq, ds, lane_rows16<Traits::kDim>(stage, lane));
    }
  }

  const float scale = static_cast<float>(p.shape.softmax_scale);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) dq[m][n][e] *= scale;
    }
  }
  // The warp's own query rows become its output stage; no other warp reads them.
  __syncwarp();
  store_rows(
      OutputRows<Element>{static_cast<Element*>(p.dq.data) +
                              (work.token + row) * p.dq.token_stride + work.head * p.dq.head_stride,
                          p.dq.token_stride, work.num_queries - row,
                          static_cast<int>(p.shape.head_dim), p.accumulate_dq},
      q_rows, dq, lane);
}

}  // namespace fsattn
