// The inverse of a selection: for each block of keys the queries that want it (format: BuildBlockIndex
// in fsattn/ops.h). The selected backward pass walks it, so that each block of dK and dV has one owner.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "base/math.h"
#include "params/select_blocks.h"

namespace fsattn::cpu {

// Tokens are counted in chunks, so that a head with many tokens still fills every core. At most 16
// chunks: the counts stay linear in the sequence length (16 * T / S numbers a head).
constexpr int64_t block_index_num_chunks(int64_t total_q) {
  return std::clamp<int64_t>(total_q / 1024, 1, 16);
}

// Bytes of params.scratch that build_block_index() uses: one count a (kv head, chunk, slot).
constexpr size_t block_index_scratch_bytes(int64_t num_heads_kv, int64_t total_q,
                                           int64_t num_slots) {
  return static_cast<size_t>(num_heads_kv * block_index_num_chunks(total_q) * num_slots) *
         sizeof(int32_t);
}

// Fills params.mask.index from params.mask.topk_idx. Two counting passes and a prefix sum: O(T * topk)
// for rows without repeated ids, the same result for every number of threads. An id is read as a
// number only; those outside the sequence or behind the query's block are dropped.
void build_block_index(const BlockIndexParams& params);

}  // namespace fsattn::cpu
