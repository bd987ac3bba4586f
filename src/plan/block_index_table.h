// The compiled block-index kernels, the choice between them and the scratch memory they need.
#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "base/math.h"
#include "plan/problem.h"

namespace fsattn {

// A row works on 32 * query_words queries at a time; its bit sets cover `window` block slots.
struct BlockIndexConfig {
  Arch arch;
  int query_words;
  int window;
};

// Picks (queries of a step times topk) that the threads of one CTA hold in registers.
inline constexpr int kBlockIndexPicks = 4096;

// Shared memory: 4 * (query_words + 4) bytes a slot, plus 34 KiB, stays below the 99 KiB that every
// device since sm_80 has. Long sequences take more than one window.
inline constexpr std::array kBlockIndexTable{
    BlockIndexConfig{Arch::kSm80, 8, 1344},
    BlockIndexConfig{Arch::kSm80, 4, 2080},
    BlockIndexConfig{Arch::kSm80, 2, 2784},
    BlockIndexConfig{Arch::kSm80, 1, 3328},
};

// The widest row whose queries fit in registers and whose window covers all slots; when none does,
// the one with the largest window among those with at least two words.
constexpr int find_block_index_row(int64_t topk, int64_t num_slots) {
  int best = -1;
  for (int row = 0; row < static_cast<int>(kBlockIndexTable.size()); ++row) {
    const BlockIndexConfig& config = kBlockIndexTable[static_cast<size_t>(row)];
    if (32 * config.query_words * topk > kBlockIndexPicks) continue;
    if (num_slots <= config.window) return row;
    if (best < 0 || config.query_words >= 2) best = row;
  }
  return best;
}

constexpr int find_block_index_row(const Problem& problem) {
  return find_block_index_row(problem.topk, problem.num_block_slots());
}

// Queries that one CTA of the counting pass walks over: whole steps of 256, at most 64 chunks a head,
// so that the table of counts stays linear in the number of tokens.
constexpr int64_t block_index_chunk(int64_t total_q) {
  constexpr int64_t kUnit = 256, kMaxChunks = 64;
  return std::max(kUnit, round_up(ceil_div(total_q, kMaxChunks), kUnit));
}

// Bytes of scratch memory: int32 [Hkv, chunks, num_slots].
constexpr size_t block_index_workspace(int64_t num_heads_kv, int64_t total_q, int64_t num_slots) {
  const int64_t chunks = ceil_div(total_q, block_index_chunk(total_q));
  return static_cast<size_t>(num_heads_kv * chunks * num_slots) * sizeof(int32_t);
}

constexpr size_t block_index_workspace(const Problem& problem) {
  return block_index_workspace(problem.num_heads_kv, problem.total_q, problem.num_block_slots());
}

static_assert(find_block_index_row(16, 1024) == 0);
static_assert(find_block_index_row(16, 2049) == 1);
static_assert(find_block_index_row(128, 100) == 3);
static_assert(find_block_index_row(16, 100000) == 2);

}  // namespace fsattn
