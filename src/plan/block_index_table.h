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

// A row takes rows of topk_idx of up to lanes * places ids; its counts cover `window` block slots.
struct BlockIndexConfig {
  Arch arch;
  int lanes;   // that share a query
  int places;  // ids of a query that a lane holds
  int window;
};

// Picks (ids of topk_idx) that the threads of one CTA hold in registers.
inline constexpr int kBlockIndexPicks = 4096;

// Shared memory: 256 / lanes + 10 bytes a slot, plus 16 KiB, stays below the 99 KiB that every device since
// sm_80 has. Longer sequences take more than one window.
inline constexpr std::array kBlockIndexTable{
    BlockIndexConfig{Arch::kSm80, 16, 1, 3072},
    BlockIndexConfig{Arch::kSm80, 32, 1, 4352},
    BlockIndexConfig{Arch::kSm80, 32, 2, 4352},
    BlockIndexConfig{Arch::kSm80, 32, 4, 4352},
};

// The first row that holds a query's ids; -1 when none does.
constexpr int find_block_index_row(int64_t topk) {
  for (int row = 0; row < static_cast<int>(kBlockIndexTable.size()); ++row) {
    const BlockIndexConfig& config = kBlockIndexTable[static_cast<size_t>(row)];
    if (topk <= config.lanes * config.places) return row;
  }
  return -1;
}

constexpr int find_block_index_row(const Problem& problem) {
  return find_block_index_row(problem.topk);
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

static_assert(find_block_index_row(1) == 0);
static_assert(find_block_index_row(16) == 0);
static_assert(find_block_index_row(17) == 1);
static_assert(find_block_index_row(128) == 3);
static_assert(find_block_index_row(129) == -1);

}  // namespace fsattn
