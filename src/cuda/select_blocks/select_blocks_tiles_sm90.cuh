// The tiles of the Hopper kernel of select_blocks and the warps that bring them: select_blocks_sm90.cuh.
#pragma once
#include "cuda/device/barrier_sm90.cuh"
#include "cuda/device/page_table.cuh"
#include "cuda/device/tile_sm80.cuh"
#include "cuda/select_blocks/select_blocks.h"
#include "cuda/select_blocks/select_blocks_work.cuh"

namespace fsattn {
namespace device {

// kPairsOfHeads: of a group whose queries stay; 0: any number, they come again for each two tiles of keys.
// kAny: any reduction and rounding.
template <SelectBlocksConfig kConfig, int kPairsOfHeads, bool kAny>
struct SelectSm90Traits {
  static constexpr int kPairCount = kPairsOfHeads;
  static constexpr bool kStreams = kPairsOfHeads == 0, kGeneral = kAny;
  using Element = ElementOf<kConfig.dtype>;
  static constexpr int kDim = kConfig.head_dim, kPanels = kDim / 64;
  static constexpr int kTileQ = kConfig.tile_q, kTileKv = kSelectTileKv;
  static constexpr bool kPairs = select_sm90_pairs(kConfig);
  static constexpr int kGroups = select_sm90_groups(kConfig), kConsumerThreads = kGroups * 128;
  static constexpr int kThreads = kConsumerThreads + 128;
  static constexpr int kConsumerRegisters = kGroups == 3 ? 152 : 224;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kGroupQueries = kTileQ / kGroups;
  static constexpr int kSlots = kConfig.topk;   // of a list
  static constexpr int kRows = kPairs ? 1 : 2;  // queries of a thread
  static constexpr int kQPanelBytes = 64 * 128, kQBytes = kPanels * kQPanelBytes;
  static constexpr int kKPanelBytes = kTileKv * 128, kKBytes = kPanels * kKPanelBytes;
  static constexpr int kQStages = select_sm90_q_stages(kConfig);  // of a warpgroup
  static constexpr int kKStages = select_sm90_k_stages(kConfig);
  static constexpr int kProducerThreads = 64;  // of the keys, and of the queries
  static constexpr SelectSm90Smem kAt = select_sm90_smem(kConfig);
};

// Arrives where `is_arriving`, without a branch.
__device__ __forceinline__ void mbarrier_arrive_if(uint32_t bar, bool is_arriving) {
  asm volatile(
      "{\n .reg .b64 t;\n .reg .pred p;\n setp.ne.b32 p, %1, 0;\n"
      " @p mbarrier.arrive.shared::cta.b64 t, [%0];\n}" ::"r"(bar),
      "r"(static_cast<int>(is_arriving))
      : "memory");
}

// x, where the compiler cannot know it: what depends on it is computed again instead of kept over a loop.
__device__ __forceinline__ int renewed(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A stage of a ring in shared memory and the parity of its barrier.
template <int kStages>
struct RingPosition {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// What a CTA computes at a time.
struct SelectItem {
  SelectWork work;
  int num_tiles;  // of keys
};
static_assert(sizeof(SelectItem) <= kSelectSm90WorkBytes);

// What every role knows.
template <class Traits>
struct SelectSm90 {
  const SelectBlocksParams& p;
  const SelectGeometry& g;
  unsigned char* smem;
  uint32_t base;
  int num_heads;  // of a group that count
  int num_items;  // of all CTAs

  static constexpr SelectSm90Smem at = Traits::kAt;
  static constexpr int kQTiles = Traits::kGroups * Traits::kQStages;

  __device__ int num_pairs() const { return Traits::kPairs ? (num_heads + 1) / 2 : 1; }
  __device__ uint32_t queries(int group, int stage) const {
    return base + (group * Traits::kQStages + stage) * Traits::kQBytes;
  }
  __device__ uint32_t keys(int stage) const { return base + at.k + stage * Traits::kKBytes; }
  __device__ uint32_t q_full(int group, int stage) const {
    return base + at.barriers + (group * Traits::kQStages + stage) * 8;
  }
  __device__ uint32_t q_empty(int group, int stage) const {
    return q_full(group, stage) + kQTiles * 8;
  }
  __device__ uint32_t k_full(int stage) const {
    return base + at.barriers + (2 * kQTiles + stage) * 8;
  }
  __device__ uint32_t k_empty(int stage) const { return k_full(stage) + Traits::kKStages * 8; }
  __device__ uint32_t item_full(int stage) const {
    return base + at.barriers + (2 * (kQTiles + Traits::kKStages) + stage) * 8;
  }
  __device__ uint32_t item_empty(int stage) const {
    return item_full(stage) + kSelectSm90WorkRing * 8;
  }
  __device__ SelectItem& item(int stage) const {
    return *reinterpret_cast<SelectItem*>(smem + at.work + stage * kSelectSm90WorkBytes);
  }
};

using ItemPosition = RingPosition<kSelectSm90WorkRing>;

// Calls each(item) for the items of this CTA, in all warps that do not find them.
template <class Traits, class Each>
__device__ __forceinline__ void for_each_item(const SelectSm90<Traits>& cta, const Each& each) {
  ItemPosition at;
#pragma unroll 1
  for (int i = blockIdx.x; i < cta.num_items; i += gridDim.x) {
    mbarrier_wait(cta.item_full(at.stage), at.parity);
    const SelectItem& item = cta.item(at.stage);
    if (item.work.num_queries > 0) each(item);
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(cta.item_empty(at.stage));
    at.advance();
  }
}

// Finds item `index` and tells the other warps.
template <class Traits>
__device__ __forceinline__ void publish_item(const SelectSm90<Traits>& cta, const Band& band,
                                             int index, ItemPosition& at) {
  mbarrier_wait(cta.item_empty(at.stage), at.parity ^ 1);
  SelectItem& item = cta.item(at.stage);
  item.work = find_select_work<Traits::kTileQ>(cta.p, band, index, cta.num_items);
  // Blocks that compete for some query; a row sees no fewer than the rows before it.
  const SelectRow last = select_row(cta.g, item.work, item.work.num_queries - 1);
  const int blocks = cta.g.topk > cta.g.init_blocks + cta.g.local_blocks ? last.local_begin : 0;
  item.num_tiles = ceil_div(blocks, kWarpSize);
  if (Traits::kStreams) item.num_tiles = round_up(item.num_tiles, 2);
  mbarrier_arrive(cta.item_full(at.stage));
  at.advance();
}

// Row 8 n + 2 q + e of a tile holds window 32 q + 2 n + e: a thread then has 32 windows side by side. Its
// producer copies half of those of a span of 32.
template <class Traits>
__device__ __forceinline__ int first_window(int tile, int thread) {
  const int row = thread / 8;
  return tile * Traits::kTileKv + row / 2 * 32 + row % 2;
}

// The row of that window. A span of 32 does not cross a page.
template <class Traits>
__device__ __forceinline__ int first_key_row(const SelectSm90<Traits>& cta, const SelectWork& work,
                                             int tile, int thread) {
  const PagedKeys& pages = cta.p.pages;
  const int window = first_window<Traits>(tile, thread);
  return pages.defined() ? find_key_row(pages, work.seq, window, work.kv_head)
                         : work.first_row + window;
}

template <class Traits>
__device__ __forceinline__ void load_keys(const SelectSm90<Traits>& cta, const SelectWork& work,
                                          int tile, int64_t first, int stage, int thread) {
  using Element = typename Traits::Element;
  const Rows& rows = cta.p.k_cmp;
  const int column = thread % 8 * 8, row = thread / 8;
  const Element* src = static_cast<const Element*>(rows.data) + first * rows.token_stride +
                       work.kv_head * rows.head_stride + column;
  const int cols = static_cast<int>(cta.p.shape.head_dim) - column;
  const int left = first < 0 ? 0 : work.num_keys - first_window<Traits>(tile, thread);
  const uint32_t dst = cta.keys(stage) + tile_offset<64>(row, thread % 8);
#pragma unroll
  for (int n = 0; n < Traits::kTileKv / 8; ++n) {
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      cp_async_16(dst + panel * Traits::kKPanelBytes + n * 1024, src + panel * 64,
                  2 * n < left && panel * 64 < cols);
    }
    src += 2 * rows.token_stride;
    asm volatile("" : "+l"(src));  // keeps one address alive instead of one a row
  }
  cp_async_arrive(cta.k_full(stage));
}

template <class Traits>
__device__ __forceinline__ void produce_keys(const SelectSm90<Traits>& cta, int thread) {
  RingPosition<Traits::kKStages> at;
  for_each_item(cta, [&](const SelectItem& item) {
#pragma unroll 1
    for (int tile = 0; tile < item.num_tiles; ++tile) {
      const int row = first_key_row(cta, item.work, tile, thread);  // while the stage is in use
      mbarrier_wait(cta.k_empty(at.stage), at.parity ^ 1);
      load_keys(cta, item.work, tile, row, at.stage, thread);
      at.advance();
    }
  });
}

// 64 queries of a head, or 32 of two: rows 0 .. 7 of each 16 are of one head, rows 8 .. 15 of the other.
template <class Traits>
__device__ __forceinline__ void load_queries(const SelectSm90<Traits>& cta, const SelectWork& work,
                                             int group, int stage, int pair, int thread) {
  using Element = typename Traits::Element;
  const Rows& rows = cta.p.q;
  const int column = thread % 8 * 8, row = group * Traits::kGroupQueries + thread / 8;
  const int head = Traits::kPairs ? 2 * pair : 0;
  const Element* src = static_cast<const Element*>(rows.data) +
                       (work.token + row) * rows.token_stride +
                       (work.first_head + head) * rows.head_stride + column;
  const int cols = static_cast<int>(cta.p.shape.head_dim) - column;
  const uint32_t dst = cta.queries(group, stage) + tile_offset<64>(thread / 8, thread % 8);
  const bool is_whole = (group + 1) * Traits::kGroupQueries <= work.num_queries &&
                        (!Traits::kPairs || head + 1 < cta.num_heads) &&
                        cta.p.shape.head_dim == Traits::kDim;
  if (is_whole) {
    // All addresses first: a copy reads its own late, and would hold up what makes the next one.
    const Element* from[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      from[i] = src + (Traits::kPairs ? i / 2 * 8 : i * 8) * rows.token_stride +
                (Traits::kPairs && i % 2 == 1 ? rows.head_stride : 0);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) asm volatile("" : "+l"(from[i]));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int panel = 0; panel < Traits::kPanels; ++panel)
        cp_async_16(dst + panel * Traits::kQPanelBytes + i * 1024, from[i] + panel * 64, true);
    }
    cp_async_arrive(cta.q_full(group, stage));
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int query = Traits::kPairs ? i / 2 * 8 : i * 8;
    const bool is_second = Traits::kPairs && i % 2 == 1;
    const Element* from = src + query * rows.token_stride + (is_second ? rows.head_stride : 0);
    const bool is_valid =
        row + query < work.num_queries && (!is_second || head + 1 < cta.num_heads);
#pragma unroll
    for (int panel = 0; panel < Traits::kPanels; ++panel) {
      cp_async_16(dst + panel * Traits::kQPanelBytes + i * 1024, from + panel * 64,
                  is_valid && panel * 64 < cols);
    }
  }
  cp_async_arrive(cta.q_full(group, stage));
}

template <class Traits>
__device__ __forceinline__ void produce_queries(const SelectSm90<Traits>& cta, const Band& band,
                                                int thread) {
  ItemPosition publish_at;
  const auto publish = [&](int index) {
    if (renewed(thread) == 0 && index < cta.num_items) publish_item(cta, band, index, publish_at);
    __syncwarp();
  };
  publish(blockIdx.x);
  RingPosition<Traits::kQStages> at;
  const auto load = [&](const SelectWork& work, int pair) {
#pragma unroll 1
    for (int group = 0; group < Traits::kGroups; ++group) {
      mbarrier_wait(cta.q_empty(group, at.stage), at.parity ^ 1);
      load_queries(cta, work, group, at.stage, pair, thread);
    }
    at.advance();
  };
  ItemPosition item_at;
#pragma unroll 1
  for (int i = blockIdx.x; i < cta.num_items; i += gridDim.x) {
    publish(i + gridDim.x);
    mbarrier_wait(cta.item_full(item_at.stage), item_at.parity);
    const SelectItem& item = cta.item(item_at.stage);
    const bool is_empty = item.work.num_queries <= 0 || item.num_tiles == 0;
    const int rounds = is_empty ? 0 : Traits::kStreams ? item.num_tiles / 2 : 1;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
#pragma unroll 1
      for (int pair = 0; pair < cta.num_pairs(); ++pair) load(item.work, pair);
    }
    __syncwarp();
    if (thread % kWarpSize == 0) mbarrier_arrive(cta.item_empty(item_at.stage));
    item_at.advance();
  }
}

}  // namespace device
}  // namespace fsattn
