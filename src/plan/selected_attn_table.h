// The compiled kernels of selected attention, the choice between them, and how the work is cut.
// Thresholds and measurements: docs/kernels/selected_attn.md.
#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "base/math.h"
#include "plan/block_index_table.h"
#include "plan/problem.h"
#include "plan/selected_tiles.h"

namespace fsattn {

// The two orders of the outer loop: over queries, or over blocks of keys. Block-major has two
// forward kernels: mma.sync (sm_80 and newer) and wgmma with TMA (sm_90a).
enum class SelectedAlgorithm : int { kQueryMajor, kBlockMajor, kBlockMajorWgmma };

// A row takes head dims up to its own (smaller ones are padded in shared memory) and works on
// `keys` keys of a block at a time; larger blocks are split into parts of that many keys.
struct SelectedAttnFwdConfig {
  Arch arch;
  SelectedAlgorithm algorithm;
  DType dtype;
  int head_dim;
  int head_dim_v;
  int keys;
};

// Partial rows of bf16 leave the wgmma kernel in 12 bits a value (cuda/selected_attn/partial_row.cuh).
constexpr bool has_packed_rows(const SelectedAttnFwdConfig& config) {
  return config.algorithm == SelectedAlgorithm::kBlockMajorWgmma &&
         config.dtype == DType::kBFloat16;
}

// Columns: arch, algorithm, dtype, head_dim, head_dim_v, keys. The first row that fits wins.
inline constexpr std::array kSelectedAttnFwdTable{
    SelectedAttnFwdConfig{Arch::kSm90a, SelectedAlgorithm::kBlockMajorWgmma, DType::kBFloat16, 128,
                          128,                                                                           64},
    SelectedAttnFwdConfig{Arch::kSm90a, SelectedAlgorithm::kBlockMajorWgmma, DType::kFloat16,  128,
                          128,                                                                           64},
    SelectedAttnFwdConfig{Arch::kSm80,  SelectedAlgorithm::kBlockMajor,      DType::kBFloat16, 64,  64,
                          128                                                                              },
    SelectedAttnFwdConfig{Arch::kSm80,  SelectedAlgorithm::kBlockMajor,      DType::kBFloat16, 128, 128,
                          64                                                                               },
    SelectedAttnFwdConfig{Arch::kSm80,  SelectedAlgorithm::kBlockMajor,      DType::kBFloat16, 128, 128,
                          128                                                                              },
    SelectedAttnFwdConfig{Arch::kSm80,  SelectedAlgorithm::kBlockMajor,      DType::kBFloat16, 192, 128,
                          64                                                                               },
    SelectedAttnFwdConfig{Arch::kSm80,  SelectedAlgorithm::kBlockMajor,      DType::kBFloat16, 256, 256,
                          64                                                                               },
    SelectedAttnFwdConfig{Arch::kSm80,  SelectedAlgorithm::kBlockMajor,      DType::kFloat16,  64,  64,
                          128                                                                              },
    SelectedAttnFwdConfig{Arch::kSm80,  SelectedAlgorithm::kBlockMajor,      DType::kFloat16,  128, 128,
                          64                                                                               },
    SelectedAttnFwdConfig{Arch::kSm80,  SelectedAlgorithm::kBlockMajor,      DType::kFloat16,  128, 128,
                          128                                                                              },
    SelectedAttnFwdConfig{Arch::kSm80,  SelectedAlgorithm::kBlockMajor,      DType::kFloat16,  192, 128,
                          64                                                                               },
    SelectedAttnFwdConfig{Arch::kSm80,  SelectedAlgorithm::kBlockMajor,      DType::kFloat16,  256, 256,
                          64                                                                               },
    SelectedAttnFwdConfig{Arch::kSm80,  SelectedAlgorithm::kQueryMajor,      DType::kBFloat16, 128, 128,
                          64                                                                               },
    SelectedAttnFwdConfig{Arch::kSm80,  SelectedAlgorithm::kQueryMajor,      DType::kBFloat16, 256, 256,
                          64                                                                               },
    SelectedAttnFwdConfig{Arch::kSm80,  SelectedAlgorithm::kQueryMajor,      DType::kFloat16,  128, 128,
                          64                                                                               },
    SelectedAttnFwdConfig{Arch::kSm80,  SelectedAlgorithm::kQueryMajor,      DType::kFloat16,  256, 256,
                          64                                                                               },
};

// Backward is block-major on parts of 64 keys: with wgmma in the rows of sm_90a, for exactly the head dims
// of the row, and with mma.sync.
struct SelectedAttnBwdConfig {
  Arch arch;
  DType dtype;
  int head_dim;
  int head_dim_v;
};

inline constexpr int kSelectedBwdKeys = 64;

// Columns: arch, dtype, head_dim, head_dim_v. The first row that fits wins.
inline constexpr std::array kSelectedAttnBwdTable{
    SelectedAttnBwdConfig{Arch::kSm90a, DType::kBFloat16, 64,  64 },
    SelectedAttnBwdConfig{Arch::kSm90a, DType::kBFloat16, 128, 128},
    SelectedAttnBwdConfig{Arch::kSm90a, DType::kFloat16,  64,  64 },
    SelectedAttnBwdConfig{Arch::kSm90a, DType::kFloat16,  128, 128},
    SelectedAttnBwdConfig{Arch::kSm80,  DType::kBFloat16, 64,  64 },
    SelectedAttnBwdConfig{Arch::kSm80,  DType::kBFloat16, 128, 128},
    SelectedAttnBwdConfig{Arch::kSm80,  DType::kBFloat16, 192, 128},
    SelectedAttnBwdConfig{Arch::kSm80,  DType::kBFloat16, 256, 256},
    SelectedAttnBwdConfig{Arch::kSm80,  DType::kFloat16,  64,  64 },
    SelectedAttnBwdConfig{Arch::kSm80,  DType::kFloat16,  128, 128},
    SelectedAttnBwdConfig{Arch::kSm80,  DType::kFloat16,  192, 128},
    SelectedAttnBwdConfig{Arch::kSm80,  DType::kFloat16,  256, 256},
};

// ---- Splitting the work ----

// What the split depends on. All of it is known on the host.
struct SelectedShape {
  int64_t batch, total_q, total_k, num_heads_q, num_heads_kv, head_dim, head_dim_v;
  int64_t block_size, topk;
  bool has_block_index;
  size_t workspace_cap;

  constexpr int64_t group_size() const {
    return num_heads_kv == 0 ? 1 : num_heads_q / num_heads_kv;
  }
  constexpr int64_t num_block_slots() const { return total_k / block_size + batch; }
  // Whether sm_90a splits the blocks of a tile of queries by popularity. Other architectures need the
  // same workspace then.
  constexpr bool has_tiles() const {
    return head_dim == 128 && head_dim_v == 128 && block_size == kSelectedTileKeys &&
           group_size() >= kSelectedMinTileGroup && group_size() <= kSelectedMaxTileGroup;
  }
  constexpr SelectedTiles tiles() const {
    return selected_tiles(batch, total_q, group_size(), topk);
  }
};

constexpr SelectedShape selected_shape(const Problem& p) {
  return {p.batch,      p.total_q,    p.total_k, p.num_heads_q,     p.num_heads_kv, p.head_dim,
          p.head_dim_v, p.block_size, p.topk,    p.has_block_index, p.workspace_cap};
}

// Keys of a block that are resident at a time. Depends on the shape alone, so that rows of different
// architectures need the same workspace.
constexpr int64_t selected_keys(int64_t head_dim, int64_t head_dim_v, int64_t block_size) {
  const int64_t limit = head_dim <= 128 && head_dim_v <= 128 ? 128 : 64;
  return std::min(block_size, limit);
}

// A part is `keys` keys of a block: block slot s has parts s * splits .. s * splits + splits - 1,
// and each gives one partial row per query row. A segment is (KV head, range of query tokens): the
// unit in which partial rows exist. Launches cover whole segments.
struct SelectedSplit {
  int64_t keys;
  int64_t splits;
  int64_t num_parts;  // of one KV head
  int64_t partials;   // partial rows of one query row: topk * splits
  int64_t range;
  int64_t num_ranges;
  int64_t num_segments;
  int64_t segments_per_launch;
  int64_t num_launches;
  int64_t launches_per_build;  // launches whose work items are built together
  int64_t item_entries;        // CSR entries of one work item, at most
  int64_t item_capacity;       // work items of one segment, at most

  constexpr int64_t slots_per_launch() const { return segments_per_launch * range * partials; }
  constexpr int64_t rows_per_launch(int64_t group_size) const {
    return slots_per_launch() * group_size;
  }
  constexpr int64_t segments_per_build() const { return segments_per_launch * launches_per_build; }
};

inline constexpr int64_t kSelectedItemBytes = 32;
inline constexpr int64_t kMaxSegmentsPerLaunch = 128;

// What forward and backward choose differently.
struct SelectedSplitRules {
  int64_t keys;              // of a part, at most
  int64_t row_bytes;         // workspace of one partial row
  int64_t item_rows;         // query rows of one work item, at most
  int64_t max_item_entries;  // and queries
  int64_t range_rows;        // query rows of a segment, wanted
};

constexpr SelectedSplit split_selected(const SelectedShape& shape,
                                       const SelectedSplitRules& rules) {
  constexpr int64_t kMaxRows = int64_t{1} << 30;      // row numbers are 32-bit
  constexpr int64_t kBuildBytes = int64_t{64} << 20;  // work items built ahead
  const int64_t group = shape.group_size();
  SelectedSplit s{};
  s.keys = std::min(shape.block_size, rules.keys);
  s.splits = shape.block_size / s.keys;
  s.num_parts = shape.num_block_slots() * s.splits;
  s.partials = shape.topk * s.splits;

  // Long ranges give long runs of one block; short ones keep the queries in the L2 (measured).
  const int64_t most_ranges = group >= 8 ? 16 : 8;
  const int64_t wanted = std::max(ceil_div<int64_t>(rules.range_rows, group),
                                  ceil_div<int64_t>(shape.total_q, most_ranges));
  const int64_t cap_rows =
      std::min(static_cast<int64_t>(shape.workspace_cap) / rules.row_bytes, kMaxRows);
  const int64_t token_rows = s.partials * group;
  constexpr int64_t kMinRange = 16;  // holds under any cap
  const int64_t range = std::max(std::min(wanted, cap_rows / token_rows), kMinRange);
  s.num_ranges = std::max<int64_t>(1, ceil_div(shape.total_q, range));
  s.range = std::max<int64_t>(1, ceil_div(shape.total_q, s.num_ranges));
  s.num_segments = shape.num_heads_kv * s.num_ranges;
  const int64_t fitting = std::max<int64_t>(1, cap_rows / (s.range * token_rows));
  const int64_t most = std::min({fitting, s.num_segments, kMaxSegmentsPerLaunch});
  s.num_launches = ceil_div(s.num_segments, std::max<int64_t>(1, most));
  s.segments_per_launch = s.num_launches == 0 ? 1 : ceil_div(s.num_segments, s.num_launches);

  s.item_entries = std::clamp<int64_t>(rules.item_rows / group, 1, rules.max_item_entries);
  s.item_capacity =
      std::min(s.num_parts, s.range * s.partials) + ceil_div(s.range * s.partials, s.item_entries);
  const int64_t launch_bytes = s.segments_per_launch * s.item_capacity * kSelectedItemBytes;
  s.launches_per_build =
      std::clamp<int64_t>(kBuildBytes / launch_bytes, 1, std::max<int64_t>(1, s.num_launches));
  return s;
}

// Byte offsets of consecutive regions, each 256-byte aligned.
struct WorkspaceCursor {
  size_t bytes = 0;
  constexpr size_t take(int64_t size) {
    const size_t at = bytes;
    bytes += round_up<size_t>(static_cast<size_t>(size), 256);
    return at;
  }
};

// The block index that a call builds for itself.
struct SelectedIndexRegions {
  size_t start, entry, counts, counts_bytes;
};

constexpr SelectedIndexRegions take_index_regions(const SelectedShape& shape, WorkspaceCursor& at) {
  if (shape.has_block_index) return {};
  const int64_t slots = shape.num_block_slots();
  const size_t counts = block_index_workspace(shape.num_heads_kv, shape.total_q, slots);
  SelectedIndexRegions r{};
  r.start = at.take(shape.num_heads_kv * (slots + 1) * 4);
  r.entry = at.take(shape.num_heads_kv * shape.total_q * shape.topk * 4);
  r.counts = at.take(static_cast<int64_t>(counts));
  r.counts_bytes = counts;
  return r;
}

// ---- Forward ----

// Scratch of the block-major forward. The partial rows and their statistics obey the cap; the rest is
// linear in the number of tokens. With tiles, the index is built from what the popular blocks leave of
// topk_idx, whether or not the caller brings one.
struct SelectedFwdLayout {
  SelectedSplit split;
  SelectedIndexRegions index;
  SelectedTiles tiles;
  size_t counters, item_counts, items, partial_stats, partial;
  size_t marks;              // of the partial rows of all launches
  size_t zeros, zero_bytes;  // counters and marks
  size_t tail;  // what is left of topk_idx; shares its memory with `partial`, which comes later
  size_t tile_lists, tile_items, tile_stats, tile_marks;
  size_t bytes;
};

constexpr SelectedFwdLayout selected_fwd_layout(const SelectedShape& shape,
                                                const SelectedAttnFwdConfig& config) {
  const bool has_tiles = shape.has_tiles();
  const int64_t row_bytes = shape.head_dim_v * 2 / 4 * (has_packed_rows(config) ? 3 : 4);
  // Packed rows leave an eighth of the cap to the regions that do not shrink with it, so that 1 GiB holds
  // the whole workspace of 128K tokens.
  const int64_t counted_bytes = (row_bytes + 8) * 8 / (has_packed_rows(config) ? 7 : 8);
  SelectedFwdLayout l{};
  l.split = split_selected(
      shape, {.keys = selected_keys(shape.head_dim, shape.head_dim_v, shape.block_size),
              .row_bytes = counted_bytes,
              .item_rows = 1024,
              .max_item_entries = 512,  // what the shared memory of the wgmma row holds
              .range_rows = 32768});
  const SelectedSplit& s = l.split;
  const int64_t rows = s.rows_per_launch(shape.group_size());
  SelectedShape indexed = shape;
  indexed.has_block_index = shape.has_block_index && !has_tiles;
  WorkspaceCursor at;
  l.index = take_index_regions(indexed, at);
  // What has to be zero in the beginning is one piece of memory.
  l.zeros = l.counters = at.take((s.num_launches + 1) * 4);
  l.marks = at.take(has_tiles ? s.slots_per_launch() * s.num_launches : 0);
  l.tile_marks = at.take(has_tiles ? shape.num_heads_kv * shape.total_q : 0);
  l.zero_bytes = at.bytes - l.zeros;
  l.item_counts = at.take(s.segments_per_build() * 4);
  l.items = at.take(s.segments_per_build() * s.item_capacity * kSelectedItemBytes);
  l.partial_stats = at.take(rows * 8);
  const int64_t tail_bytes = has_tiles ? shape.num_heads_kv * shape.total_q * shape.topk * 4 : 0;
  l.tail = l.partial = at.take(std::max(rows * row_bytes, tail_bytes));
  if (has_tiles) {
    l.tiles = shape.tiles();
    const int64_t tiles = shape.num_heads_kv * l.tiles.num_tiles();
    l.tile_lists = at.take(tiles * l.tiles.list_ints() * 4);
    l.tile_items = at.take(tiles * kSelectedItemBytes);
    l.tile_stats = at.take(shape.total_q * shape.num_heads_q * 8);
  }
  l.bytes = at.bytes;
  return l;
}

// True when the row can compute the problem, whether or not it is the one to take.
constexpr bool fits(const SelectedAttnFwdConfig& config, Arch arch, const Problem& p) {
  if (config.arch != Arch::kSm80 && config.arch != arch) return false;
  if (config.dtype != p.dtype || p.head_dim > config.head_dim || p.head_dim_v > config.head_dim_v) {
    return false;
  }
  if (config.algorithm == SelectedAlgorithm::kBlockMajorWgmma) {
    return p.head_dim == config.head_dim && p.head_dim_v == config.head_dim_v &&
           p.block_size == config.keys && p.group_size() <= kSelectedMaxTileGroup;
  }
  return config.algorithm == SelectedAlgorithm::kQueryMajor ||
         selected_keys(p.head_dim, p.head_dim_v, p.block_size) <= config.keys;
}

// Query-major reads a key once for the whole group, block-major moves a partial row for every head and
// block; above these sizes of the group the former is less (measured on an H200). The rule may look at
// nothing that differs between the sequences of a batch or between batches: what a sequence gets must
// not depend on its neighbours.
constexpr bool is_query_major(const Problem& p) {
  return p.group_size() >= (p.head_dim <= 64 && p.head_dim_v <= 64 ? 56 : 40);
}

// Returns the row of kSelectedAttnFwdTable, or -1 when no kernel fits.
constexpr int find_selected_attn_fwd_row(Arch arch, const Problem& problem) {
  for (int row = 0; row < static_cast<int>(kSelectedAttnFwdTable.size()); ++row) {
    const SelectedAttnFwdConfig& config = kSelectedAttnFwdTable[static_cast<size_t>(row)];
    const bool is_wanted =
        (config.algorithm == SelectedAlgorithm::kQueryMajor) == is_query_major(problem);
    if (is_wanted && fits(config, arch, problem)) return row;
  }
  return -1;
}

constexpr bool fits(const SelectedAttnBwdConfig& config, Arch arch, const Problem& p) {
  if (config.dtype != p.dtype) return false;
  if (config.arch == Arch::kSm80) {
    return p.head_dim <= config.head_dim && p.head_dim_v <= config.head_dim_v;
  }
  return config.arch == arch && p.head_dim == config.head_dim &&
         p.head_dim_v == config.head_dim_v && p.block_size >= kSelectedBwdKeys;
}

// Returns the row of kSelectedAttnBwdTable, or -1 when no kernel fits.
constexpr int find_selected_attn_bwd_row(Arch arch, const Problem& problem) {
  for (int row = 0; row < static_cast<int>(kSelectedAttnBwdTable.size()); ++row) {
    if (fits(kSelectedAttnBwdTable[static_cast<size_t>(row)], arch, problem)) return row;
  }
  return -1;
}

// Of a row of kSelectedAttnFwdTable.
constexpr size_t selected_attn_fwd_workspace(const Problem& problem, int row) {
  const SelectedAttnFwdConfig& config = kSelectedAttnFwdTable[static_cast<size_t>(row)];
  if (config.algorithm == SelectedAlgorithm::kQueryMajor) return 0;
  return selected_fwd_layout(selected_shape(problem), config).bytes;
}

// ---- Backward ----

// Scratch of the backward. A launch covers whole KV heads, or some of the ranges of one; in that case
// dK and dV of the head are summed in fp32 across its launches. Beside the partial rows of dQ, which
// obey the cap, each work item writes its part of dK and dV in fp32.
struct SelectedBwdLayout {
  SelectedSplit split;
  int64_t heads_per_launch, ranges_per_launch, launches_per_head;
  int64_t launches_per_build;  // launches whose work items are built together
  SelectedIndexRegions index;
  size_t stats, counters, item_counts, items, part_items, marks, dkv_sum, dkv_items, dq_partial,
      bytes;

  constexpr int64_t segments_per_launch() const { return heads_per_launch * ranges_per_launch; }
  constexpr int64_t num_launches(int64_t num_heads_kv) const {
    return ceil_div(num_heads_kv, heads_per_launch) * launches_per_head;
  }
};

constexpr SelectedBwdLayout selected_bwd_layout(const SelectedShape& shape) {
  SelectedBwdLayout l{};
  l.split = split_selected(shape, {.keys = kSelectedBwdKeys,
                                   .row_bytes = shape.head_dim * 2,
                                   .item_rows = 2048,
                                   .max_item_entries = 2048,
                                   .range_rows = 65536});
  const SelectedSplit& s = l.split;
  const bool has_whole_heads = s.segments_per_launch >= s.num_ranges;
  l.launches_per_head =
      has_whole_heads ? 1 : ceil_div(s.num_ranges, std::max<int64_t>(1, s.segments_per_launch));
  l.ranges_per_launch = ceil_div(s.num_ranges, l.launches_per_head);
  l.heads_per_launch = has_whole_heads ? s.segments_per_launch / s.num_ranges : 1;
  const int64_t segments = l.segments_per_launch(), launches = l.num_launches(shape.num_heads_kv);
  // Items number their segments within launches, which are equally long when they hold whole heads.
  l.launches_per_build = has_whole_heads ? std::min(s.launches_per_build, launches) : 1;
  const int64_t built = segments * std::max<int64_t>(1, l.launches_per_build);
  const int64_t slots = segments * s.range * s.partials, dims = shape.head_dim + shape.head_dim_v;
  WorkspaceCursor at;
  l.index = take_index_regions(shape, at);
  l.stats = at.take(shape.total_q * shape.num_heads_q * 8);
  l.counters = at.take(launches * 4);
  l.item_counts = at.take(built * 4);
  l.items = at.take(built * s.item_capacity * kSelectedItemBytes);
  l.part_items = at.take(built * (s.num_parts + 1) * 4);
  l.marks = at.take(slots);
  l.dkv_sum = at.take(has_whole_heads ? 0 : shape.total_k * dims * 4);
  l.dkv_items = at.take(segments * s.item_capacity * s.keys * dims * 4);
  l.dq_partial = at.take(slots * shape.group_size() * shape.head_dim * 2);
  l.bytes = at.bytes;
  return l;
}

constexpr size_t selected_attn_bwd_workspace(const Problem& problem) {
  return selected_bwd_layout(selected_shape(problem)).bytes;
}

// ---- Choices that documentation and benchmarks rely on ----

namespace selected_detail {

constexpr SelectedAlgorithm algorithm_at(Arch arch, int64_t group, int64_t dim,
                                         int64_t block_size) {
  Problem p{};
  p.dtype = DType::kBFloat16;
  p.num_heads_q = group;
  p.num_heads_kv = 1;
  p.head_dim = p.head_dim_v = dim;
  p.block_size = block_size;
  return kSelectedAttnFwdTable[static_cast<size_t>(find_selected_attn_fwd_row(arch, p))].algorithm;
}

static_assert(algorithm_at(Arch::kSm90a, 4, 128, 64) == SelectedAlgorithm::kBlockMajorWgmma);
static_assert(algorithm_at(Arch::kSm90a, 4, 128, 128) == SelectedAlgorithm::kBlockMajor);
static_assert(algorithm_at(Arch::kSm90a, 4, 120, 64) == SelectedAlgorithm::kBlockMajor);
static_assert(algorithm_at(Arch::kSm80, 4, 128, 64) == SelectedAlgorithm::kBlockMajor);
static_assert(algorithm_at(Arch::kSm90a, 64, 128, 64) == SelectedAlgorithm::kQueryMajor);
static_assert(algorithm_at(Arch::kSm80, 64, 256, 256) == SelectedAlgorithm::kQueryMajor);

constexpr Arch bwd_arch_at(Arch arch, int64_t dim, int64_t block_size) {
  Problem p{};
  p.dtype = DType::kBFloat16;
  p.head_dim = p.head_dim_v = dim;
  p.block_size = block_size;
  return kSelectedAttnBwdTable[static_cast<size_t>(find_selected_attn_bwd_row(arch, p))].arch;
}

static_assert(bwd_arch_at(Arch::kSm90a, 128, 64) == Arch::kSm90a);
static_assert(bwd_arch_at(Arch::kSm90a, 64, 256) == Arch::kSm90a);
static_assert(bwd_arch_at(Arch::kSm90a, 128, 32) == Arch::kSm80);
static_assert(bwd_arch_at(Arch::kSm90a, 120, 64) == Arch::kSm80);
static_assert(bwd_arch_at(Arch::kSm80, 128, 64) == Arch::kSm80);

}  // namespace selected_detail

}  // namespace fsattn
