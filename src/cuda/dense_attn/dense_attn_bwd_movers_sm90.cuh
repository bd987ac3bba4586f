// What the roles of dense_attn_bwd_sm90.cuh share, and the roles that move data: queries to shared
// memory, sums of dQ to global memory.
#pragma once
#include "cuda/dense_attn/dense_attn_bwd_order_sm90.cuh"
#include "cuda/device/bulk_sm90.cuh"
#include "cuda/device/panels_sm90.cuh"
#include "cuda/device/tma_sm90.cuh"

namespace fsattn {

template <DenseAttnConfig kConfig>
struct DenseBwdSm90Traits {
  using Element = device::ElementOf<kConfig.dtype>;
  static_assert(kConfig.head_dim == device::kPanelDim && kConfig.head_dim_v == device::kPanelDim);
  static constexpr int kGroups = 2, kTileKv = kGroups * device::kPanelRows,
                       kTileQ = device::kPanelRows;
  static constexpr int kStages = 3;
  // Of the keys, of dQ, and those that move data.
  static constexpr int kKeyThreads = kGroups * 128, kConsumerThreads = kKeyThreads + 128,
                       kThreads = kConsumerThreads + 128;
  static constexpr int kKeyRegisters = 208, kQueryRegisters = 64, kMoverRegisters = 32;
  static constexpr int kStageOffset = 2 * kGroups * device::kPanelTileBytes;
  static constexpr int kStageBytes = 2 * device::kPanelTileBytes;  // Q, then dO
  static constexpr int kScoreOffset = kStageOffset + kStages * kStageBytes;
  static constexpr int kScoreBytes = kTileKv * kTileQ * 2;  // dS^T
  static constexpr int kSumOffset = kScoreOffset + 2 * kScoreBytes;
  static constexpr int kStatsOffset = kSumOffset + kTileQ * device::kPanelDim * 4;  // dQ
  static constexpr int kStatsBytes = 2 * kTileQ * 4;  // lse, then delta
  static constexpr int kBarrierOffset = kStatsOffset + kStages * kStatsBytes;
  static constexpr int kSmemBytes = kBarrierOffset + (2 * kStages + 8) * 8;
  static_assert(kTileQ == kTurnQueries);
};

// What a CTA computes, and what each half of its keys has to do with it.
struct HalvedTileWork : KeyTileWork {
  QueryWalk walk;
  int first_end;     // tiles of queries up to this one see some key of the first half,
  int second_begin;  // those from this one on some of the second
  int full[2][2];    // the first and the last query that see all keys of a half
  int starts[128];   // the first query that sees a key; none sees a missing one

  __device__ __forceinline__ bool sees(int half, int tile) const {
    return half == 0 ? tile <= first_end : tile >= second_begin;
  }
};

__device__ __forceinline__ Step first_step(const HalvedTileWork& work) {
  return {work.first_head, work.walk.first};
}

__device__ __forceinline__ Step next_step(const HalvedTileWork& work, Step at) {
  const bool wraps = at.index == work.walk.last;
  return {wraps ? at.head + 1 : at.head, wraps ? work.walk.first : at.index + work.walk.step};
}

template <class Traits>
__device__ __forceinline__ void find_halves(HalvedTileWork& work, const device::Band& band) {
  const auto query = [&](int64_t position) {
    return static_cast<int>(min(max(position - work.offset, int64_t{-1}), int64_t{1} << 30));
  };
#pragma unroll 1
  for (int half = 0; half < Traits::kGroups; ++half) {
    const int first_key = work.first_key + half * device::kPanelRows;
    const int last_key = work.first_key + min((half + 1) * device::kPanelRows, work.num_keys) - 1;
    work.full[half][0] = query(band.first_position(last_key));
    work.full[half][1] = min(query(band.last_position(first_key)), work.num_queries - 1);
    if (half == 0) {
      const int last = min(query(band.last_position(last_key)), work.num_queries - 1);
      work.first_end = last < 0 ? -1 : last / Traits::kTileQ;
    } else {
      const int first = max(query(band.first_position(first_key)), 0);
      work.second_begin = last_key < first_key ? 1 << 30 : first / Traits::kTileQ;
    }
  }
  if (work.num_keys < Traits::kTileKv) {  // missing keys are masked
    work.full[1][0] = 1 << 30;
    if (work.num_keys < device::kPanelRows) work.full[0][0] = 1 << 30;
  }
  // Somebody has to make dQ of every tile.
  work.first_end = max(work.first_end, work.second_begin - 1);
}

// By one thread a key.
__device__ __forceinline__ void find_start(HalvedTileWork& work, const device::Band& band,
                                           int key) {
  constexpr int64_t kFar = int64_t{1} << 30;
  const int64_t start = band.first_position(work.first_key + key) - work.offset;
  work.starts[key] =
      static_cast<int>(key < work.num_keys ? min(max(start, -kFar), kFar - 1) : kFar - 1);
}

template <class Traits>
struct DenseBwdSm90Smem {
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
  // dS^T of step n: 128 rows of 64 queries.
  __device__ uint32_t scores(int n) const {
    return base + Traits::kScoreOffset + n % 2 * Traits::kScoreBytes;
  }
  __device__ uint32_t dq() const { return base + Traits::kSumOffset; }

  __device__ uint32_t full(int stage) const { return base + Traits::kBarrierOffset + stage * 8; }
  __device__ uint32_t empty(int stage) const { return full(Traits::kStages + stage); }
  __device__ uint32_t scores_full(int n) const { return full(2 * Traits::kStages + n % 2); }
  __device__ uint32_t scores_empty(int n) const { return full(2 * Traits::kStages + 2 + n % 2); }
  // Of even and of odd steps: each is waited for by one thread.
  __device__ uint32_t dq_full(int n) const { return full(2 * Traits::kStages + 4 + n % 2); }
  __device__ uint32_t dq_empty() const { return full(2 * Traits::kStages + 6); }
  __device__ uint32_t tail() const { return full(2 * Traits::kStages + 7); }
};

template <class Traits>
__device__ __forceinline__ void init_barriers(const DenseBwdSm90Smem<Traits>& smem) {
  using namespace device;
  for (int stage = 0; stage < Traits::kStages; ++stage) {
    mbarrier_init(smem.full(stage), 1 + kWarpSize);  // tensor copies, and each lane's statistics
    mbarrier_init(smem.empty(stage), Traits::kKeyThreads / kWarpSize);
  }
  for (int i = 0; i < 2; ++i) {
    mbarrier_init(smem.scores_full(i), Traits::kKeyThreads / kWarpSize);
    mbarrier_init(smem.scores_empty(i), 4);
    mbarrier_init(smem.dq_full(i), 4);
  }
  mbarrier_init(smem.dq_empty(), 1);
  mbarrier_init(smem.tail(), 1);
  mbarrier_init_fence();
}

// Starts the copies of Q and dO of a step, which arrive on `bar`.
template <class Traits>
__device__ __forceinline__ void copy_queries(const DenseBwdSm90Smem<Traits>& smem,
                                             const CUtensorMap* q_map, const CUtensorMap* dout_map,
                                             int stage, int head, int token, uint32_t bar) {
  const uint64_t policy = device::l2_evict_normal();
  device::mbarrier_arrive_expect(bar, Traits::kStageBytes);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    device::tma_load_3d(smem.queries(i / 2, stage) + i % 2 * device::kPanelBytes,
                        i / 2 == 0 ? q_map : dout_map, i % 2 * device::kTmaColumns, head, token,
                        bar, policy);
  }
}

// One warp brings all tiles of Q and dO with their lse and delta.
template <class Traits>
__device__ __forceinline__ void produce_queries(const DenseBwdSm90Smem<Traits>& smem,
                                                const AttnBwdTensors& p, const CUtensorMap* q_map,
                                                const CUtensorMap* dout_map, const float* deltas,
                                                const HalvedTileWork& work) {
  using namespace device;
  const int lane = threadIdx.x % kWarpSize;
  uint32_t tail_parity = 0;
  int n = 0;
  for (Step at = first_step(work); at.head <= work.last_head; at = next_step(work, at), ++n) {
    const int stage = n % Traits::kStages, first = at.index * Traits::kTileQ;
    const int rows = work.num_queries - first;
    // The consumers have left the tiles that were here before; passes at once in the first round.
    mbarrier_wait(smem.empty(stage), (n / Traits::kStages & 1) ^ 1);
    // A tensor map knows no sequences: what the next one has behind the last query is cleared.
    const bool is_cut = rows < Traits::kTileQ;
    if (lane == 0) {
      copy_queries(smem, q_map, dout_map, stage, at.head, static_cast<int>(work.token) + first,
                   is_cut ? smem.tail() : smem.full(stage));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = i % 2 * kWarpSize + lane;
      const float* stats = i / 2 == 0
                               ? static_cast<const float*>(p.lse.data) + at.head * p.lse.head_stride
                               : deltas + at.head * p.packing.total_q;
      cp_async_4(smem.base + smem.stats_offset(i / 2, stage) + row * 4,
                 stats + work.token + first + row, row < rows);
    }
    cp_async_arrive(smem.full(stage));
    if (!is_cut) continue;
    mbarrier_wait(smem.tail(), tail_parity);
    tail_parity ^= 1;
    for (int operand = 0; operand < 2; ++operand) {
      clear_panel_rows<kPanelRows>(smem.queries(operand, stage), rows, lane);
    }
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(smem.full(stage));
  }
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
                                                    const HalvedTileWork& work) {
  using namespace device;
  int patience = 1 << 22, n = 0;
  for (Step at = first_step(work); at.head <= work.last_head; at = next_step(work, at), ++n) {
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

}  // namespace fsattn
