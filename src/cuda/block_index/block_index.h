#pragma once
#include "params/select_blocks.h"
#include "plan/block_index_table.h"

namespace fsattn {

// block -> the queries that want it (BuildBlockIndex in fsattn/ops.h). Stream-ordered, allocates
// nothing. Entries behind the last one of a KV head are -1.
void launch_block_index(int row, const BlockIndexParams& params, Stream stream);

template <BlockIndexConfig kConfig>
void launch_block_index(const BlockIndexParams& params, Stream stream);

}  // namespace fsattn
