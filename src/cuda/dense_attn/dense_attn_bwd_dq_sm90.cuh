// dense_attn_bwd_dq, sm_90a: the gradient of q with wgmma and producer warps.
//
// Math     as dense_attn_bwd_dq_sm80.cuh.
// Shapes   head_dim and head_dim_v up to 128.
// Tiles    one CTA per (128 queries of a sequence, head), 64 keys a step.
// Roles    two consumer warpgroups of 64 queries each: S and dP with both operands in shared
//          memory, dQ with dS in registers. dP is computed during the exponentials of S. Two
//          producer warps copy K, two V.
// Memory   Q and dO 64 KB, four stages of K and V 128 KB, one CTA an SM.
// Regs     dQ 64, S 32, dP 32: 240 a consumer thread, 24 a producer thread.
// Bound    tensor cores: 768 FLOP a (query, key) at head_dim 128.
// Numbers  as dense_attn_bwd_dq_sm80.cuh.
#pragma once
#include "cuda/dense_attn/dense_attn_bwd_dq_sm80.cuh"
#include "cuda/device/panels_sm90.cuh"

namespace fsattn {

template <DenseAttnConfig kConfig>
struct DenseDqSm90Traits {
  using Element = device::ElementOf<kConfig.dtype>;
  static_assert(kConfig.head_dim == device::kPanelDim && kConfig.head_dim_v == device::kPanelDim);
  static constexpr int kGroups = 2, kTileQ = kGroups * device::kPanelRows,
                       kTileKv = device::kPanelRows;
  static constexpr int kStages = 4;
  static constexpr int kConsumerThreads = kGroups * 128, kThreads = kConsumerThreads + 128;
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
  static constexpr int kStageOffset = 2 * kGroups * device::kPanelTileBytes;
  static constexpr int kStageBytes = 2 * device::kPanelTileBytes;  // K, then V
  static constexpr int kBarrierOffset = kStageOffset + kStages * kStageBytes;
  static constexpr int kSmemBytes = kBarrierOffset + 2 * kStages * 8;
};

template <class Traits>
struct DenseDqSm90Smem {
  uint32_t base;
  // Operand 0 is Q, 1 is dO.
  __device__ uint32_t queries(int operand, int group) const {
    return base + (operand * Traits::kGroups + group) * device::kPanelTileBytes;
  }
  // Operand 0 is K, 1 is V.
  __device__ uint32_t keys(int operand, int stage) const {
    return base + Traits::kStageOffset + stage * Traits::kStageBytes +
           operand * device::kPanelTileBytes;
  }
  __device__ uint32_t full(int stage) const { return base + Traits::kBarrierOffset + stage * 8; }
  __device__ uint32_t empty(int stage) const { return full(stage) + Traits::kStages * 8; }
};

// Two warps bring all tiles of K, or of V. A tile is announced when the next one is under way.
template <class Traits>
__device__ __forceinline__ void produce_keys(const DenseDqSm90Smem<Traits>& smem,
                                             const AttnBwdTensors& p, const QueryTileWork& work) {
  using namespace device;
  using Element = typename Traits::Element;
  const int thread = threadIdx.x % 64, lane = threadIdx.x % kWarpSize;
  const int operand = threadIdx.x / 64 % 2;
  const Rows& rows = operand == 0 ? p.k : p.v;
  const MatrixView<Element> matrix{
      static_cast<const Element*>(rows.data) + (operand == 0 ? work.k_offset : work.v_offset),
      rows.token_stride, work.num_keys,
      static_cast<int>(operand == 0 ? p.shape.head_dim : p.shape.head_dim_v)};
  const auto part = thread_part(matrix, thread);
  const auto announce = [&](int n) {
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(smem.full(n % Traits::kStages));
  };
  const int first_step = work.first_key / Traits::kTileKv;
  int n = 0;
  for (int step = work.last_key / Traits::kTileKv; step >= first_step; --step, ++n) {
    const int stage = n % Traits::kStages;
    // The consumers have left the tile that was here before; passes at once in the first round.
    mbarrier_wait(smem.empty(stage), (n / Traits::kStages & 1) ^ 1);
    device::load_panels<64>(smem.keys(operand, stage), part, step * Traits::kTileKv, thread);
    cp_async_commit();
    if (n > 0) {
      cp_async_wait<1>();
      announce(n - 1);
    }
  }
  cp_async_wait<0>();
  announce(n - 1);
}

// Scores to P in place. `stats`: lse in base 2 and delta, of the lane's first row.
template <class Element>
__device__ __forceinline__ void exponentiate(float (&s)[1][8][4], const float2* stats,
                                             float scale_log2) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float lse_log2 = stats[half * 8].x;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        s[0][n][e] = device::probability<Element>(s[0][n][e], scale_log2, lse_log2);
      }
    }
  }
}

template <class Element>
__device__ __forceinline__ void pack_score_gradient(uint32_t (&ds)[1][8][2],
                                                    const float (&prob)[1][8][4],
                                                    const float (&dp)[1][8][4],
                                                    const float2* stats) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float delta = stats[half * 8].y;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      ds[0][n][half] =
          device::pack_pair<Element>(prob[0][n][2 * half] * (dp[0][n][2 * half] - delta),
                                     prob[0][n][2 * half + 1] * (dp[0][n][2 * half + 1] - delta));
    }
  }
}

// One warpgroup: 64 queries over all steps.
template <class Traits>
__device__ __forceinline__ void consume_keys(const DenseDqSm90Smem<Traits>& smem,
                                             const device::Band& band, const QueryTileWork& work,
                                             const float2* stats, float (&dq)[64]) {
  using namespace device;
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % kWarpSize, group = threadIdx.x / 128;
  const uint32_t q_tile = smem.queries(0, group), dout_tile = smem.queries(1, group);
  // The keys that some query of this group sees.
  const int first_position = work.position + group * device::kPanelRows;
  const int first_seen = band.first_key(first_position);
  const int last_seen = band.last_key(first_position + device::kPanelRows - 1);
  int n = 0;
  for (int step = work.last_key / Traits::kTileKv; step >= work.first_key / Traits::kTileKv;
       --step, ++n) {
    const int stage = n % Traits::kStages, base = step * Traits::kTileKv;
    mbarrier_wait(smem.full(stage), n / Traits::kStages & 1);
    const bool is_seen = base <= last_seen && base + Traits::kTileKv > first_seen;
    if (!is_seen) wgmma_wait_group<0>();
    if (!is_seen && n > 0 && lane == 0) mbarrier_arrive(smem.empty((n - 1) % Traits::kStages));
    if (is_seen) {
      float s[32], dp[32];
      wgmma_fence();
      device::panel_product<Element>(s, q_tile, smem.keys(0, stage));
      wgmma_commit();
      device::panel_product<Element>(dp, dout_tile, smem.keys(1, stage));
      wgmma_commit();
      wgmma_wait_group<1>();  // S, and dQ of the step before; dP goes on
      pin_registers(s);
      if (n > 0 && lane == 0) mbarrier_arrive(smem.empty((n - 1) % Traits::kStages));
      if (base < work.full_first || base + Traits::kTileKv - 1 > work.full_last) {
        mask_scores(device::as_fragments(s), band, work, base);
      }
      exponentiate<Element>(device::as_fragments(s), stats, work.scale_log2);
      wgmma_wait_group<0>();
      pin_registers(dp);
      uint32_t ds[1][8][2];
      pack_score_gradient<Element>(ds, device::as_fragments(s), device::as_fragments(dp), stats);
      wgmma_fence();
      device::packed_product<Element>(dq, ds, smem.keys(0, stage));
      wgmma_commit();
    }
  }
  wgmma_wait_group<0>();
  pin_registers(dq);
}

template <class Traits>
__device__ __forceinline__ void run_query_group(const DenseDqSm90Smem<Traits>& smem,
                                                const AttnBwdTensors& p, const device::Band& band,
                                                const QueryTileWork& work, const float2* stats) {
  using namespace device;
  using Element = typename Traits::Element;
  const int thread = threadIdx.x, lane = thread % kWarpSize, row = thread / kWarpSize * 16;
  const int group = thread / 128;
  float dq[64] = {};
  if (work.first_key <= work.last_key) {
    const MatrixView<Element> q{static_cast<const Element*>(p.q.data) +
                                    work.token * p.q.token_stride + work.head * p.q.head_stride,
                                p.q.token_stride, work.num_queries,
                                static_cast<int>(p.shape.head_dim)};
    const MatrixView<Element> dout{
        static_cast<const Element*>(p.dout.data) + work.token * p.dout.token_stride +
            work.head * p.dout.head_stride,
        p.dout.token_stride, work.num_queries, static_cast<int>(p.shape.head_dim_v)};
    device::load_panels<128>(smem.queries(0, group), thread_part(q, thread % 128),
                             group * device::kPanelRows, thread % 128);
    device::load_panels<128>(smem.queries(1, group), thread_part(dout, thread % 128),
                             group * device::kPanelRows, thread % 128);
    cp_async_commit();
    cp_async_wait<0>();
    fence_async_proxy();
    device::sync_warpgroup(group);  // all four warps have loaded their part of Q and dO
    consume_keys<Traits>(smem, band, work, stats + row + lane / 4, dq);
    device::sync_warpgroup(group);  // nobody's wgmma reads Q any more: it becomes the output stage
  }
  const float scale = static_cast<float>(p.shape.softmax_scale);
#pragma unroll
  for (int i = 0; i < 64; ++i) dq[i] *= scale;
  store_rows(
      OutputRows<Element>{static_cast<Element*>(p.dq.data) +
                              (work.token + row) * p.dq.token_stride + work.head * p.dq.head_stride,
                          p.dq.token_stride, work.num_queries - row,
                          static_cast<int>(p.shape.head_dim), p.accumulate_dq},
      smem.queries(0, group) + tile_bytes<device::kPanelDim>(row % device::kPanelRows),
      device::as_fragments(dq), lane);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    dense_attn_bwd_dq_sm90_kernel(const __grid_constant__ AttnBwdTensors p,
                                  const __grid_constant__ device::KeySet keys,
                                  const float* __restrict__ deltas) {
  using namespace device;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ QueryTileWork work;
  __shared__ float2 stats[Traits::kTileQ];
  const DenseDqSm90Smem<Traits> smem{smem_address(memory)};
  if (threadIdx.x == 0) {
    work = find_query_tile<Traits::kTileQ>(p, keys);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      mbarrier_init(smem.full(stage), 4);  // the producer warps
      mbarrier_init(smem.empty(stage), Traits::kConsumerThreads / kWarpSize);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (work.num_queries <= 0) return;
  load_statistics<Traits::kTileQ>(stats, p, deltas, work);
  __syncthreads();
  if (threadIdx.x < Traits::kConsumerThreads) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Traits::kConsumerRegisters));
    run_query_group<Traits>(smem, p, keys.band, work, stats);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Traits::kProducerRegisters));
    if (work.first_key <= work.last_key) produce_keys<Traits>(smem, p, work);
  }
}

}  // namespace fsattn
