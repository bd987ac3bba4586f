// dense_attn_bwd_dkv, sm_90a: the gradients of k and v with wgmma and producer warps.
//
// Math     as dense_attn_bwd_dkv_sm80.cuh.
// Shapes   head_dim and head_dim_v up to 128.
// Tiles    one CTA per (128 keys of a sequence, KV head, part of the group's heads), 64 queries a
//          step.
// Roles    two consumer warpgroups of 64 keys each: S and dP with both operands in shared memory,
//          dV and dK with P and dS in registers. dP is computed during the exponentials of S, dV
//          during dS. Two producer warps copy Q and lse, two dO and delta.
// Memory   K and V 64 KB, four stages of Q and dO 128 KB, one CTA an SM.
// Regs     dK 64, dV 64, S 32, dP 32: 240 a consumer thread, 24 a producer thread.
// Bound    tensor cores: 1024 FLOP a (query, key) at head_dim 128.
// Numbers  as dense_attn_bwd_dkv_sm80.cuh.
#pragma once
#include "cuda/dense_attn/dense_attn_bwd_dkv_sm80.cuh"
#include "cuda/device/panels_sm90.cuh"

namespace fsattn {

template <DenseAttnConfig kConfig>
struct DenseDkvSm90Traits {
  using Element = device::ElementOf<kConfig.dtype>;
  static_assert(kConfig.head_dim == device::kPanelDim && kConfig.head_dim_v == device::kPanelDim);
  static constexpr int kGroups = 2, kTileKv = kGroups * device::kPanelRows,
                       kTileQ = device::kPanelRows;
  static constexpr int kStages = 4;
  static constexpr int kConsumerThreads = kGroups * 128, kThreads = kConsumerThreads + 128;
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
  static constexpr int kStageOffset = 2 * kGroups * device::kPanelTileBytes;
  static constexpr int kStageBytes = 2 * device::kPanelTileBytes;  // Q, then dO
  static constexpr int kStatsOffset = kStageOffset + kStages * kStageBytes;
  static constexpr int kStatsBytes = 2 * kTileQ * 4;  // lse, then delta
  static constexpr int kBarrierOffset = kStatsOffset + kStages * kStatsBytes;
  static constexpr int kSmemBytes = kBarrierOffset + 2 * kStages * 8;
};

template <class Traits>
struct DenseDkvSm90Smem {
  unsigned char* memory;
  uint32_t base;
  // Operand 0 is K, 1 is V.
  __device__ uint32_t keys(int operand, int group) const {
    return base + (operand * Traits::kGroups + group) * device::kPanelTileBytes;
  }
  // Operand 0 is Q, 1 is dO.
  __device__ uint32_t queries(int operand, int stage) const {
    return base + Traits::kStageOffset + stage * Traits::kStageBytes +
           operand * device::kPanelTileBytes;
  }
  __device__ int stats_offset(int operand, int stage) const {
    return Traits::kStatsOffset + stage * Traits::kStatsBytes + operand * Traits::kTileQ * 4;
  }
  __device__ const float2* stats(int operand, int stage) const {
    return reinterpret_cast<const float2*>(memory + stats_offset(operand, stage));
  }
  __device__ uint32_t full(int stage) const { return base + Traits::kBarrierOffset + stage * 8; }
  __device__ uint32_t empty(int stage) const { return full(stage) + Traits::kStages * 8; }
};

// Two warps bring all tiles of Q and lse, or of dO and delta. A tile is announced when the next one
// is under way.
template <class Traits>
__device__ __forceinline__ void produce_queries(const DenseDkvSm90Smem<Traits>& smem,
                                                const AttnBwdTensors& p, const float* deltas,
                                                const KeyTileWork& work) {
  using namespace device;
  using Element = typename Traits::Element;
  const int thread = threadIdx.x % 64, lane = threadIdx.x % kWarpSize;
  const int operand = threadIdx.x / 64 % 2;
  const Rows& rows = operand == 0 ? p.q : p.dout;
  const auto announce = [&](int n) {
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(smem.full(n % Traits::kStages));
  };
  int n = 0;
  for (Step at{work.first_head, work.last_query / Traits::kTileQ}; at.head <= work.last_head;
       at = next_step(work, at, Traits::kTileQ), ++n) {
    const int stage = n % Traits::kStages, first = at.index * Traits::kTileQ;
    // The consumers have left the tile that was here before; passes at once in the first round.
    mbarrier_wait(smem.empty(stage), (n / Traits::kStages & 1) ^ 1);
    const MatrixView<Element> matrix{
        static_cast<const Element*>(rows.data) + work.token * rows.token_stride +
            at.head * rows.head_stride,
        rows.token_stride, work.num_queries,
        static_cast<int>(operand == 0 ? p.shape.head_dim : p.shape.head_dim_v)};
    device::load_panels<64>(smem.queries(operand, stage), thread_part(matrix, thread), first,
                            thread);
    const float* stats = operand == 0
                             ? static_cast<const float*>(p.lse.data) + at.head * p.lse.head_stride
                             : deltas + at.head * p.packing.total_q;
    cp_async_4(smem.base + smem.stats_offset(operand, stage) + thread * 4,
               stats + work.token + first + thread, first + thread < work.num_queries);
    cp_async_commit();
    if (n > 0) {
      cp_async_wait<1>();
      announce(n - 1);
    }
  }
  cp_async_wait<0>();
  announce(n - 1);
}

// dS = P * (dP - delta), from the packed P.
template <class Element>
__device__ __forceinline__ void pack_score_gradient(uint32_t (&ds)[1][8][2],
                                                    const float (&dp)[1][8][4],
                                                    const uint32_t (&prob)[1][8][2],
                                                    const float2* delta, int lane) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 d = delta[n * 4 + lane % 4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 x = device::unpack_pair<Element>(prob[0][n][half]);
      ds[0][n][half] = device::pack_pair<Element>(x.x * (dp[0][n][2 * half] - d.x),
                                                  x.y * (dp[0][n][2 * half + 1] - d.y));
    }
  }
}

// One warpgroup: 64 keys over all steps.
template <class Traits>
__device__ __forceinline__ void consume_queries(const DenseDkvSm90Smem<Traits>& smem,
                                                const AttnBwdTensors& p, const device::Band& band,
                                                const KeyTileWork& work, float (&dk)[64],
                                                float (&dv)[64]) {
  using namespace device;
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % kWarpSize, group = threadIdx.x / 128;
  const uint32_t k_tile = smem.keys(0, group), v_tile = smem.keys(1, group);
  int n = 0;
  for (Step at{work.first_head, work.last_query / Traits::kTileQ}; at.head <= work.last_head;
       at = next_step(work, at, Traits::kTileQ), ++n) {
    const int stage = n % Traits::kStages;
    const uint32_t q_tile = smem.queries(0, stage), dout_tile = smem.queries(1, stage);
    mbarrier_wait(smem.full(stage), n / Traits::kStages & 1);
    float s[32], dp[32];
    wgmma_fence();
    device::panel_product<Element>(s, k_tile, q_tile);
    wgmma_commit();
    device::panel_product<Element>(dp, v_tile, dout_tile);
    wgmma_commit();
    wgmma_wait_group<1>();  // S; dP goes on
    pin_registers(s);
    uint32_t prob[1][8][2];
    probabilities<Traits>(prob, device::as_fragments(s), smem.stats(0, stage), work.scale_log2,
                          lane);
    const int base = at.index * Traits::kTileQ;
    if (base < work.full_first || base + Traits::kTileQ - 1 > work.full_last) {
      mask_probabilities(prob, band, work, work.first_key + reread_thread_index() / kWarpSize * 16,
                         base, lane);
    }
    wgmma_fence();
    device::packed_product<Element>(dv, prob, dout_tile);
    wgmma_commit();
    wgmma_wait_group<1>();  // dP; dV goes on
    pin_registers(dp);
    uint32_t ds[1][8][2];
    pack_score_gradient<Element>(ds, device::as_fragments(dp), prob, smem.stats(1, stage), lane);
    wgmma_fence();
    device::packed_product<Element>(dk, ds, q_tile);
    wgmma_commit();
    wgmma_wait_group<0>();
    if (lane == 0) mbarrier_arrive(smem.empty(stage));
  }
  pin_registers(dk);
  pin_registers(dv);
}

// Writes the 16 rows of one warp, staged over the tile of its warpgroup.
template <class Traits, class Smem>
__device__ __forceinline__ void store_key_gradient(const Smem& smem, const AttnBwdTensors& p,
                                                   const DenseBwdBuffers& buffers,
                                                   const KeyTileWork& work, int operand,
                                                   float (&acc)[64]) {
  using namespace device;
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, row = warp * 16;
  const Rows& rows = operand == 0 ? p.dk : p.dv;
  const int cols = static_cast<int>(operand == 0 ? p.shape.head_dim : p.shape.head_dim_v);
  const int64_t partial_stride = p.shape.num_heads_kv * cols;
  float* partial = nullptr;
  if (buffers.splits > 1) {
    partial = (operand == 0 ? buffers.partial_dk : buffers.partial_dv) +
              (int64_t{work.split} * buffers.partial_rows + work.key_row + row) * partial_stride +
              work.kv_head * cols;
  }
  store_gradient(
      device::as_fragments(acc), operand == 0 ? static_cast<float>(p.shape.softmax_scale) : 1.f,
      OutputRows<Element>{static_cast<Element*>(rows.data) +
                              (int64_t{work.key_row} + row) * rows.token_stride +
                              work.kv_head * rows.head_stride,
                          rows.token_stride, work.num_keys - row, cols, p.accumulate_dkv},
      partial, partial_stride,
      smem.keys(operand, warp / 4) + tile_bytes<device::kPanelDim>(warp % 4 * 16), lane);
}

// Copies the 64 rows of K and V of a consumer warpgroup, and waits for the calling thread's part.
template <class Element, class Smem>
__device__ __forceinline__ void load_key_group(const Smem& smem, const AttnBwdTensors& p,
                                               const KeyTileWork& work, int group) {
  using namespace device;
  const int thread = threadIdx.x % 128;
  const MatrixView<Element> k{static_cast<const Element*>(p.k.data) + work.k_offset,
                              p.k.token_stride, work.num_keys, static_cast<int>(p.shape.head_dim)};
  const MatrixView<Element> v{static_cast<const Element*>(p.v.data) + work.v_offset,
                              p.v.token_stride, work.num_keys,
                              static_cast<int>(p.shape.head_dim_v)};
  device::load_panels<128>(smem.keys(0, group), thread_part(k, thread), group * device::kPanelRows,
                           thread);
  device::load_panels<128>(smem.keys(1, group), thread_part(v, thread), group * device::kPanelRows,
                           thread);
  cp_async_commit();
  cp_async_wait<0>();
  fence_async_proxy();
}

template <class Traits>
__device__ __forceinline__ void run_key_group(const DenseDkvSm90Smem<Traits>& smem,
                                              const AttnBwdTensors& p, const device::Band& band,
                                              const DenseBwdBuffers& buffers,
                                              const KeyTileWork& work) {
  using namespace device;
  using Element = typename Traits::Element;
  const int group = threadIdx.x / 128;
  float dk[64] = {}, dv[64] = {};
  if (work.first_query <= work.last_query) {
    load_key_group<Element>(smem, p, work, group);
    sync_warpgroup(group);  // all four warps have loaded their part of K and V
    consume_queries<Traits>(smem, p, band, work, dk, dv);
    sync_warpgroup(group);  // nobody's wgmma reads K or V any more: they become the output stage
  }
  store_key_gradient<Traits>(smem, p, buffers, work, 0, dk);
  store_key_gradient<Traits>(smem, p, buffers, work, 1, dv);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    dense_attn_bwd_dkv_sm90_kernel(const __grid_constant__ AttnBwdTensors p,
                                   const __grid_constant__ device::KeySet keys,
                                   const __grid_constant__ DenseBwdBuffers buffers) {
  using namespace device;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ KeyTileWork work;
  const DenseDkvSm90Smem<Traits> smem{memory, smem_address(memory)};
  if (threadIdx.x == 0) {
    work = find_key_tile<Traits::kTileKv>(p, keys, buffers.splits, blockIdx.x, kAllHeads);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      mbarrier_init(smem.full(stage), 4);  // the producer warps
      mbarrier_init(smem.empty(stage), Traits::kConsumerThreads / kWarpSize);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (work.num_keys <= 0) return;
  if (threadIdx.x < Traits::kConsumerThreads) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Traits::kConsumerRegisters));
    run_key_group<Traits>(smem, p, keys.band, buffers, work);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Traits::kProducerRegisters));
    if (work.first_query <= work.last_query) {
      produce_queries<Traits>(smem, p, buffers.delta, work);
    }
  }
}

}  // namespace fsattn
