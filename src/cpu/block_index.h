// The block index on the CPU: for each block of keys the queries that want it. Contract:
// BuildBlockIndex in fsattn/ops.h. The selected backward pass walks it, so that each block of dK and
// dV has one owner. Signature as in params/backend.h; row and stream have no meaning here.
#pragma once
#include "params/select_blocks.h"

namespace fsattn::cpu {

// Fills params.mask.index from params.mask.topk_idx, entries behind the last one with -1. Two passes
// over the rows and a prefix sum: O(T * topk) for ascending rows, the same bits for every number of
// threads. Scratch: cpu_index_counts_bytes() of plan/cpu_workspace.h. An id is compared, never used as an address; those outside the sequence or behind the
// query's block are dropped.
void block_index(int row, const BlockIndexParams& params, Stream stream);

}  // namespace fsattn::cpu
