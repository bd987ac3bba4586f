// The block index on the CPU: for each block of keys the queries that want it. Contract:
// BuildBlockIndex in fsattn/ops.h. The selected backward pass walks it, so that each block of dK and
// dV has one owner. Signature as in params/backend.h; row and stream have no meaning here.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "params/select_blocks.h"

namespace fsattn::cpu {

// Tokens are counted in chunks, so that a head with many tokens still fills every core. At most 16:
// the counts stay linear in the sequence length (16 * T / S numbers a head).
constexpr int64_t block_index_num_chunks(int64_t total_q) {
  return std::clamp<int64_t>(total_q / 1024, 1, 16);
}

// Bytes of params.scratch that block_index() uses: one count a (KV head, chunk, slot).
constexpr size_t block_index_scratch_bytes(int64_t num_heads_kv, int64_t total_q,
                                           int64_t num_slots) {
  return static_cast<size_t>(num_heads_kv * block_index_num_chunks(total_q) * num_slots) *
         sizeof(int32_t);
}

// Fills params.mask.index from params.mask.topk_idx, entries behind the last one with -1. Two passes
// over the rows and a prefix sum: O(T * topk) for ascending rows, the same bits for every number of
// threads. An id is compared, never used as an address; those outside the sequence or behind the
// query's block are dropped.
void block_index(int row, const BlockIndexParams& params, Stream stream);

}  // namespace fsattn::cpu
