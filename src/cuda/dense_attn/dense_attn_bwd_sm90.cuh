// dense_attn_bwd, sm_90a: all gradients of attention over an interval of keys in one kernel, with
// wgmma and producer warps.
//
// Math     as dense_attn_bwd_dkv_sm80.cuh, and dQ = softmax_scale dS K: five products.
// Shapes   head_dim and head_dim_v up to 128.
// Tiles    one CTA per (128 keys of a sequence, KV head, part of the group's heads), 64 queries a
//          step.
// Roles    two consumer warpgroups of 64 keys each: S^T and dP^T with both operands in shared
//          memory, dV and dK with P^T and dS^T in registers. dS^T of both goes to shared memory; then
//          each computes 64 of the 128 columns of the step's dQ. Two producer warps copy Q, dO, lse
//          and delta. Two threads add the dQ of a step to the sum in global memory.
// Order    the CTAs that see the same queries add to their dQ in the order of their keys, each when
//          the one before has announced that it is done: the result does not depend on timing. Work
//          is numbered in the order in which CTAs start, so that a CTA waits for running ones alone.
// Memory   K and V 64 KB, three stages of Q and dO 96 KB, two of dS 32 KB, dQ 32 KB: one CTA an SM.
// Regs     dK 64, dV 64, S 32, dP 32, dQ 32: 232 a consumer thread, 40 a producer thread.
// Bound    tensor cores: 1280 FLOP a (query, key) at head_dim 128.
// Numbers  as dense_attn_bwd_dkv_sm80.cuh; sums over keys in dQ are fp32, rounded by
//          dense_attn_round_dq.cuh.
#pragma once
#include "cuda/dense_attn/dense_attn_bwd_dkv_sm90.cuh"
#include "cuda/device/bulk_sm90.cuh"
#include "cuda/device/wgmma_mn_sm90.cuh"

namespace fsattn {

template <DenseAttnConfig kConfig>
struct DenseBwdSm90Traits {
  using Element = device::ElementOf<kConfig.dtype>;
  static_assert(kConfig.head_dim == device::kPanelDim && kConfig.head_dim_v == device::kPanelDim);
  static constexpr int kGroups = 2, kTileKv = kGroups * device::kPanelRows,
                       kTileQ = device::kPanelRows;
  static constexpr int kStages = 3;
  static constexpr int kConsumerThreads = kGroups * 128, kThreads = kConsumerThreads + 128;
  static constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
  static constexpr int kProducerWarps = 2;
  static constexpr int kStageOffset = 2 * kGroups * device::kPanelTileBytes;
  static constexpr int kStageBytes = 2 * device::kPanelTileBytes;  // Q, then dO
  static constexpr int kScoreOffset = kStageOffset + kStages * kStageBytes;
  static constexpr int kScoreBytes = kTileKv * kTileQ * 2;  // dS^T
  static constexpr int kSumOffset = kScoreOffset + 2 * kScoreBytes;
  static constexpr int kStatsOffset = kSumOffset + kTileQ * device::kPanelDim * 4;  // dQ
  static constexpr int kStatsBytes = 2 * kTileQ * 4;  // lse, then delta
  static constexpr int kBarrierOffset = kStatsOffset + kStages * kStatsBytes;
  static constexpr int kSmemBytes = kBarrierOffset + (2 * kStages + 3) * 8;
  static_assert(kTileQ == kTurnQueries);
};

inline constexpr int kFewHeads = 8;

template <class Traits>
struct DenseBwdSm90Smem : DenseDkvSm90Smem<Traits> {
  // dS^T of step n: 128 rows of 64 queries.
  __device__ uint32_t scores(int n) const {
    return this->base + Traits::kScoreOffset + n % 2 * Traits::kScoreBytes;
  }
  __device__ uint32_t dq() const { return this->base + Traits::kSumOffset; }
  // Of even and of odd steps: each is waited for by one thread.
  __device__ uint32_t dq_full(int n) const { return this->full(2 * Traits::kStages + n % 2); }
  __device__ uint32_t dq_empty() const { return this->full(2 * Traits::kStages + 2); }
};

// Two warps bring all tiles of Q and dO with their lse and delta. A stage is announced when the next
// one is under way.
template <class Traits>
__device__ __forceinline__ void produce_queries(const DenseBwdSm90Smem<Traits>& smem,
                                                const AttnBwdTensors& p, const float* deltas,
                                                const KeyTileWork& work) {
  using namespace device;
  using Element = typename Traits::Element;
  constexpr int kThreads = Traits::kProducerWarps * kWarpSize;
  static_assert(kThreads == Traits::kTileQ);
  const int thread = threadIdx.x % kThreads;
  const auto announce = [&](int n) {
    fence_async_proxy();
    __syncwarp();
    if (thread % kWarpSize == 0) mbarrier_arrive(smem.full(n % Traits::kStages));
  };
  int n = 0;
  for (Step at{work.first_head, work.last_query / Traits::kTileQ}; at.head <= work.last_head;
       at = next_step(work, at, Traits::kTileQ), ++n) {
    const int stage = n % Traits::kStages, first = at.index * Traits::kTileQ;
    // The consumers have left the tiles that were here before; passes at once in the first round.
    mbarrier_wait(smem.empty(stage), (n / Traits::kStages & 1) ^ 1);
    for (int operand = 0; operand < 2; ++operand) {
      const Rows& rows = operand == 0 ? p.q : p.dout;
      const MatrixView<Element> matrix{
          static_cast<const Element*>(rows.data) + work.token * rows.token_stride +
              at.head * rows.head_stride,
          rows.token_stride, work.num_queries,
          static_cast<int>(operand == 0 ? p.shape.head_dim : p.shape.head_dim_v)};
      device::load_panels<kThreads>(smem.queries(operand, stage), thread_part(matrix, thread),
                                    first, thread);
      const float* stats = operand == 0
                               ? static_cast<const float*>(p.lse.data) + at.head * p.lse.head_stride
                               : deltas + at.head * p.packing.total_q;
      cp_async_4(smem.base + smem.stats_offset(operand, stage) + thread * 4,
                 stats + work.token + first + thread, first + thread < work.num_queries);
    }
    cp_async_commit();
    if (n > 0) {
      cp_async_wait<1>();
      announce(n - 1);
    }
  }
  cp_async_wait<0>();
  announce(n - 1);
}

// Waits until `turn` CTAs have added to a dQ. The patience only ends where cu_seqlens are no lengths
// of sequences: then CTAs that this one waits for do not exist.
__device__ __forceinline__ void wait_for_turn(const int* turns, int turn, int& patience) {
  while (device::load_acquire(turns) < turn && patience > 0) --patience;
  device::fence_proxies();
}

// Two threads add the dQ of the steps to the sums, in turns: until an addition is done and announced
// takes longer than a step.
template <class Traits>
__device__ __forceinline__ void add_query_gradients(const DenseBwdSm90Smem<Traits>& smem,
                                                    const AttnBwdTensors& p,
                                                    const device::Band& band,
                                                    const DenseBwdBuffers& buffers,
                                                    const KeyTileWork& work) {
  using namespace device;
  int patience = 1 << 22, n = 0;
  for (Step at{work.first_head, work.last_query / Traits::kTileQ}; at.head <= work.last_head;
       at = next_step(work, at, Traits::kTileQ), ++n) {
    if (n % 2 != static_cast<int>(threadIdx.x / kWarpSize % 2)) continue;
    const int first = at.index * Traits::kTileQ;
    const int rows = min(work.num_queries - first, Traits::kTileQ);
    // The CTAs of the keys from the first visible one on come before this one.
    const int turn =
        (work.first_key - band.first_key(work.offset + first) / Traits::kTileKv * Traits::kTileKv) /
        Traits::kTileKv;
    const int64_t tile = 1 + (int64_t{work.query_slot} + at.index) * p.shape.num_heads_q + at.head;
    int* turns = buffers.turns + tile;
    const bool is_first =
        turn == 0 && (buffers.prior_turns == nullptr || buffers.prior_turns[tile] == 0);
    float* sums =
        buffers.dq_sums + (at.head * p.packing.total_q + work.token + first) * device::kPanelDim;
    wait_for_turn(turns, turn, patience);
    mbarrier_wait(smem.dq_full(n), n / 2 & 1);
    if (is_first) {
      bulk_store(sums, smem.dq(), rows * device::kPanelDim * 4);
    } else {
      bulk_add(sums, smem.dq(), rows * device::kPanelDim * 4);
    }
    bulk_commit();
    bulk_wait_read();
    mbarrier_arrive(smem.dq_empty());
    bulk_wait();
    fence_proxies();
    store_release(turns, turn + 1);
  }
}

// Clears P of keys that do not exist: their scores are 0, which the lse of a query knows nothing of.
__device__ __forceinline__ void clear_missing_keys(uint32_t (&packed)[1][8][2], int num_keys,
                                                   int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (half * 8 + lane / 4 >= num_keys) packed[0][n][half] = 0;
    }
  }
}

// Writes dS^T of a warp's 16 keys as the operand of dQ.
__device__ __forceinline__ void store_score_gradient(uint32_t tile, const uint32_t (&ds)[1][8][2]) {
  using namespace device;
  const int thread = reread_thread_index(), lane = thread % kWarpSize;
  const uint32_t to = lane_rows16<64>(tile + thread / kWarpSize * 2048, lane);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    stmatrix_x4(chunk_pair(to, i), ds[0][2 * i][0], ds[0][2 * i][1], ds[0][2 * i + 1][0],
                ds[0][2 * i + 1][1]);
  }
}

// Issues acc = dS K: 64 queries, 128 keys, the 64 columns of a panel. The caller commits.
template <class Traits>
__device__ __forceinline__ void query_gradient_product(const DenseBwdSm90Smem<Traits>& smem, int n,
                                                       float (&acc)[32]) {
  const uint32_t ds = device::mn_major(smem.scores(n));
  const uint32_t k = device::mn_major(smem.keys(0, 0) + threadIdx.x / 128 * device::kPanelBytes);
#pragma unroll
  for (int kk = 0; kk < Traits::kTileKv / 16; ++kk) {
    const uint32_t key_at = (kk / 4 * device::kPanelTileBytes + kk % 4 * 2048) >> 4;
    device::wgmma_mn_m64n64k16<typename Traits::Element>(
        acc, device::descriptor(ds + kk * (2048 >> 4)), device::descriptor(k + key_at), kk > 0);
  }
}

// Hands the dQ of a step over: rows of 512 bytes, chunks of 32 bytes swizzled by the row, which
// spreads the eight rows of a warp's store over all banks. The sums keep this order.
template <class Traits>
__device__ __forceinline__ void hand_over_dq(const DenseBwdSm90Smem<Traits>& smem, int n,
                                             const float (&dq)[32]) {
  using namespace device;
  const int thread = reread_thread_index(), lane = thread % kWarpSize, group = thread / 128;
  const int row = thread / kWarpSize % 4 * 16 + lane / 4;
  mbarrier_wait(smem.dq_empty(), (n & 1) ^ 1);
  const uint32_t to = smem.dq() + row * device::kPanelDim * 4 + group * 256 + lane % 4 * 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t at = to + ((i ^ lane / 4) << 5);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(at + half * 8 * device::kPanelDim * 4),
                   "f"(dq[4 * i + 2 * half]), "f"(dq[4 * i + 2 * half + 1])
                   : "memory");
    }
  }
  fence_async_proxy();
  __syncwarp();
  if (lane == 0) mbarrier_arrive(smem.dq_full(n));
}

template <class Traits>
__device__ __forceinline__ void sync_consumers() {
  asm volatile("bar.sync %0, %1;" ::"n"(Traits::kGroups + 1), "n"(Traits::kConsumerThreads)
               : "memory");
}

// One warpgroup: 64 keys over all steps.
template <class Traits>
__device__ __forceinline__ void consume_queries(const DenseBwdSm90Smem<Traits>& smem,
                                                const device::Band& band, const KeyTileWork& work,
                                                float (&dk)[64], float (&dv)[64]) {
  using namespace device;
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % kWarpSize, group = threadIdx.x / 128;
  int n = 0;
  for (Step at{work.first_head, work.last_query / Traits::kTileQ}; at.head <= work.last_head;
       at = next_step(work, at, Traits::kTileQ), ++n) {
    const int stage = n % Traits::kStages;
    const uint32_t q_tile = smem.queries(0, stage), dout_tile = smem.queries(1, stage);
    mbarrier_wait(smem.full(stage), n / Traits::kStages & 1);
    float s[32], dp[32];
    wgmma_fence();
    device::panel_product<Element>(s, smem.keys(0, group), q_tile);
    wgmma_commit();
    device::panel_product<Element>(dp, smem.keys(1, group), dout_tile);
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
    if (work.num_keys < Traits::kTileKv) {
      clear_missing_keys(prob, work.num_keys - reread_thread_index() / kWarpSize * 16, lane);
    }
    wgmma_fence();
    device::packed_product<Element>(dv, prob, dout_tile);
    wgmma_commit();
    wgmma_wait_group<1>();  // dP; dV goes on
    pin_registers(dp);
    uint32_t ds[1][8][2];
    pack_score_gradient<Element>(ds, device::as_fragments(dp), prob, smem.stats(1, stage), lane);
    store_score_gradient(smem.scores(n), ds);
    fence_async_proxy();
    sync_consumers<Traits>();  // dS of both groups is there, and nobody reads the one before
    float dq[32];
    wgmma_fence();
    query_gradient_product(smem, n, dq);
    wgmma_commit();
    device::packed_product<Element>(dk, ds, q_tile);
    wgmma_commit();
    wgmma_wait_group<1>();  // dQ; dK goes on
    pin_registers(dq);
    hand_over_dq(smem, n, dq);
    wgmma_wait_group<0>();
    if (lane == 0) mbarrier_arrive(smem.empty(stage));
  }
  pin_registers(dk);
  pin_registers(dv);
}

template <class Traits>
__device__ __forceinline__ void run_key_group(const DenseBwdSm90Smem<Traits>& smem,
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
    consume_queries<Traits>(smem, band, work, dk, dv);
    sync_consumers<Traits>();  // nobody's wgmma reads K or V any more: the output is staged there
  }
  store_key_gradient<Traits>(smem, p, buffers, work, 0, dk);
  store_key_gradient<Traits>(smem, p, buffers, work, 1, dv);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    dense_attn_bwd_sm90_kernel(const __grid_constant__ AttnBwdTensors p,
                               const __grid_constant__ device::KeySet keys,
                               const __grid_constant__ DenseBwdBuffers buffers) {
  using namespace device;
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ KeyTileWork work;
  const DenseBwdSm90Smem<Traits> smem{
      {memory, smem_address(memory)}
  };
  if (threadIdx.x == 0) {
    // Compressed keys: many tiles of a few heads at a time, so that dQ is added to in L2.
    const int width = keys.band.reach == Band::kUnlimited ? kFewHeads : kAllHeads;
    work =
        find_key_tile<Traits::kTileKv>(p, keys, buffers.splits, atomicAdd(buffers.turns, 1), width);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      mbarrier_init(smem.full(stage), Traits::kProducerWarps);
      mbarrier_init(smem.empty(stage), Traits::kConsumerThreads / kWarpSize);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(smem.dq_full(i), Traits::kConsumerThreads / kWarpSize);
    }
    mbarrier_init(smem.dq_empty(), 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (work.num_keys <= 0) return;
  if (threadIdx.x < Traits::kConsumerThreads) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Traits::kConsumerRegisters));
    run_key_group<Traits>(smem, p, keys.band, buffers, work);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Traits::kProducerRegisters));
    if (work.first_query > work.last_query) return;
    const int warp = (threadIdx.x - Traits::kConsumerThreads) / kWarpSize;
    if (warp < Traits::kProducerWarps) {
      produce_queries<Traits>(smem, p, buffers.delta, work);
    } else if (threadIdx.x % kWarpSize == 0) {
      add_query_gradients<Traits>(smem, p, keys.band, buffers, work);
    }
  }
}

}  // namespace fsattn
