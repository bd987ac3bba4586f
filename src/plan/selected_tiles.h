// Tiles of queries in the selected forward on sm_90a: which blocks of a tile are computed with the
// queries stationary. Thresholds and measurements: docs/kernels/selected_attn.md.
#pragma once
#include <algorithm>
#include <cstdint>

#include "base/math.h"

namespace fsattn {

// A tile is `queries` consecutive query tokens of one sequence, counted from its first one, and all
// heads of a KV head. A block that at least `min_queries` of them want is popular, and in a whole tile every
// block is: all of a tile's popular blocks together give one partial row a query row. What is popular
// depends on the tile alone, so the other sequences of a batch and the workspace cap do not show in any
// result.
struct SelectedTiles {
  int64_t queries;      // three times a power of two
  int64_t bits;         // of a set of them: the next power of two
  int64_t min_queries;  // that want a popular block
  int64_t capacity;     // popular blocks of a tile, at most
  int64_t unit;         // queries that one CTA of the sorting kernel looks at: 64 bits of sets
  int64_t per_unit;     // tiles
  int64_t num_units;    // of all sequences; like block slots, some stay empty

  constexpr int64_t num_tiles() const { return num_units * per_unit; }
  constexpr int64_t entry_ints() const { return bits > 32 ? 3 : 2; }  // block, set
  constexpr int64_t list_ints() const { return capacity * entry_ints(); }
};

inline constexpr int64_t kSelectedTileGroups = 3;      // warpgroups that share a tile
inline constexpr int64_t kSelectedTileGroupRows = 64;  // query rows of each
inline constexpr int64_t kSelectedTileKeys = 64;       // of a block
// A block costs a tile about 9 ns however many rows want it, and each of them about 165 ps otherwise.
inline constexpr int64_t kSelectedPopularRows = 56;
// A tile is whole, all of its blocks being in its list, where that costs less. In clocks of an SM: a block
// of K and V brought, its products for a warpgroup, a row of a block in the other kernels, and a query row
// that the merge finishes. The list is at most this long then.
inline constexpr int kSelectedBlockCost = 1376, kSelectedProductCost = 700, kSelectedRowCost = 38,
                     kSelectedMergeCost = 69;
inline constexpr int64_t kSelectedWholeBlocks = 96;
// Smaller groups have too many queries in a tile: they agree too little.
inline constexpr int64_t kSelectedMinTileGroup = 4, kSelectedMaxTileGroup = 64;

constexpr SelectedTiles selected_tiles(int64_t batch, int64_t total_q, int64_t group_size,
                                       int64_t topk) {
  int64_t of_group = 1;
  while (of_group * 2 * group_size <= kSelectedTileGroupRows) of_group *= 2;
  SelectedTiles t{};
  t.queries = kSelectedTileGroups * of_group;
  t.bits = 4 * of_group;
  t.min_queries = ceil_div(kSelectedPopularRows, group_size);
  t.capacity =
      std::max(t.queries * topk / t.min_queries, std::min(t.queries * topk, kSelectedWholeBlocks));
  t.per_unit = 64 / t.bits;
  t.unit = t.per_unit * t.queries;
  t.num_units = total_q / t.unit + batch;
  return t;
}

}  // namespace fsattn
