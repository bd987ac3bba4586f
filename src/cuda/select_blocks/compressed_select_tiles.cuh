// The tiles of compressed_select and the warps that bring them: compressed_select_sm90.cuh.
#pragma once
#include "cuda/device/panels_sm90.cuh"
#include "cuda/device/tma_windows_sm90.cuh"
#include "cuda/select_blocks/compressed_select.h"
#include "cuda/select_blocks/compressed_select_rank.cuh"
#include "cuda/select_blocks/select_blocks_work.cuh"

namespace fsattn::device {

inline constexpr int kRingStages = 3;
inline constexpr int kFusedTileKv = 128;

template <CompressedSelectConfig kConfig>
struct FusedTraits {
  using Element = ElementOf<kConfig.dtype>;
  static_assert(kConfig.head_dim == kPanelDim && kConfig.topk == kFusedSlots);
  static constexpr int kGroups = 3, kTileQ = kGroups * kPanelRows, kTileKv = kFusedTileKv;
  static constexpr int kPanelBytes = kTileKv * 128, kTileBytes = 2 * kPanelBytes;
  static constexpr int kConsumerThreads = kGroups * 128, kThreads = kConsumerThreads + 128;
  static constexpr int kConsumerRegisters = 160, kProducerRegisters = 32;
  static constexpr int kWorkBuffers = 4;
  static constexpr int kListBytes = kConsumerThreads / kWarpSize * FusedList::kWarpBytes;
  static constexpr int kRingOffset = kGroups * kPanelTileBytes;
  static constexpr int kListOffset = kRingOffset + kRingStages * kTileBytes;
  static constexpr int kStateOffset = kListOffset + kListBytes;  // 24 bytes a consumer thread
  static constexpr int kBarrierOffset = kStateOffset + 24 * kConsumerThreads;
  static constexpr int kSmemBytes = kBarrierOffset + (2 * kRingStages + 2 * kWorkBuffers) * 8;
};

struct FusedArgs {
  AttnFwdTensors attn;
  SelectBlocksParams select;
  Band band;
  SelectGeometry geometry;
};

// A tile among those of a CTA.
struct FusedTileWork : SelectWork {
  int num_steps;          // of the CTA
  int steps[3];           // of a group
  int full_tiles[3];      // before this one all queries of the group see all windows
  int pick_tiles[3];      // with blocks that compete for some query of the group
  int inner_tiles[3][2];  // from and to: all blocks compete for all queries
};

// K and V of a step take turns in the ring: it stands where it stood after three steps, which go around
// twice.
struct RingStep {
  int step = 0;
  __device__ __forceinline__ int k_stage() const { return 0x18 >> 2 * step & 3; }
  __device__ __forceinline__ int k_parity() const { return step >> 1; }
  __device__ __forceinline__ int v_stage() const { return 0x21 >> 2 * step & 3; }
  __device__ __forceinline__ int v_parity() const { return (step + 1) >> 1; }
  __device__ __forceinline__ void advance() { step = step == 2 ? 0 : step + 1; }
};

// Byte addresses in the shared memory of a CTA.
template <class Traits>
struct FusedSmem {
  uint32_t base;
  __device__ uint32_t queries(int group) const { return base + group * kPanelTileBytes; }
  __device__ uint32_t stage(int i) const {
    return base + Traits::kRingOffset + i * Traits::kTileBytes;
  }
  __device__ uint32_t lists() const { return base + Traits::kListOffset; }
  __device__ uint32_t state() const {
    return base + Traits::kStateOffset + reread_thread_index() * 16;
  }
  __device__ uint32_t carry() const {
    return base + Traits::kStateOffset + Traits::kConsumerThreads * 16 + reread_thread_index() * 8;
  }
  __device__ uint32_t full(int i) const { return base + Traits::kBarrierOffset + i * 8; }
  __device__ uint32_t empty(int i) const { return full(i) + kRingStages * 8; }
  __device__ uint32_t work_full(int tile) const {
    return base + Traits::kBarrierOffset + (2 * kRingStages + tile % Traits::kWorkBuffers) * 8;
  }
  __device__ uint32_t work_empty(int tile) const {
    return work_full(tile) + Traits::kWorkBuffers * 8;
  }
};

template <class Traits>
__device__ __forceinline__ const FusedTileWork& wait_for_work(const FusedSmem<Traits>& smem,
                                                              const FusedTileWork* works,
                                                              int tile) {
  mbarrier_wait(smem.work_full(tile), tile / Traits::kWorkBuffers & 1);
  return works[tile % Traits::kWorkBuffers];
}

template <class Traits>
__device__ __forceinline__ void release_work(const FusedSmem<Traits>& smem, int tile) {
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(smem.work_empty(tile));
}

// Starts the copy of a tile of K or V, which arrives on the barrier of the stage.
template <class Traits>
__device__ __forceinline__ void copy_tile(const FusedSmem<Traits>& smem, const CUtensorMap* map,
                                          int stage, int head, int row) {
  const uint64_t policy = l2_evict_last();
  mbarrier_arrive_expect(smem.full(stage), Traits::kTileBytes);
#pragma unroll
  for (int panel = 0; panel < 2; ++panel) {
    tma_load_windows(smem.stage(stage) + panel * Traits::kPanelBytes, map, panel * kTmaColumns, row,
                     head, smem.full(stage), policy);
  }
}

// The same for a tile that ends behind its sequence, by the warp itself; the rest becomes zero.
template <class Traits>
__device__ __forceinline__ void copy_cut_tile(const FusedSmem<Traits>& smem,
                                              const AttnFwdTensors& p, const FusedTileWork& work,
                                              int first, bool is_v, int stage) {
  using Element = typename Traits::Element;
  const int lane = reread_thread_index() % kWarpSize;
  const Rows& rows = is_v ? p.v : p.k;
  const int columns = static_cast<int>(is_v ? p.shape.head_dim_v : p.shape.head_dim);
  const int chunk = lane % 16, left = chunk * 8 < columns ? work.num_keys - first : 0;
  const Element* src = static_cast<const Element*>(rows.data) +
                       (work.first_row + first + lane / 16) * rows.token_stride +
                       work.kv_head * rows.head_stride + chunk * 8;
  const uint32_t dst = smem.stage(stage) + chunk / 8 * Traits::kPanelBytes;
#pragma unroll 1
  for (int window = lane / 16; window < kFusedTileKv; window += 2) {
    const int row = window / 32 * 2 + window % 32 / 2 * 8 + window % 2;
    cp_async_16(dst + tile_offset<64>(row, chunk % 8), src, window < left);
    src += 2 * rows.token_stride;
  }
  cp_async_commit();
  cp_async_wait<0>();
  fence_async_proxy();
  __syncwarp();
  if (lane == 0) mbarrier_arrive(smem.full(stage));
}

// One warp brings all tiles of K and V.
template <class Traits>
__device__ __forceinline__ void produce_fused(const FusedSmem<Traits>& smem, const FusedArgs& args,
                                              const CUtensorMap* k_map, const CUtensorMap* v_map,
                                              const FusedTileWork* works, int num_tiles) {
  int stage = 0, parity = 1;
#pragma unroll 1
  for (int tile = 0; static_cast<int>(blockIdx.x + tile * gridDim.x) < num_tiles; ++tile) {
    const FusedTileWork& work = wait_for_work(smem, works, tile);
#pragma unroll 1
    for (int i = 0; i < 2 * work.num_steps; ++i) {
      const bool is_v = i % 2 == 1;
      const int first = i / 2 * kFusedTileKv;
      mbarrier_wait(smem.empty(stage), parity);  // the consumers have left what was here before
      if (work.num_keys - first >= kFusedTileKv) {
        if (threadIdx.x % kWarpSize == 0)
          copy_tile(smem, is_v ? v_map : k_map, stage, work.kv_head, work.first_row + first);
      } else {
        copy_cut_tile(smem, args.attn, work, first, is_v, stage);
      }
      if (++stage == kRingStages) stage = 0, parity ^= 1;
    }
    release_work(smem, tile);
  }
}

// What a group of queries has to do.
__device__ __forceinline__ void find_group_work(const FusedArgs& args, FusedTileWork& work,
                                                int group) {
  const int first = group * kPanelRows;
  const int last = min(first + kPanelRows, work.num_queries) - 1;
  work.steps[group] = work.full_tiles[group] = work.pick_tiles[group] = 0;
  work.inner_tiles[group][0] = work.inner_tiles[group][1] = 0;
  if (last < first) return;
  const Band& band = args.band;
  const int seen = min(band.last_key(work.position + last), work.num_keys - 1) + 1;
  const int full = min(band.last_key(work.position + first), work.num_keys - 1) + 1;
  work.full_tiles[group] = full / kFusedTileKv;
  // A row sees no fewer blocks than the rows before it.
  const SelectGeometry& g = args.geometry;
  const SelectRow low = select_row(g, work, first), high = select_row(g, work, last);
  const int blocks = g.topk > g.init_blocks + g.local_blocks ? high.local_begin : 0;
  work.pick_tiles[group] = ceil_div(blocks, kWarpSize);
  work.inner_tiles[group][0] = ceil_div(high.num_init, kWarpSize);
  work.inner_tiles[group][1] = low.local_begin / kWarpSize;
  work.steps[group] = max(ceil_div(seen, kFusedTileKv), work.pick_tiles[group]);
}

// Finds the work of the CTA, tile by tile.
template <class Traits>
__device__ __forceinline__ void find_fused_works(const FusedSmem<Traits>& smem,
                                                 const FusedArgs& args, FusedTileWork* works,
                                                 int num_tiles) {
  int tile = 0;
  for (int index = blockIdx.x; index < num_tiles; index += gridDim.x, ++tile) {
    mbarrier_wait(smem.work_empty(tile), (tile / Traits::kWorkBuffers & 1) ^ 1);
    FusedTileWork& work = works[tile % Traits::kWorkBuffers];
    static_cast<SelectWork&>(work) =
        find_select_work<Traits::kTileQ>(args.select, args.band, index, num_tiles);
    work.num_steps = 0;
#pragma unroll 1
    for (int group = 0; group < Traits::kGroups; ++group) {
      find_group_work(args, work, group);
      work.num_steps = max(work.num_steps, work.steps[group]);
    }
    mbarrier_arrive(smem.work_full(tile));
  }
}

}  // namespace fsattn::device
