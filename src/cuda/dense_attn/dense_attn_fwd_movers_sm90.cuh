// What the roles of dense_attn_fwd_sm90.cuh share, and the roles that find the work of a CTA and
// bring its queries and keys.
#pragma once
#include "cuda/dense_attn/query_tile.cuh"
#include "cuda/device/page_table.cuh"
#include "cuda/device/panels_sm90.cuh"
#include "cuda/device/tma_sm90.cuh"

namespace fsattn {

template <DenseAttnConfig kConfig>
struct DenseFwdSm90Traits {
  using Element = device::ElementOf<kConfig.dtype>;
  static_assert(kConfig.head_dim == device::kPanelDim && kConfig.head_dim_v == device::kPanelDim);
  static constexpr int kGroups = 3, kTileQ = kGroups * device::kPanelRows, kTileKv = 128;
  static constexpr int kPanelBytes = kTileKv * 128, kKvBytes = 2 * kPanelBytes;
  static constexpr int kStages = 2;
  static constexpr int kConsumerThreads = kGroups * 128, kThreads = kConsumerThreads + 128;
  static constexpr int kConsumerRegisters = 160, kProducerRegisters = 32;
  static constexpr int kWorkBuffers = 4;
  static constexpr int kKeysOffset = 2 * kGroups * device::kPanelTileBytes;
  static constexpr int kBarrierOffset = kKeysOffset + 2 * kStages * kKvBytes;
  static constexpr int kQueryBarriers = kBarrierOffset + (4 * kStages + 2 * kWorkBuffers + 1) * 8;
  static constexpr int kLimitsOffset = kQueryBarriers + (4 * kGroups + 1) * 8;
  static_assert(kLimitsOffset % 16 == 0);
  static constexpr int kSmemBytes = kLimitsOffset + kTileQ * 8;
};

// A tile among those of a CTA.
struct FwdTileWork : QueryTileWork {
  int first_step, num_steps;  // steps are counted on over the tiles
  int steps[3][2];            // the first step of a group and the one behind its last
  int full[3][2];             // the first and the last key that all queries of a group see
  int halves[3][2];           // of its first and of its last step: seen_half()
};

// Byte addresses in the shared memory of a CTA. Operand 0 is K, 1 is V.
template <class Traits>
struct DenseFwdSm90Smem {
  uint32_t base;
  __device__ uint32_t queries(int tile, int group) const {
    return base + (tile % 2 * Traits::kGroups + group) * device::kPanelTileBytes;
  }
  __device__ uint32_t keys(int operand, int stage) const {
    return base + Traits::kKeysOffset + (operand * Traits::kStages + stage) * Traits::kKvBytes;
  }
  __device__ uint32_t full(int operand, int stage) const {
    return base + Traits::kBarrierOffset + (operand * Traits::kStages + stage) * 8;
  }
  __device__ uint32_t empty(int operand, int stage) const {
    return full(operand, stage) + 2 * Traits::kStages * 8;
  }
  __device__ uint32_t queries_full(int tile, int group) const {
    return base + Traits::kQueryBarriers + (tile % 2 * Traits::kGroups + group) * 8;
  }
  __device__ uint32_t queries_empty(int tile, int group) const {
    return queries_full(tile, group) + 2 * Traits::kGroups * 8;
  }
  // The first and the last key that a query of the tile sees.
  __device__ uint32_t limits(int query) const { return base + Traits::kLimitsOffset + query * 8; }
  __device__ uint32_t work_full(int tile) const {
    return base + Traits::kBarrierOffset + (4 * Traits::kStages + tile % Traits::kWorkBuffers) * 8;
  }
  __device__ uint32_t work_empty(int tile) const {
    return work_full(tile) + Traits::kWorkBuffers * 8;
  }
  __device__ uint32_t tail() const {
    return base + Traits::kBarrierOffset + (4 * Traits::kStages + 2 * Traits::kWorkBuffers) * 8;
  }
};

// The tiles of a CTA are counted from 0. Their steps are counted on over all tiles, so that the
// stages of K and V are used in turn.
struct FwdSchedule {
  int num_tiles;     // a multiple of the heads
  float scale_log2;  // softmax_scale * log2(e)
  __device__ __forceinline__ int index(int tile) const {
    return static_cast<int>(blockIdx.x + tile * gridDim.x);
  }
  __device__ __forceinline__ bool has(int tile) const { return index(tile) < num_tiles; }
};

template <class Traits>
__device__ __forceinline__ const FwdTileWork& wait_for_work(const DenseFwdSm90Smem<Traits>& smem,
                                                            const FwdTileWork* works, int tile) {
  device::mbarrier_wait(smem.work_full(tile), tile / Traits::kWorkBuffers & 1);
  return works[tile % Traits::kWorkBuffers];
}

template <class Traits>
__device__ __forceinline__ void release_work(const DenseFwdSm90Smem<Traits>& smem, int tile) {
  __syncwarp();
  if (threadIdx.x % device::kWarpSize == 0) device::mbarrier_arrive(smem.work_empty(tile));
}

// Starts the copy of a tile of K or V, which arrives on `bar`. One thread does it: threads of a warp would start
// theirs one after the other.
template <class Traits>
__device__ __forceinline__ void copy_keys(const DenseFwdSm90Smem<Traits>& smem,
                                          const CUtensorMap* map, int operand, int stage, int head,
                                          int row, uint32_t bar) {
  const uint64_t policy = device::l2_evict_last();
  device::mbarrier_arrive_expect(bar, Traits::kKvBytes);
#pragma unroll
  for (int panel = 0; panel < 2; ++panel) {
    device::tma_load_3d(smem.keys(operand, stage) + panel * Traits::kPanelBytes, map,
                        panel * device::kTmaColumns, head, row, bar, policy);
  }
}

// The same from pages, of which each half is in one.
template <class Traits>
__device__ __forceinline__ void copy_pages(const DenseFwdSm90Smem<Traits>& smem,
                                           const CUtensorMap* map, int operand, int stage, int head,
                                           const int (&rows)[2], uint32_t bar) {
  static_assert(Traits::kTileKv == 2 * kDensePageKeys);
  const uint64_t policy = device::l2_evict_last();
  device::mbarrier_arrive_expect(bar, Traits::kKvBytes);
#pragma unroll
  for (int panel = 0; panel < 2; ++panel) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      device::tma_load_3d(smem.keys(operand, stage) + panel * Traits::kPanelBytes +
                              half * (Traits::kPanelBytes / 2),
                          map, panel * device::kTmaColumns, head, rows[half], bar, policy);
    }
  }
}

// Where 16 tiles are in the pages, that of keys from `first` on and those before it: lane 2 i + h has half h
// of the i-th.
inline constexpr int kTilesAhead = device::kWarpSize / 2;

template <class Traits>
__device__ __forceinline__ int find_rows_ahead(const PagedKeys& pages, const FwdTileWork& work,
                                               int first, int lane) {
  const int key = first - lane / 2 * Traits::kTileKv + lane % 2 * kDensePageKeys;
  return key < 0 ? 0 : device::find_key_row(pages, work.seq, key, work.kv_head);
}

// Announces a tile of V that has `rows` rows, once its copy has arrived. A tensor map knows no sequences: P of
// missing keys is 0, but 0 times what the next sequence has there may be NaN.
template <class Traits>
__device__ __forceinline__ void clear_tail(const DenseFwdSm90Smem<Traits>& smem, int stage,
                                           int rows, int lane, uint32_t& tail_parity) {
  device::mbarrier_wait(smem.tail(), tail_parity);
  tail_parity ^= 1;
  device::clear_panel_rows<Traits::kTileKv>(smem.keys(1, stage), rows, lane);
  device::fence_async_proxy();
  __syncwarp();
  if (lane == 0) device::mbarrier_arrive(smem.full(1, stage));
}

// One warp brings all tiles of K and V.
template <class Traits>
__device__ __forceinline__ void produce(const DenseFwdSm90Smem<Traits>& smem,
                                        const CUtensorMap* k_map, const CUtensorMap* v_map,
                                        const FwdTileWork& work, uint32_t& tail_parity) {
  const int lane = threadIdx.x % device::kWarpSize;
  const int stop = work.first_step + work.num_steps;
  for (int n = work.first_step; n < stop; ++n) {
    const int key = (work.last_key / Traits::kTileKv - (n - work.first_step)) * Traits::kTileKv;
    const int stage = n % Traits::kStages, rows = work.num_keys - key;
    const int row = work.key_row + key;
#pragma unroll
    for (int operand = 0; operand < 2; ++operand) {
      // The consumers have left the tile that was here before; passes at once in the first round.
      device::mbarrier_wait(smem.empty(operand, stage), (n / Traits::kStages & 1) ^ 1);
      const bool is_cut = operand == 1 && rows < Traits::kTileKv;
      if (lane == 0) {
        copy_keys(smem, operand == 0 ? k_map : v_map, operand, stage, work.kv_head, row,
                  is_cut ? smem.tail() : smem.full(operand, stage));
      }
      if (is_cut) clear_tail(smem, stage, rows, lane, tail_parity);
    }
  }
}

// The same from pages.
template <class Traits>
__device__ __forceinline__ void produce_pages(const DenseFwdSm90Smem<Traits>& smem,
                                              const PagedKeys& pages, const CUtensorMap* k_map,
                                              const CUtensorMap* v_map, const FwdTileWork& work,
                                              uint32_t& tail_parity) {
  using namespace device;
  const int lane = threadIdx.x % kWarpSize;
  int ahead = 0;
#pragma unroll 1
  for (int i = 0; i < work.num_steps; ++i) {
    const int n = work.first_step + i, stage = n % Traits::kStages;
    const int key = (work.last_key / Traits::kTileKv - i) * Traits::kTileKv;
    const int place = i % kTilesAhead * 2;
    if (place == 0) ahead = find_rows_ahead<Traits>(pages, work, key, lane);
#pragma unroll
    for (int operand = 0; operand < 2; ++operand) {
      const int page_rows[] = {__shfl_sync(kFullMask, ahead, place),
                               __shfl_sync(kFullMask, ahead, place + 1)};
      mbarrier_wait(smem.empty(operand, stage), (n / Traits::kStages & 1) ^ 1);
      const int rows = work.num_keys - key;
      const bool is_cut = operand == 1 && rows < Traits::kTileKv;
      if (lane == 0) {
        copy_pages(smem, operand == 0 ? k_map : v_map, operand, stage,
                   pages.head_rows > 0 ? 0 : work.kv_head, page_rows,
                   is_cut ? smem.tail() : smem.full(operand, stage));
      }
      __syncwarp();
      if (is_cut) clear_tail(smem, stage, rows, lane, tail_parity);
    }
  }
}

// The half of the tile of keys from `base` on that is enough for keys first to last: 0 or 64, or -1 when
// it takes both.
__device__ __forceinline__ int seen_half(int base, int first, int last) {
  if (last < base + 64) return 0;
  return first < base + 64 ? -1 : 64;
}

// Which keys and steps a group of 64 queries has to do with.
template <class Traits>
__device__ __forceinline__ void find_group(FwdTileWork& work, const device::Band& band, int group) {
  constexpr int kTileKv = Traits::kTileKv;
  const int queries = min(device::kPanelRows, work.num_queries - group * device::kPanelRows);
  const int first = work.position + group * device::kPanelRows, last = first + queries - 1;
  const int seen_first = band.first_key(first);
  const int seen_last = queries <= 0 ? -1 : min(band.last_key(last), work.num_keys - 1);
  const int step = work.first_step + work.last_key / kTileKv;
  const int stop = work.first_step + work.num_steps;
  work.steps[group][0] = seen_first > seen_last ? stop : step - seen_last / kTileKv;
  work.steps[group][1] = seen_first > seen_last ? stop : step - seen_first / kTileKv + 1;
  const bool is_single = seen_last / kTileKv == seen_first / kTileKv;
  work.halves[group][0] = seen_half(seen_last / kTileKv * kTileKv, seen_first, seen_last);
  work.halves[group][1] =
      is_single ? -1 : seen_half(seen_first / kTileKv * kTileKv, seen_first, seen_last);
  // A group with rows behind the last query always masks: they are the queries of another sequence.
  work.full[group][0] = queries < device::kPanelRows ? 1 << 30 : band.first_key(last);
  work.full[group][1] = min(band.last_key(first), work.num_keys - 1);
}

// One warp finds the work of the CTA, tile by tile.
template <class Traits>
__device__ __forceinline__ void find_works(const DenseFwdSm90Smem<Traits>& smem,
                                           const AttnFwdTensors& p, const device::KeySet& keys,
                                           FwdTileWork* works, const FwdSchedule& schedule) {
  using namespace device;
  const int lane = threadIdx.x % kWarpSize;
  int next_step = 0;
  for (int tile = 0; schedule.has(tile); ++tile) {
    mbarrier_wait(smem.work_empty(tile), (tile / Traits::kWorkBuffers & 1) ^ 1);
    FwdTileWork& work = works[tile % Traits::kWorkBuffers];
    if (lane == 0) {
      static_cast<QueryTileWork&>(work) =
          find_query_tile<Traits::kTileQ>(p, keys, schedule.index(tile), schedule.num_tiles);
      const bool is_empty = work.num_queries <= 0 || work.first_key > work.last_key;
      work.first_step = next_step;
      work.num_steps =
          is_empty ? 0 : work.last_key / Traits::kTileKv - work.first_key / Traits::kTileKv + 1;
    }
    __syncwarp();
    next_step += work.num_steps;
    if (lane < Traits::kGroups) {
      find_group<Traits>(work, keys.band, lane);
      mbarrier_arrive(smem.work_full(tile));
    }
  }
}

// One thread brings the queries. Those behind the end of a sequence are of the next one: their
// scores are masked and nobody stores what comes of them.
template <class Traits>
__device__ __forceinline__ void load_queries(const DenseFwdSm90Smem<Traits>& smem,
                                             const CUtensorMap* q_map, const FwdTileWork* works,
                                             const FwdSchedule& schedule) {
  using namespace device;
  const uint64_t policy = l2_evict_normal();
  for (int tile = 0; schedule.has(tile); ++tile) {
    const FwdTileWork& work = wait_for_work(smem, works, tile);
    for (int group = 0; group < Traits::kGroups; ++group) {
      const uint32_t bar = smem.queries_full(tile, group);
      mbarrier_wait(smem.queries_empty(tile, group), (tile / 2 & 1) ^ 1);
      mbarrier_arrive_expect(bar, kPanelTileBytes);
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        tma_load_3d(smem.queries(tile, group) + panel * kPanelBytes, q_map, panel * kTmaColumns,
                    work.head, static_cast<int>(work.token) + group * kPanelRows, bar, policy);
      }
    }
    mbarrier_arrive(smem.work_empty(tile));
  }
}

template <class Traits, bool kPaged>
__device__ __forceinline__ void run_producer(const DenseFwdSm90Smem<Traits>& smem,
                                             const PagedKeys& pages, const CUtensorMap* k_map,
                                             const CUtensorMap* v_map, const FwdTileWork* works,
                                             const FwdSchedule& schedule) {
  uint32_t tail_parity = 0;
  for (int tile = 0; schedule.has(tile); ++tile) {
    const FwdTileWork& work = wait_for_work(smem, works, tile);
    if constexpr (kPaged) {
      produce_pages(smem, pages, k_map, v_map, work, tail_parity);
    } else {
      produce(smem, k_map, v_map, work, tail_parity);
    }
    release_work(smem, tile);
  }
}

}  // namespace fsattn
