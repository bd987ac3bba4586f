// The tiles of the Hopper kernel of select_blocks and the warps that bring them: select_blocks_sm90.cuh.
#pragma once
#include "cuda/device/barrier_sm90.cuh"
#include "cuda/device/tile_sm80.cuh"
#include "cuda/select_blocks/select_blocks.h"
#include "cuda/select_blocks/select_blocks_work.cuh"

namespace fsattn {
namespace device {

template <SelectBlocksConfig kConfig>
struct SelectSm90Traits {
  using Element = ElementOf<kConfig.dtype>;
  static constexpr int kDim = kConfig.head_dim, kPanels = kDim / 64;
  static constexpr int kTileQ = kConfig.tile_q, kTileKv = kSelectTileKv;
  static constexpr bool kSharesQueries = kTileQ == 64;  // by the two consumer warpgroups
  static constexpr int kGroups = 2, kConsumerThreads = kGroups * 128;
  static constexpr int kThreads = kConsumerThreads + 128;
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
  static constexpr int kQPanelBytes = 64 * 128, kQBytes = kPanels * kQPanelBytes;
  static constexpr int kKPanelBytes = kTileKv * 128, kKBytes = kPanels * kKPanelBytes;
  static constexpr int kQStages = kSelectSm90QStages, kKStages = kSelectSm90KStages;
  static constexpr int kRowsPerWarp = kTileQ / 8;
  static constexpr int kPickRows = 4;  // side by side
  static constexpr int kTilesPerStep = kSharesQueries ? 2 : 1;
};

// What every role knows of its CTA.
template <class Traits>
struct SelectSm90 {
  const SelectBlocksParams& p;
  const SelectGeometry& g;
  const SelectSm90Smem& at;
  const SelectWork& work;
  uint32_t base;
  int num_heads, num_steps;

  __device__ bool streams_queries() const {
    return Traits::kSharesQueries && num_heads > Traits::kQStages;
  }
  __device__ uint32_t queries(int stage) const { return base + stage * Traits::kQBytes; }
  __device__ uint32_t keys(int stage) const { return base + at.k + stage * Traits::kKBytes; }
  __device__ uint32_t q_full(int stage) const { return base + at.barriers + stage * 8; }
  __device__ uint32_t q_empty(int stage) const { return q_full(Traits::kQStages + stage); }
  __device__ uint32_t k_full(int stage) const { return q_full(2 * Traits::kQStages + stage); }
  __device__ uint32_t k_empty(int stage) const { return k_full(Traits::kKStages + stage); }
};

template <class Traits>
__device__ __forceinline__ void produce_keys(const SelectSm90<Traits>& cta, int thread) {
  using Element = typename Traits::Element;
  const Rows& rows = cta.p.k_cmp;
  const int column = thread % 8 * 8, row = thread / 8;
  const int window = row / 2 * 4 + row % 2;  // of row `row` of a tile; rows + 8: window + 2
  const int64_t stride = rows.token_stride;
  const Element* src = static_cast<const Element*>(rows.data) +
                       (cta.work.first_row + window) * stride +
                       cta.work.kv_head * rows.head_stride + column;
  const int cols = static_cast<int>(cta.p.shape.head_dim) - column;
  int left = cta.work.num_keys - window;
  int stage = 0, parity = 1;
  for (int tile = 0; tile < cta.num_steps * Traits::kTilesPerStep; ++tile) {
    mbarrier_wait(cta.k_empty(stage), parity);
    uint32_t dst = cta.keys(stage) + tile_offset<64>(row, thread % 8);
#pragma unroll
    for (int i = 0; i < Traits::kTileKv / 8; ++i) {
#pragma unroll
      for (int panel = 0; panel < Traits::kPanels; ++panel) {
        cp_async_16(dst + panel * Traits::kKPanelBytes + i * 1024, src + panel * 64,
                    left > 0 && panel * 64 < cols);
      }
      const int step = i % 2 == 0 ? 2 : 14;
      src += step * stride;
      left -= step;
      asm volatile("" : "+l"(src));  // keeps one address alive instead of one a row
    }
    cp_async_arrive(cta.k_full(stage));
    if (++stage == Traits::kKStages) stage = 0, parity ^= 1;
  }
}

// Tile `tile` of the queries of head `head` of the group.
template <class Traits>
__device__ __forceinline__ void load_queries(const SelectSm90<Traits>& cta, int stage, int head,
                                             int tile, int thread) {
  using Element = typename Traits::Element;
  const Rows& rows = cta.p.q;
  const int column = thread % 8 * 8, row = tile * 64 + thread / 8;
  const Element* src = static_cast<const Element*>(rows.data) +
                       (cta.work.token + row) * rows.token_stride +
                       (cta.work.first_head + head) * rows.head_stride + column;
  const int cols = static_cast<int>(cta.p.shape.head_dim) - column;
  const uint32_t dst = cta.queries(stage) + tile_offset<64>(thread / 8, thread % 8);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      cp_async_16(dst + panel * Traits::kQPanelBytes + i * 1024, src + panel * 64,
                  row + i * 8 < cta.work.num_queries && panel * 64 < cols);
    }
    src += 8 * rows.token_stride;
    asm volatile("" : "+l"(src));
  }
  cp_async_arrive(cta.q_full(stage));
}

template <class Traits>
__device__ __forceinline__ void produce_queries(const SelectSm90<Traits>& cta, int thread) {
  if (!Traits::kSharesQueries) {
    for (int tile = 0; tile < Traits::kGroups; ++tile) load_queries(cta, tile, 0, tile, thread);
    return;
  }
  if (!cta.streams_queries()) {
    for (int head = 0; head < cta.num_heads; ++head) load_queries(cta, head, head, 0, thread);
    return;
  }
  int stage = 0, parity = 1;
  for (int step = 0; step < cta.num_steps; ++step) {
    for (int head = 0; head < cta.num_heads; ++head) {
      mbarrier_wait(cta.q_empty(stage), parity);
      load_queries(cta, stage, head, 0, thread);
      if (++stage == Traits::kQStages) stage = 0, parity ^= 1;
    }
  }
}

}  // namespace device
}  // namespace fsattn
